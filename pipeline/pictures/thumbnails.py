"""Thumbnails of 32 x 32 pixels, to tell whether two pictures are copies of one another.

A perceptual hash holds the coarse structure of a picture's brightness. Hearts of every colour have the same, and so do
faces that differ in the mouth. A thumbnail also holds colours and details of a thirtieth of the picture.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE: Final = 32
_HALF: Final = SIDE // 2
BYTES: Final = SIDE * SIDE + 2 * _HALF * _HALF


def small_copy(image: Image.Image) -> Image.Image:
    """The picture at 32 x 32 pixels, whatever its shape; what `thumbnail` and `perceptual_hash` are made of."""
    return image.resize((SIDE, SIDE), Image.Resampling.HAMMING, reducing_gap=3.0)


def thumbnail(small: Image.Image) -> bytes:
    """BYTES bytes of a `small_copy`: its brightness (Y), then Cb and Cr at half the resolution; all row by row."""
    values_HW3 = np.asarray(small.convert("RGB").convert("YCbCr"))
    colour_HW2 = values_HW3[:, :, 1:].reshape(_HALF, 2, _HALF, 2, 2).mean((1, 3)).round().astype(np.uint8)
    return bytes(values_HW3[:, :, 0].tobytes() + colour_HW2.tobytes())


def planes(thumbnails_NB: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Brightness (N, 32, 32) and colour (N, 16, 16, 2) of thumbnails (N, BYTES)."""
    bright_NB, colour_NB = np.split(thumbnails_NB.astype(np.float32), [SIDE * SIDE], axis=1)
    return bright_NB.reshape(-1, SIDE, SIDE), colour_NB.reshape(-1, _HALF, _HALF, 2)
