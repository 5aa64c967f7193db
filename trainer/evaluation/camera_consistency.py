"""How far the content of a picture moves when its camera does: measured by phase correlation, beside what it should be.

Kuglin and Hines 1975: the phases of two pictures' cross spectrum hold their displacement. Only the coarse layout is
listened to: the sampler's noise stays where it is when the camera moves, and fine detail stays with it.

Displacements are (down, right), in fractions of the frame's height and width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]  # (H, W, 3)
Displacement = tuple[float, float]

# Cycles per frame at which a frequency's vote has fallen to exp(-1/2).
_COARSE = 2.0


@dataclass(frozen=True)
class Move:
    """The same prompt and seed before and after a shift of the camera, in the units of `positions.camera`."""

    before: Picture
    after: Picture
    x_shift: float
    y_shift: float


@dataclass(frozen=True)
class Consistency:
    """Ratio: displacement along the expected one / expected displacement, of each move; 1 is a camera without fault."""

    moves: int
    ratio: float  # median
    within_40_percent: float  # share of the moves
    right_direction: float  # share of the moves; chance 0.5


def consistency(moves: Sequence[Move]) -> Consistency:
    """ValueError where there is no move."""
    if not moves:
        raise ValueError("camera consistency needs a picture with a moved camera at least")
    ratios = np.array([_ratio(move) for move in moves])
    return Consistency(
        len(moves),
        float(np.median(ratios)),
        float((np.abs(ratios - 1) <= 0.4).mean()),
        float((ratios > 0).mean()),
    )


def expected_displacement(x_shift: float, y_shift: float, width: int, height: int) -> Displacement:
    """Of the content of a picture of these sides, in pixels: a camera that goes right sees its content go left.

    Position p = P + shift is drawn where P was (`positions.camera`), so that what was at P is now at P - shift, whose
    unit is sqrt(width * height). The zoom changes the size of the content, not how far a shift moves it on the frame.
    """
    unit = math.sqrt(width * height)
    return -y_shift * unit / height, -x_shift * unit / width


def content_displacement(before: Picture, after: Picture) -> Displacement:
    """From the first picture to the second, each in [-0.5, 0.5]; (0, 0) where nothing can be told, as of plain ones.

    ValueError for pictures of two sizes.
    """
    if before.shape != after.shape:
        raise ValueError(f"pictures of {before.shape} and {after.shape} cannot be compared: give two of one size")
    spectrum_HWC = np.fft.fft2(after.astype(np.float64), axes=(0, 1))
    spectrum_HWC *= np.fft.fft2(before.astype(np.float64), axes=(0, 1)).conj()
    cross_HW = spectrum_HWC.sum(2)
    # Rounding leaves a spectrum of about 1e-16 of the largest where there is none.
    phases_HW = np.where(np.abs(cross_HW) > 1e-12 * np.abs(cross_HW).max(), np.exp(1j * np.angle(cross_HW)), 0)
    height, width = phases_HW.shape
    down_H1, right_1W = np.fft.fftfreq(height, 1 / height)[:, None], np.fft.fftfreq(width, 1 / width)
    weight_HW = np.exp(-(down_H1**2 + right_1W**2) / (2 * _COARSE**2))
    surface_HW = np.fft.ifft2(phases_HW * weight_HW).real
    row, column = np.unravel_index(int(surface_HW.argmax()), surface_HW.shape)
    down = row + _peak(surface_HW[:, column], int(row))
    right = column + _peak(surface_HW[row], int(column))
    return _signed(down / height), _signed(right / width)


def _peak(line: NDArray[np.float64], at: int) -> float:
    """Where between its neighbours the highest sample's peak lies, in samples; exact for a Gaussian, which the
    weights of a pure displacement give."""
    around = line[[at - 1, at, (at + 1) % len(line)]]
    if around.min() <= 0:
        return 0.0
    left, middle, right = np.log(around)
    curvature = left - 2 * middle + right
    return float(np.clip((left - right) / (2 * curvature), -0.5, 0.5)) if curvature < 0 else 0.0


def _signed(fraction: float) -> float:
    return float((fraction + 0.5) % 1 - 0.5)


def _ratio(move: Move) -> float:
    height, width = move.before.shape[:2]
    sides = np.array([height, width])
    expected = np.array(expected_displacement(move.x_shift, move.y_shift, width, height)) * sides
    if not expected.any():
        raise ValueError("a camera that did not move has no displacement to compare with: give a shift")
    measured = np.array(content_displacement(move.before, move.after)) * sides
    return float(measured @ expected / (expected @ expected))
