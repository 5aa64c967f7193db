"""Thumbnails of 32 x 32 pixels, to tell whether two pictures are copies of one another.

A perceptual hash holds the coarse structure of a picture's brightness. Hearts of every colour have the same, and so do
faces that differ in the mouth. A thumbnail also holds colours and details of a thirtieth of the picture.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE: Final = 32
_HALF: Final = SIDE // 2
BYTES: Final = SIDE * SIDE + 2 * _HALF * _HALF
_SAMPLED: Final = 16 * SIDE  # at least so many rows and columns of a larger picture are read
_COARSE: Final = 4 * SIDE  # cells along a side, at least, whose sums are weighted
_BITS: Final = 20
_UNIT: Final = 1000
# Factors of red, green and blue, in thousandths, and the offset of each channel (JFIF).
Channels = Sequence[tuple[int, int, int, int]]
_YCBCR: Final = ((299, 587, 114, 0), (-169, -331, 500, 128), (500, -419, -81, 128))


def thumbnail(image: Image.Image) -> bytes:
    """BYTES bytes of an RGB or grey picture of any shape: its brightness (Y) at 32 x 32 pixels, then Cb and Cr at half
    the resolution; all row by row.

    Computed in whole numbers and without Pillow, whose builds round differently: all machines of a cluster, and a later
    ingest, must find the same bytes.
    """
    pixels_HWC = np.asarray(image)
    if pixels_HWC.ndim == 2:
        pixels_HWC = np.repeat(pixels_HWC[:, :, None], 3, axis=2)
    # Of a large picture some rows and columns are enough: means of thousands of pixels remain.
    pixels_HWC = pixels_HWC[:: max(1, image.height // _SAMPLED), :: max(1, image.width // _SAMPLED)]
    height, width = pixels_HWC.shape[:2]
    down, across = max(1, height // _COARSE), max(1, width // _COARSE)
    sums_HWC = np.add.reduceat(pixels_HWC, np.arange(0, height, down), axis=0, dtype=np.int64)
    sums_HWC = np.add.reduceat(sums_HWC, np.arange(0, width, across), axis=1)
    bright = _shrunk(sums_HWC, (height, width), (down, across), SIDE, _YCBCR[:1])
    colour = _shrunk(sums_HWC, (height, width), (down, across), _HALF, _YCBCR[1:])
    return bright.tobytes() + colour.tobytes()


def _shrunk(
    sums_HWC: NDArray[np.int64], size: tuple[int, int], cell: tuple[int, int], side: int, channels: Channels
) -> NDArray[np.uint8]:
    """Channels (side, side, channels) of weighted means. `sums` are those of the cells of a picture, size and cell are
    (height, width) in pixels."""
    weights = [_weights(length, pixels, side) for length, pixels in zip(size, cell, strict=True)]
    rows_SWC = np.tensordot(weights[0], sums_HWC, axes=1)
    means_SSC = np.tensordot(rows_SWC, weights[1], axes=([1], [1])).transpose(0, 2, 1) >> _BITS
    mixed = [(means_SSC * factors).sum(-1) // (_UNIT << _BITS) + offset for *factors, offset in channels]
    found: NDArray[np.uint8] = np.stack(mixed, axis=-1).clip(0, 255).astype(np.uint8)
    return found


@lru_cache(maxsize=1024)
def _weights(length: int, cell: int, side: int) -> NDArray[np.int64]:
    """(side, cells): the weights of sums over cells of `cell` pixels, of which the last may be shorter, in each of
    `side` parts of `length` pixels. Over the pixels of a part they add up to about 2^_BITS.

    A triangle twice as wide as the part: means of areas alone would show the ringing of other programs' resizing.
    """
    edges, part = np.arange(0, length + cell, cell).clip(max=length), length / side
    middles, centres = (edges[1:] + edges[:-1]) / 2, (np.arange(side) + 0.5) * part
    weight_SC = (1 - np.abs(middles - centres[:, None]) / part).clip(min=0)
    total_S1 = (weight_SC * (edges[1:] - edges[:-1])).sum(1, keepdims=True)
    whole: NDArray[np.int64] = (weight_SC / total_S1 * (1 << _BITS)).round().astype(np.int64)
    return whole


def planes(thumbnails_NB: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Brightness (N, 32, 32) and colour (N, 16, 16, 2) of thumbnails (N, BYTES)."""
    bright_NB, colour_NB = np.split(thumbnails_NB.astype(np.float32), [SIDE * SIDE], axis=1)
    return bright_NB.reshape(-1, SIDE, SIDE), colour_NB.reshape(-1, _HALF, _HALF, 2)
