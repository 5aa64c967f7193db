"""A 64-bit hash that survives re-encoding and resizing, for finding near duplicates."""

from typing import Final

import numpy as np

from pipeline.pictures.thumbnails import SIDE

FLAT: Final = 0  # the hash of every picture without structure: two of them need not look alike

_FREQUENCIES = np.arange(9)
# Rows of the orthonormal DCT-II matrix.
_COSINES = np.sqrt(np.where(_FREQUENCIES, 2, 1) / SIDE)[:, None] * np.cos(
    np.pi * _FREQUENCIES[:, None] * (2 * np.arange(SIDE) + 1) / (2 * SIDE)
)
# The 64 lowest frequencies above the mean, in order of frequency.
_LOWEST = np.unravel_index(
    np.argsort((_FREQUENCIES[:, None] ** 2 + _FREQUENCIES**2).ravel(), kind="stable")[1:65], (9, 9)
)
_ONE_LEVEL = SIDE / 2  # coefficient of a wave with an amplitude of one grey level
_LEAST_STRUCTURE = 16  # of the 64 frequencies


def perceptual_hash(thumbnail: bytes) -> int:
    """An unsigned 64-bit integer: the signs of the 64 lowest DCT frequencies of a thumbnail's brightness, bit 0 for the
    lowest. FLAT if too few frequencies stand out to tell the picture from others.

    A frequency weaker than one grey level counts as not positive, so that noise does not decide its bit: half of all
    frequencies of a symmetrical drawing are zero.
    """
    grey_HW = np.frombuffer(thumbnail, np.uint8, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.float64)
    coefficients = (_COSINES @ grey_HW @ _COSINES.T)[_LOWEST]
    if np.count_nonzero(np.abs(coefficients) > _ONE_LEVEL) < _LEAST_STRUCTURE:
        return FLAT
    return sum(1 << bit for bit in np.flatnonzero(coefficients > _ONE_LEVEL).tolist())
