"""Two-dimensional rotary embedding: queries and keys turned by angles that grow with the token's (y, x).

Angles and tables are float32 whatever the model computes in: bfloat16 would place angles in steps of 0.06 rad.
A token at position (0, 0) is turned by nothing; text tokens sit there (NoPE).

Axes: B batch, S tokens (image then text), A heads (1 where all heads share a table), E dims of a head, F = E / 4
frequencies of one axis, P = E / 2 pairs: pair i is dims (2i, 2i+1), its angle the i-th of (f0 y, f0 x, f1 y, f1 x ...).
"""

import math

import torch
from torch import Tensor


def axial_frequencies(head_dim: int) -> Tensor:
    """Frequencies (1, F, 2), the same for y and x: half of them evenly spaced in log from pi to 5 pi, the others zero.

    So the first half of a head's dims turns with the position, the second half never (HDM report, section 3.4).
    Float32 also where a model is built under another default type, as diffusers does to load one in half precision.
    Positions span about 1: the slowest pair turns half a circle over a square picture, the fastest two and a half.
    """
    turning = head_dim // 8
    steps_F = torch.arange(turning, dtype=torch.float32) / max(1, turning - 1)
    frequency_F = torch.cat([math.pi * 5**steps_F, torch.zeros(turning, dtype=torch.float32)])
    return frequency_F[None, :, None].expand(-1, -1, 2).contiguous()


def rotary_table(position_BS2: Tensor, frequency_AF2: Tensor) -> Tensor:
    """Cosines and sines (B, S, A, P, 2), float32, of position x frequency."""
    angle_BSAP = (position_BS2.float()[:, :, None, None, :] * frequency_AF2.float()).flatten(-2)
    return torch.stack([angle_BSAP.cos(), angle_BSAP.sin()], dim=-1)


def rotate(x_BSAE: Tensor, table_BSAP2: Tensor) -> Tensor:
    """Every pair (a, b) of a head's dims -> (a cos - b sin, b cos + a sin).

    One complex product where kernels run as written: the six real ones take a seventh of a training step on a CPU.
    The compiler fuses the real ones and cannot read complex numbers.
    """
    pairs_BSAP2 = x_BSAE.float().reshape(*x_BSAE.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs_BSAP2.unbind(-1), table_BSAP2.unbind(-1)
        turned_BSAP2 = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        turned_BSAP2 = torch.view_as_real(torch.view_as_complex(pairs_BSAP2) * torch.view_as_complex(table_BSAP2))
    return turned_BSAP2.flatten(-2).to(x_BSAE.dtype)
