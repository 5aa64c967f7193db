"""The blocks of XUT: residual branches under adaptive layer norm around attention, cross-attention and SwiGLU.

Axes: B batch, S tokens (image then text), A heads, E dims of a head, P rotated pairs of a head, D width.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.rope import rotary_table, rotate

BranchKind = Literal["attn", "cross", "mlp"]
NORM_EPS = 1e-6  # of the released weights


class Modulation(NamedTuple):
    """What the condition does to a branch, (B, 1, D) float32: norm(h) * gain + shift before it, * gate after it."""

    gain: Tensor
    shift: Tensor
    gate: Tensor


class Context(NamedTuple):
    """What all blocks of a pass share."""

    position: Tensor  # (B, S, 2), (y, x); text at (0, 0)
    rotary: Tensor | None  # (B, S, 1, P, 2) table of angles; None where every attention learns its own frequencies
    key_mask: Tensor | None  # (B, 1, 1, S), True: may be attended to; None: all may, on the fastest attention kernel
    condition: Tensor  # (B, D)
    shared: dict[BranchKind, Modulation] | None  # None where every branch has its own adaLN


class RMSNorm(nn.Module):
    """x / rms(x) * weight, then * gain + shift where given; computed in float32, returned in the dtype of x."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, gain: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        normed = F.rms_norm(x.float(), (x.shape[-1],), eps=NORM_EPS)
        if gain is None or shift is None:
            return (normed * self.weight).to(x.dtype)
        return torch.addcmul(shift, normed, self.weight * gain).to(x.dtype)


class AdaLN(nn.Module):
    """Condition (B, D) -> Modulation. Its last layer starts at zero: gain 1, shift 0, gate 1 (0 with zero_gate).

    deep: LayerNorm, Linear, Mish, Linear at four times the width; otherwise LayerNorm, Mish, Linear.
    """

    def __init__(self, dim: int, *, deep: bool, zero_gate: bool) -> None:
        super().__init__()
        self.zero_gate = zero_gate
        self.norm = nn.LayerNorm(dim)
        self.hidden = nn.Linear(dim, 4 * dim) if deep else nn.Identity()
        self.out = nn.Linear(4 * dim if deep else dim, 3 * dim)

    def forward(self, condition_BD: Tensor) -> Modulation:
        hidden: Tensor = self.hidden(self.norm(condition_BD))
        scale, shift, gate = self.out(F.mish(hidden)).float().unsqueeze(1).chunk(3, dim=-1)
        return Modulation(1 + scale, shift, gate if self.zero_gate else 1 + gate)


class Attention(nn.Module):
    """What self-attention and cross-attention have in common: rotation, mask, output projection."""

    def __init__(self, dim: int, heads: int, *, qk_norm: bool, log_frequency: Tensor | None) -> None:
        super().__init__()
        self.heads = heads
        self.out = nn.Linear(dim, dim)
        self.q_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // heads) if qk_norm else nn.Identity()
        self.log_frequency = None if log_frequency is None else nn.Parameter(log_frequency)

    def attend(self, q_BSAE: Tensor, k_BSAE: Tensor, v_BSAE: Tensor, context: Context) -> Tensor:
        rotary = context.rotary
        if self.log_frequency is not None:
            rotary = rotary_table(context.position, self.log_frequency.exp())
        assert rotary is not None
        q_BSAE, k_BSAE = rotate(self.q_norm(q_BSAE), rotary), rotate(self.k_norm(k_BSAE), rotary)
        attended_BASE = F.scaled_dot_product_attention(
            q_BSAE.transpose(1, 2), k_BSAE.transpose(1, 2), v_BSAE.transpose(1, 2), attn_mask=context.key_mask
        )
        out_BSD: Tensor = self.out(attended_BASE.transpose(1, 2).flatten(2))
        return out_BSD


class SelfAttention(Attention):
    def __init__(self, dim: int, heads: int, *, qk_norm: bool, log_frequency: Tensor | None) -> None:
        super().__init__(dim, heads, qk_norm=qk_norm, log_frequency=log_frequency)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        q, k, v = self.qkv(x_BSD).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.attend(q, k, v, context)


class CrossAttention(Attention):
    """Queries of x, keys and values of the skip: the same tokens at an earlier depth, hence the same positions."""

    def __init__(self, dim: int, heads: int, *, qk_norm: bool, log_frequency: Tensor | None, skip_norm: bool) -> None:
        super().__init__(dim, heads, qk_norm=qk_norm, log_frequency=log_frequency)
        self.skip_norm = RMSNorm(dim) if skip_norm else nn.Identity()
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)

    def forward(self, x_BSD: Tensor, context: Context, skip_BSD: Tensor) -> Tensor:
        q = self.q(x_BSD).unflatten(-1, (self.heads, -1))
        k, v = self.kv(self.skip_norm(skip_BSD)).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.attend(q, k, v, context)


class SwiGLU(nn.Module):
    """silu(a) * b between two linear layers, a and b being the halves of what the first one gives."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        a, b = self.up(x_BSD).chunk(2, dim=-1)
        out_BSD: Tensor = self.down(F.silu(a) * b)
        return out_BSD


class Branch(nn.Module):
    """One residual branch: h + gate * function(norm(h) * gain + shift).

    With replace_stream the modulated norm takes the place of h in that sum, as in the public release.
    """

    def __init__(
        self, kind: BranchKind, dim: int, function: nn.Module, *, adaln: AdaLN | None, replace_stream: bool
    ) -> None:
        super().__init__()
        self.kind = kind
        self.replace_stream = replace_stream
        self.norm = RMSNorm(dim)
        self.function = function
        self.adaln = adaln

    def forward(self, h_BSD: Tensor, context: Context, *function_inputs: object) -> Tensor:
        if self.adaln is not None:
            gain, shift, gate = self.adaln(context.condition)
        else:
            assert context.shared is not None
            gain, shift, gate = context.shared[self.kind]
        normed_BSD = self.norm(h_BSD, gain, shift)
        stream_BSD = normed_BSD if self.replace_stream else h_BSD
        # In float32, rounded once: bfloat16 around 1 has steps of 2^-7, and a gate that moved less would not count.
        return torch.addcmul(stream_BSD.float(), gate, self.function(normed_BSD, *function_inputs).float()).to(
            h_BSD.dtype
        )


class Block(nn.Module):
    """Self-attention, cross-attention to a skip where the block reads one, feed-forward (HDM report, figure 2).

    A skip that is merged otherwise comes in first (UViT, arXiv 2209.12152): concat is a linear layer from (h, skip) to
    the width of h, add a plain sum.
    """

    def __init__(
        self,
        attn: Branch,
        mlp: Branch,
        *,
        cross: Branch | None = None,
        concat: nn.Linear | None = None,
        add: bool = False,
    ) -> None:
        super().__init__()
        self.attn = attn
        self.cross = cross
        self.mlp = mlp
        self.concat = concat
        self.add = add
        self.recompute = False  # compute this block's activations again in the backward pass instead of keeping them

    def forward(self, h_BSD: Tensor, context: Context, skip_BSD: Tensor | None = None) -> Tensor:
        if self.concat is not None:
            assert skip_BSD is not None
            h_BSD = self.concat(torch.cat([h_BSD, skip_BSD], dim=-1))
        if self.add:
            assert skip_BSD is not None
            h_BSD = h_BSD + skip_BSD
        h_BSD = self.attn(h_BSD, context, context)
        if self.cross is not None:
            h_BSD = self.cross(h_BSD, context, context, skip_BSD)
        out_BSD: Tensor = self.mlp(h_BSD, context)
        return out_BSD
