"""Attention over sequences of unequal lengths: kernels that give the same result at different speeds.

The sequences of a batch end with padding, which no real token may attend to. `scaled_dot_product_attention` needs a
mask for that, and with a mask it cannot use flash attention. Flash attention for sequences of variable length needs
none: if the padded batch is one row of tokens, a sample's real tokens are one sequence and its padding is another.

Axes: B batch, S tokens, A heads, E dims of a head.
"""

from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

# default: torch's choice among kernels that take a mask. varlen: flash attention, for half precision on a GPU.
Kernel = Literal["default", "efficient", "cudnn", "varlen"]

_BACKENDS = {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Padding(NamedTuple):
    """Which tokens are padding, in the form that the kernel needs: one of the two is None."""

    key_mask: Tensor | None  # (B, 1, 1, S), True where a token may be attended to
    boundaries: Tensor | None  # (2B + 1,), of varlen

    def of_kept(self, index_BK: Tensor, tokens: int) -> "Padding":
        """The padding of the selected tokens, if all that are left out are real ones."""
        kept = index_BK.shape[1]
        if self.boundaries is not None:
            lengths_B = self.boundaries[1::2] - self.boundaries[:-1:2]
            return Padding(None, boundaries(lengths_B - (tokens - kept), kept))
        assert self.key_mask is not None
        return Padding(self.key_mask.gather(3, index_BK[:, None, None, :]), None)


def padding_of(real_BS: Tensor, kernel: Kernel) -> Padding:
    """real_BS: True at real tokens, which come first in each sample if the kernel is varlen."""
    if kernel == "varlen":
        return Padding(None, boundaries(real_BS.sum(1), real_BS.shape[1]))
    return Padding(real_BS[:, None, None, :], None)


def boundaries(lengths_B: Tensor, tokens: int) -> Tensor:
    """Where sequences begin and end in the row of all tokens (B * S) of a padded batch: (2B + 1,), int32.

    lengths_B: real tokens of each sample, which come first. The sequences are the real tokens of the first sample, its
    padding, the real tokens of the second, and so on. Those without padding have an empty second sequence.
    """
    starts_B = torch.arange(len(lengths_B), device=lengths_B.device) * tokens
    pairs_B2 = torch.stack([starts_B, starts_B + lengths_B], dim=1).flatten()
    return torch.cat([pairs_B2, pairs_B2.new_full((1,), len(lengths_B) * tokens)]).int()


def attention(
    q_BSAE: Tensor,
    k_BSAE: Tensor,
    v_BSAE: Tensor,
    padding: "Padding | None",
    kernel: Kernel,
) -> Tensor:
    """Attended values (B, S, A, E) of real tokens; those of padding are finite and mean nothing. None: no padding."""
    if padding is not None and padding.boundaries is not None:
        batch, tokens = q_BSAE.shape[:2]
        q, k, v = (x_BSAE.to(v_BSAE.dtype).flatten(0, 1) for x_BSAE in (q_BSAE, k_BSAE, v_BSAE))
        cu_sequences = padding.boundaries
        attended: Tensor = varlen_attn(q, k, v, cu_sequences, cu_sequences, tokens, tokens)
        return attended.reshape(batch, tokens, *q.shape[1:])
    mask = None if padding is None else padding.key_mask
    backend = _BACKENDS.get(kernel)
    choice: Any = sdpa_kernel(backend) if backend else nullcontext()
    with choice:
        attended_BASE = F.scaled_dot_product_attention(
            q_BSAE.transpose(1, 2), k_BSAE.transpose(1, 2), v_BSAE.transpose(1, 2), attn_mask=mask
        )
    return attended_BASE.transpose(1, 2)
