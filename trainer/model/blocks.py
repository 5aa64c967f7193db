"""The blocks of XUT: residual branches under adaptive layer norm around attention, cross-attention and SwiGLU.

Axes: B batch, S tokens (image, then text), D width, A heads, E dims of a head, P = E / 2 rotary pairs of a head.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.model.attention import Kernel, Padding, attention
from trainer.model.config import XUTConfig
from trainer.model.rope import rotary_table, rotate

BranchKind = Literal["attn", "cross", "mlp"]
NORM_EPS = 1e-6  # as in the released weights


class Modulation(NamedTuple):
    """What the condition contributes to a residual branch: h + gate * function(norm(h) * gain + shift).

    Each is (B, 1, D), float32.
    """

    gain: Tensor
    shift: Tensor
    gate: Tensor


class Context(NamedTuple):
    """Inputs of a forward pass that all blocks share."""

    position: Tensor  # (B, S, 2), float32, (y, x); text tokens are at (0, 0)
    rotary: Tensor | None  # (B, S, 1, P, 2), cosines and sines; None if every attention layer learns its frequencies
    padding: Padding | None  # None: all tokens are real
    condition: Tensor  # (B, D), embedding of time and aspect ratio
    shared: dict[BranchKind, Modulation] | None  # None if every branch has its own adaLN
    kernel: Kernel = "default"  # of attention


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, then * gain + shift if given.

    Computed in float32 and rounded once, to the dtype of x.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, gain: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        normed = F.rms_norm(x.float(), (x.shape[-1],), eps=NORM_EPS)
        if gain is None or shift is None:
            return (normed * self.weight).to(x.dtype)
        return torch.addcmul(shift, normed, self.weight * gain).to(x.dtype)


class AdaLN(nn.Module):
    """Maps the condition (B, D) to a Modulation (HDM report, section 3.3).

    deep: LayerNorm, Linear to four times the width, Mish, Linear. Otherwise: LayerNorm, Mish, Linear. The model
    initialises the last layer to zero, which gives gain 1, shift 0, and gate 1, or 0 with zero_gate.
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
    """Rotary multi-head attention without its input projections, which the two subclasses add."""

    def __init__(self, config: XUTConfig) -> None:
        super().__init__()
        self.heads, head_dim = config.heads, config.dim // config.heads
        self.out = nn.Linear(config.dim, config.dim)
        self.q_norm = RMSNorm(head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim) if config.qk_norm else nn.Identity()
        log_pi = torch.full((self.heads, head_dim // 4, 2), math.log(math.pi))
        self.log_frequency = nn.Parameter(log_pi) if config.rotary == "learned" else None

    def attend(self, q_BSAE: Tensor, k_BSAE: Tensor, v_BSAE: Tensor, context: Context) -> Tensor:
        """Output (B, S, D) of attention over all real tokens."""
        rotary = context.rotary
        if self.log_frequency is not None:
            rotary = rotary_table(context.position, self.log_frequency.exp())
        assert rotary is not None
        q_BSAE, k_BSAE = rotate(self.q_norm(q_BSAE), rotary), rotate(self.k_norm(k_BSAE), rotary)
        attended_BSAE = attention(q_BSAE, k_BSAE, v_BSAE, context.padding, context.kernel)
        out_BSD: Tensor = self.out(attended_BSAE.flatten(2))
        return out_BSD


class SelfAttention(Attention):
    """Queries, keys and values from one projection of x."""

    def __init__(self, config: XUTConfig) -> None:
        super().__init__(config)
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        q, k, v = self.qkv(x_BSD).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.attend(q, k, v, context)


class CrossAttention(Attention):
    """Queries from x, keys and values from the skip connection.

    The skip holds the same tokens at an earlier depth, so both sides have the same positions.
    """

    def __init__(self, config: XUTConfig) -> None:
        super().__init__(config)
        self.skip_norm = RMSNorm(config.dim) if config.skip_norm else nn.Identity()
        self.q = nn.Linear(config.dim, config.dim, bias=False)
        self.kv = nn.Linear(config.dim, 2 * config.dim, bias=False)

    def forward(self, x_BSD: Tensor, context: Context, skip_BSD: Tensor) -> Tensor:
        q = self.q(x_BSD).unflatten(-1, (self.heads, -1))
        k, v = self.kv(self.skip_norm(skip_BSD)).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.attend(q, k, v, context)


class SwiGLU(nn.Module):
    """Feed-forward down(silu(a) * b), where a and b are the two halves of up(x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        a, b = self.up(x_BSD).chunk(2, dim=-1)
        out_BSD: Tensor = self.down(F.silu(a) * b)
        return out_BSD


class Branch(nn.Module):
    """A residual branch: h + gate * function(norm(h) * gain + shift).

    With `config.replace_stream` the modulated norm takes the place of h in that sum, as in the public release.
    """

    def __init__(self, kind: BranchKind, config: XUTConfig, function: nn.Module) -> None:
        super().__init__()
        self.kind = kind
        self.replace_stream = config.replace_stream
        self.norm = RMSNorm(config.dim)
        self.function = function
        per_layer = config.adaln == "per_layer"
        self.adaln = AdaLN(config.dim, deep=False, zero_gate=config.zero_gate) if per_layer else None

    def forward(self, h_BSD: Tensor, context: Context, *function_inputs: object) -> Tensor:
        if self.adaln is not None:
            gain, shift, gate = self.adaln(context.condition)
        else:
            assert context.shared is not None
            gain, shift, gate = context.shared[self.kind]
        normed_BSD = self.norm(h_BSD, gain, shift)
        stream_BSD = normed_BSD if self.replace_stream else h_BSD
        # In float32, rounded once: bfloat16 has steps of 2^-7 around 1 and would drop smaller changes of the gate.
        out_BSD = torch.addcmul(stream_BSD.float(), gate, self.function(normed_BSD, *function_inputs).float())
        return out_BSD.to(h_BSD.dtype)


class Block(nn.Module):
    """Self-attention, cross-attention to the skip if the block reads one, feed-forward (HDM report, figure 2).

    The alternatives to cross-attention merge the skip before self-attention, as UViT does (arXiv 2209.12152): concat
    projects (h, skip) to the width of h, add sums the two.
    """

    def __init__(self, config: XUTConfig, *, reads_skip: bool = False) -> None:
        super().__init__()
        skip = config.skip if reads_skip else "none"
        self.attn = Branch("attn", config, SelfAttention(config))
        self.cross = Branch("cross", config, CrossAttention(config)) if skip == "cross" else None
        self.mlp = Branch("mlp", config, SwiGLU(config.dim, config.mlp_dim))
        self.concat = nn.Linear(2 * config.dim, config.dim) if skip == "concat" else None
        self.add = skip == "add"
        self.number = 1  # in forward order, set by the model
        self.recompute = False  # activation checkpointing: recompute this block in the backward pass

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
