"""Pixels <-> latents. A codec is frozen; the model trains on its latents, whose channels have about unit variance.

Legend: B batch, H W pixel rows and columns, h w latent rows and columns (H / factor, W / factor), C latent channels,
3 = red, green, blue, P values of one pixel block (3 * factor * factor) in the order of `pixel_unshuffle`.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Codec(Protocol):
    """What the trainer and the sampler need to know of an image codec."""

    name: str
    channels: int
    factor: int  # pixels along the side of one latent
    loss_weight_C: Tensor  # of each channel's squared error in training; mean 1

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> fp32 latents (B, C, h, w). ValueError where H or W is no multiple of factor."""
        ...

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> uint8 (B, 3, H, W)."""
        ...


def check_sides(name: str, factor: int, pixels_B3HW: Tensor) -> None:
    """ValueError for pictures of which the codec's blocks do not make a whole number."""
    height, width = pixels_B3HW.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"pictures of {width} x {height} pixels: the codec {name} needs multiples of {factor}")


class LinearCodec(nn.Module):
    """Blocks of pixels times a matrix with orthonormal rows, scaled to unit variance by fixed statistics.

    Decoding multiplies by the transposed matrix: without the rounding to uint8, decode(encode(x)) is the orthogonal
    projection of x onto the rows, the nearest picture that the channels can hold.
    """

    basis_CP: Tensor
    mean_C11: Tensor
    std_C11: Tensor
    loss_weight_C: Tensor

    def __init__(self, name: str, basis_CP: Tensor, mean_C: Tensor, std_C: Tensor) -> None:
        super().__init__()
        self.name = name
        self.channels, values = basis_CP.shape
        self.factor = math.isqrt(values // 3)
        # Between equal weights, with which the many fine channels outvote the few that hold shape and colour and
        # samples come out speckled, and each channel's true share of the pixels' error, which is its variance.
        weight_C = std_C.sqrt()
        self.register_buffer("basis_CP", basis_CP, persistent=False)
        self.register_buffer("mean_C11", mean_C[:, None, None], persistent=False)
        self.register_buffer("std_C11", std_C[:, None, None], persistent=False)
        self.register_buffer("loss_weight_C", weight_C / weight_C.mean(), persistent=False)

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        check_sides(self.name, self.factor, pixels_B3HW)
        # A matrix product over blocks: 3 ms for 64 pictures of 64 pixels on two CPU cores, the equal convolution 12 ms.
        blocks_BPhw = F.pixel_unshuffle(pixels_B3HW, self.factor).to(torch.float32) / 127.5 - 1
        coefficients_BChw = torch.einsum("cp,bphw->bchw", self.basis_CP, blocks_BPhw)
        return (coefficients_BChw - self.mean_C11) / self.std_C11

    def decode(self, latents_BChw: Tensor) -> Tensor:
        coefficients_BChw = latents_BChw.to(torch.float32) * self.std_C11 + self.mean_C11
        blocks_BPhw = torch.einsum("cp,bchw->bphw", self.basis_CP, coefficients_BChw)
        bytes_BPhw = ((blocks_BPhw + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return F.pixel_shuffle(bytes_BPhw, self.factor)


# Luma, red minus blue, green minus magenta: orthonormal, unlike the YCbCr that they stand in for, so that an error in a
# coefficient is the same error in the pixels.
_COLOUR_AXES = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]])
_BLOCK = 8

# Luma keeps the frequencies u + v < 4 and each colour difference those below 2: 10 + 3 + 3 of 192 values. On the drawn
# sample pictures (below) that is 24.1 dB, as much as the best 16 of all 192 reach; 6 + 5 + 5 give 23.3 dB, 14 + 1 + 1
# 23.0 dB, and 15 + 3 + 3 25.1 dB for a third more channels.
_DCT_ORDERS = (4, 2, 2)

# Of each kept coefficient, pixels in [-1, 1]: 64-pixel square crops of pipeline/pictures/decoder.py at random offsets of pictures
# 0 to 1999 of pipeline/drawings/illustrations.py with seed 1. Means of all but the blocks' averages are 0 by symmetry.
_DCT_STATISTICS = [
    # mean, std     in the order of `dct_basis`
    (5.39, 6.527),
    (0.00, 1.388),
    (0.00, 1.336),
    (0.00, 0.726),
    (0.00, 0.796),
    (0.00, 0.714),
    (0.00, 0.439),
    (0.00, 0.517),
    (0.00, 0.508),
    (0.00, 0.459),
    (0.27, 2.653),
    (0.00, 0.714),
    (0.00, 0.675),
    (0.00, 1.786),
    (0.00, 0.482),
    (0.00, 0.452),
]


def dct_basis(orders: tuple[int, int, int]) -> Tensor:
    """(C, 192), orthonormal: for each colour axis the 2-D cosines with u + v < order, lowest first."""
    n = torch.arange(_BLOCK, dtype=torch.float64)
    cosines = torch.cos(torch.pi / _BLOCK * (n + 0.5) * n[:, None]) * (2 / _BLOCK) ** 0.5
    cosines[0] /= 2**0.5
    axes = _COLOUR_AXES.double() / _COLOUR_AXES.double().norm(dim=1, keepdim=True)
    rows = [
        torch.einsum("c,y,x->cyx", axis, cosines[diagonal - u], cosines[u])
        for axis, order in zip(axes, orders, strict=True)
        for diagonal in range(min(order, 2 * _BLOCK - 1))
        for u in range(max(0, diagonal - _BLOCK + 1), min(diagonal, _BLOCK - 1) + 1)
    ]
    return torch.stack(rows).flatten(1).float()


def _dct() -> LinearCodec:
    mean_C, std_C = torch.tensor(_DCT_STATISTICS).T
    return LinearCodec("dct", dct_basis(_DCT_ORDERS), mean_C, std_C)


def _pixel() -> LinearCodec:
    """The pixels themselves, in [-1, 1]."""
    return LinearCodec("pixel", torch.eye(3), torch.zeros(3), torch.ones(3))


EMBEDDED_CODECS: dict[str, Callable[[], LinearCodec]] = {"dct": _dct, "pixel": _pixel}
