"""Two-dimensional rotary embedding: rotates queries and keys by angles proportional to the token's (y, x).

Angles and tables are always float32; bfloat16 would round angles to steps of 0.06 rad. A token at position (0, 0) is
not rotated, which gives text tokens no position (NoPE; HDM report, section 3.4).

Axes: B batch, S tokens (image, then text), A heads (1 if all heads share a table), E dims of a head, F = E / 4
frequencies per axis, P = E / 2 pairs. Pair i is dims (2i, 2i+1); the angles of the pairs are (f0 y, f0 x, f1 y, ...).
"""

import math

import torch
from torch import Tensor


def axial_frequencies(head_dim: int) -> Tensor:
    """Frequencies (1, F, 2), float32, equal for y and x: half spaced evenly in log from pi to 5 pi, the others zero.

    The first half of a head's dims thus rotates with the position and the second half never does (HDM report, section
    3.4). Positions span about 1, so over a square picture the slowest pair turns half a circle and the fastest two and
    a half.
    """
    turning = head_dim // 8
    # The dtype is explicit because diffusers builds models under a half-precision default.
    steps_F = torch.arange(turning, dtype=torch.float32) / max(1, turning - 1)
    frequency_F = torch.cat([math.pi * 5**steps_F, torch.zeros(turning, dtype=torch.float32)])
    return frequency_F[None, :, None].expand(-1, -1, 2).contiguous()


def rotary_table(position_BS2: Tensor, frequency_AF2: Tensor) -> Tensor:
    """Cosines and sines (B, S, A, P, 2), float32, of position times frequency."""
    angle_BSAP = (position_BS2.float()[:, :, None, None, :] * frequency_AF2.float()).flatten(-2)
    return torch.stack([angle_BSAP.cos(), angle_BSAP.sin()], dim=-1)


def rotate(x_BSAE: Tensor, table_BSAP2: Tensor) -> Tensor:
    """Maps every pair (a, b) of a head's dims to (a cos - b sin, b cos + a sin); keeps the dtype of x.

    Eager mode uses one complex product, because the six real ones take a seventh of a training step on a CPU. The
    compiler fuses the real ones and does not support complex numbers.
    """
    pairs_BSAP2 = x_BSAE.float().reshape(*x_BSAE.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs_BSAP2.unbind(-1), table_BSAP2.unbind(-1)
        turned_BSAP2 = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        turned_BSAP2 = torch.view_as_real(torch.view_as_complex(pairs_BSAP2) * torch.view_as_complex(table_BSAP2))
    return turned_BSAP2.flatten(-2).to(x_BSAE.dtype)
