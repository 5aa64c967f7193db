"""Codecs: pixels <-> latents. A codec is frozen; the channels of its latents have about unit variance.

Axes: B batch, H W pixel rows and columns, h w latent rows and columns (H / factor, W / factor), C latent channels,
3 = red, green, blue, P = 3 * factor^2 values of a pixel block, in the order of `pixel_unshuffle`.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Codec(Protocol):
    """The interface of an image codec for training and sampling."""

    name: str
    channels: int
    factor: int  # pixels per latent, along one side
    loss_weight_C: Tensor  # weight of each channel's squared error in training; mean 1

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 latents (B, C, h, w). Raises ValueError unless factor divides H and W."""

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> uint8 (B, 3, H, W)."""


def check_sides(name: str, factor: int, pixels_B3HW: Tensor) -> None:
    """Raises ValueError unless the sides of the pictures are multiples of the codec's factor."""
    height, width = pixels_B3HW.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"pictures of {width} x {height} pixels: the codec {name} needs multiples of {factor}")


class LinearCodec(nn.Module):
    """Multiplies pixel blocks by a matrix with orthonormal rows and normalises the result with fixed statistics.

    Decoding multiplies by the transpose. Apart from rounding to uint8, decode(encode(x)) is the orthogonal projection
    of x onto the rows, the nearest picture that the channels can represent.
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
        # A compromise between equal weights, under which the many fine channels dominate the few with shape and colour
        # and samples are speckled, and the variance, which is a channel's true share of the pixels' error.
        weight_C = std_C.sqrt()
        self.register_buffer("basis_CP", basis_CP, persistent=False)
        self.register_buffer("mean_C11", mean_C[:, None, None], persistent=False)
        self.register_buffer("std_C11", std_C[:, None, None], persistent=False)
        self.register_buffer("loss_weight_C", weight_C / weight_C.mean(), persistent=False)

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        check_sides(self.name, self.factor, pixels_B3HW)
        # For 64 pictures of 64 pixels on two CPU cores this takes 3 ms, and the equivalent convolution 12 ms.
        blocks_BPhw = F.pixel_unshuffle(pixels_B3HW, self.factor).to(torch.float32) / 127.5 - 1
        coefficients_BChw = torch.einsum("cp,bphw->bchw", self.basis_CP, blocks_BPhw)
        return (coefficients_BChw - self.mean_C11) / self.std_C11

    def decode(self, latents_BChw: Tensor) -> Tensor:
        coefficients_BChw = latents_BChw.to(torch.float32) * self.std_C11 + self.mean_C11
        blocks_BPhw = torch.einsum("cp,bchw->bphw", self.basis_CP, coefficients_BChw)
        bytes_BPhw = ((blocks_BPhw + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return F.pixel_shuffle(bytes_BPhw, self.factor)


# Luma, red - blue, green - magenta. Once normalised they are orthonormal, unlike YCbCr, so an error of a coefficient is
# an equal error of the pixels.
_COLOUR_AXES = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 2.0, -1.0]])
_BLOCK = 8

# Luma keeps frequencies u + v < 4, each colour difference those below 2: 10 + 3 + 3 of 192 values. On the sample
# pictures (below) that gives 24.1 dB, as much as the best 16 of all 192; 6 + 5 + 5 give 23.3 dB, 14 + 1 + 1 23.0 dB,
# and 15 + 3 + 3 25.1 dB with a third more channels.
_DCT_ORDERS = (4, 2, 2)

# Mean and standard deviation of each kept coefficient, in the order of `dct_basis`, for pixels in [-1, 1]. Measured on
# 64-pixel crops at random offsets of pictures 0 to 1999 of pipeline/drawings/illustrations.py, seed 1. By symmetry only
# block averages have a mean other than 0.
_DCT_MEAN = (5.39, *(0.0,) * 9, 0.27, *(0.0,) * 5)
_DCT_STD = (
    *(6.527, 1.388, 1.336, 0.726, 0.796, 0.714, 0.439, 0.517, 0.508, 0.459),
    *(2.653, 0.714, 0.675),
    *(1.786, 0.482, 0.452),
)


def dct_basis(orders: tuple[int, int, int]) -> Tensor:
    """Orthonormal rows (C, 192): for each colour axis the 2-D cosines with u + v < order, lowest first."""
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


EMBEDDED_CODECS: dict[str, Callable[[], LinearCodec]] = {
    "dct": lambda: LinearCodec("dct", dct_basis(_DCT_ORDERS), torch.tensor(_DCT_MEAN), torch.tensor(_DCT_STD)),
    "pixel": lambda: LinearCodec("pixel", torch.eye(3), torch.zeros(3), torch.ones(3)),  # pixels in [-1, 1]
}
