"""How far the content of a picture moves when its camera moves, measured by phase correlation.

Kuglin and Hines 1975: the phases of the cross spectrum of two pictures hold their displacement. Only low frequencies
are used, because the sampler's noise, and fine detail with it, stays in place when the camera moves.

Displacements are (down, right), in fractions of the frame's height and width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]  # (H, W, 3)
Displacement = tuple[float, float]

_CUTOFF = 2.0  # cycles per frame at which the weight of a frequency has fallen to exp(-1/2)


@dataclass(frozen=True)
class CameraMove:
    """Pictures of one prompt and seed before and after a shift of the camera, in the units of `positions.camera`."""

    before: Picture
    after: Picture
    x_shift: float = 0.0
    y_shift: float = 0.0


@dataclass(frozen=True)
class CameraConsistency:
    """Statistics of displacement along the expected direction / expected displacement; 1 is perfect."""

    moves: int
    ratio: float  # median
    within_40_percent: float  # share of the moves
    right_direction: float  # share of the moves; chance 0.5


def camera_consistency(moves: Sequence[CameraMove]) -> CameraConsistency:
    """Raises ValueError if there are no moves, or if one has no shift."""
    if not moves:
        raise ValueError("camera consistency needs at least one picture with a moved camera")
    ratios = np.array([_ratio(move) for move in moves])
    return CameraConsistency(
        len(moves), float(np.median(ratios)), float((np.abs(ratios - 1) <= 0.4).mean()), float((ratios > 0).mean())
    )


def expected_displacement(x_shift: float, y_shift: float, width: int, height: int) -> Displacement:
    """Displacement of the content of a picture of these sides in pixels. If the camera moves right, content moves left.

    A position p is drawn where p - shift was drawn before (`positions.camera`), in units of sqrt(width * height). Zoom
    changes the size of the content, but not how far a shift moves it.
    """
    unit = math.sqrt(width * height)
    return -y_shift * unit / height, -x_shift * unit / width


def content_displacement(before: Picture, after: Picture) -> Displacement:
    """Displacement from the first picture to the second, each value in [-0.5, 0.5]; (0, 0) for uniform pictures.

    Raises ValueError if the pictures differ in size.
    """
    if before.shape != after.shape:
        raise ValueError(f"cannot compare pictures of {before.shape} and {after.shape}: they must have one size")
    spectrum_HWC = np.fft.fft2(after.astype(np.float64), axes=(0, 1))
    spectrum_HWC *= np.fft.fft2(before.astype(np.float64), axes=(0, 1)).conj()
    cross_HW = spectrum_HWC.sum(2)
    # Rounding leaves about 1e-16 of the maximum where there is no signal.
    phases_HW = np.where(np.abs(cross_HW) > 1e-12 * np.abs(cross_HW).max(), np.exp(1j * np.angle(cross_HW)), 0)
    height, width = phases_HW.shape
    down_H1, right_1W = np.fft.fftfreq(height, 1 / height)[:, None], np.fft.fftfreq(width, 1 / width)
    weight_HW = np.exp(-(down_H1**2 + right_1W**2) / (2 * _CUTOFF**2))
    surface_HW = np.fft.ifft2(phases_HW * weight_HW).real
    row, column = np.unravel_index(int(surface_HW.argmax()), surface_HW.shape)
    down = row + _subpixel_peak(surface_HW[:, column], int(row))
    right = column + _subpixel_peak(surface_HW[row], int(column))
    return _signed(down / height), _signed(right / width)


def _subpixel_peak(line: NDArray[np.float64], at: int) -> float:
    """Offset of the peak from the highest sample, in samples. Exact for a Gaussian, which a pure displacement gives."""
    around = line[[at - 1, at, (at + 1) % len(line)]]
    if around.min() <= 0:
        return 0.0
    left, middle, right = np.log(around)
    curvature = left - 2 * middle + right
    return float(np.clip((left - right) / (2 * curvature), -0.5, 0.5)) if curvature < 0 else 0.0


def _signed(fraction: float) -> float:
    return float((fraction + 0.5) % 1 - 0.5)


def _ratio(move: CameraMove) -> float:
    height, width = move.before.shape[:2]
    sides = np.array([height, width])
    expected = np.array(expected_displacement(move.x_shift, move.y_shift, width, height)) * sides
    if not expected.any():
        raise ValueError("a camera that did not move has no expected displacement: give a shift")
    measured = np.array(content_displacement(move.before, move.after)) * sides
    return float(measured @ expected / (expected @ expected))
