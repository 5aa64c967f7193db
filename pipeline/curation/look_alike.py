"""Whether two pictures look the same, by their thumbnails: saved again, resized, or with trimmed edges.

The limits were chosen on 2,056 emoji, many of which differ only in a mouth, a colour or a pattern, and on copies made
of them and of illustrations: tests/bench/near_copies.py has both rates.

Axes: P pairs, H W rows and columns, 2 = (Cb, Cr), 4 = parameters (x shift, x scale, y shift, y scale).
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.pictures.thumbnails import planes

Floats = NDArray[np.float32]

# Largest difference of any pixel between copies that were saved again or resized, in levels of 255.
_BRIGHTNESS: Final = 15
_COLOUR: Final = 18
# The same for copies with trimmed edges, after one has been moved and stretched onto the other and both were smoothed,
# because interpolation blurs. So much is allowed only if that explains most of the difference.
_TRIMMED_BRIGHTNESS: Final = 25
_TRIMMED_COLOUR: Final = 24
_TRIMMED_MEAN: Final = 5
_UNEXPLAINED: Final = 0.75  # share of the mean difference that may be left
_LEAST_MOVE: Final = 0.006  # in half sides; smaller moves do not come from trimming
_MOST_MOVE: Final = 0.05

_STEPS: Final = 4  # of Gauss-Newton
_BOUND: Final = 0.06
_DAMPING: Final = 100.0
_AT_ONCE: Final = 4096


class _Fit(NamedTuple):
    """How well a moved picture fits another, for each pair (P,)."""

    before: Floats  # mean difference in brightness
    after: Floats
    brightness: Floats  # largest differences
    colour: Floats
    move: Floats  # largest parameter


def look_alike(left_PB: NDArray[np.uint8], right_PB: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """For each pair of thumbnails (P, BYTES) whether they show the same picture: (P,)."""
    alike = np.zeros(len(left_PB), bool)
    for start in range(0, len(left_PB), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        alike[part] = _look_alike(left_PB[part], right_PB[part])
    return alike


def _look_alike(left_PB: NDArray[np.uint8], right_PB: NDArray[np.uint8]) -> NDArray[np.bool_]:
    (bright_PHW, colour_PHW2), (other_PHW, other_colour_PHW2) = planes(left_PB), planes(right_PB)
    alike: NDArray[np.bool_] = np.abs(bright_PHW - other_PHW).max((1, 2)) <= _BRIGHTNESS
    alike &= np.abs(colour_PHW2 - other_colour_PHW2).max((1, 2, 3)) <= _COLOUR
    rest = np.flatnonzero(~alike)
    if not len(rest):
        return alike
    left = _smooth(bright_PHW[rest]), colour_PHW2[rest]
    right = _smooth(other_PHW[rest]), other_colour_PHW2[rest]
    alike[rest] = _is_trimmed(*left, *right) | _is_trimmed(*right, *left)
    return alike


def _is_trimmed(
    bright_PHW: Floats, colour_PHW2: Floats, other_PHW: Floats, other_colour_PHW2: Floats
) -> NDArray[np.bool_]:
    """Whether each picture, moved and stretched, shows what the other one shows."""
    fit = _fit(bright_PHW, other_PHW, colour_PHW2, other_colour_PHW2)
    found: NDArray[np.bool_] = (
        (fit.move >= _LEAST_MOVE)
        & (fit.move <= _MOST_MOVE)
        & (fit.after <= _UNEXPLAINED * fit.before)
        & (fit.after <= _TRIMMED_MEAN)
        & (fit.brightness <= _TRIMMED_BRIGHTNESS)
        & (fit.colour <= _TRIMMED_COLOUR)
    )
    return found


def _fit(bright_PHW: Floats, other_PHW: Floats, colour_PHW2: Floats, other_colour_PHW2: Floats) -> _Fit:
    """Moves and stretches each picture onto the other by least squares (Lucas and Kanade 1981)."""
    side, pairs = bright_PHW.shape[1], len(bright_PHW)
    place = _places(side)
    move_P4 = np.zeros((pairs, 4), np.float32)
    for _ in range(_STEPS):
        moved_PHW, inside_PHW = _moved(bright_PHW, move_P4)
        down_PHW, across_PHW = np.gradient(moved_PHW, 2 / side, axis=(1, 2))
        slopes = (across_PHW, across_PHW * place, down_PHW, down_PHW * place[:, None])
        slope_PN4 = (np.stack(slopes, axis=-1) * inside_PHW[..., None]).reshape(pairs, -1, 4)
        error_PN = ((other_PHW - moved_PHW) * inside_PHW).reshape(pairs, -1)
        normal_P44 = np.einsum("pni,pnj->pij", slope_PN4, slope_PN4) + _DAMPING * np.eye(4, dtype=np.float32)
        step_P41 = np.linalg.solve(normal_P44, np.einsum("pni,pn->pi", slope_PN4, error_PN)[..., None])
        move_P4 = (move_P4 + step_P41[..., 0]).clip(-_BOUND, _BOUND)
    moved_PHW, inside_PHW = _moved(bright_PHW, move_P4)
    left_over_PHW = np.abs(other_PHW - moved_PHW) * inside_PHW
    moved_PHW2, inside_colour_PHW = _moved(colour_PHW2, move_P4)
    return _Fit(
        before=np.abs(other_PHW - bright_PHW).mean((1, 2)),
        after=left_over_PHW.sum((1, 2)) / np.maximum(1, inside_PHW.sum((1, 2))),
        brightness=left_over_PHW.max((1, 2)),
        colour=(np.abs(other_colour_PHW2 - moved_PHW2) * inside_colour_PHW[..., None]).max((1, 2, 3)),
        move=np.abs(move_P4).max(1),
    )


def _places(side: int) -> Floats:
    """Centres of pixels along a side, from -1 to 1."""
    return ((np.arange(side, dtype=np.float32) + 0.5) * 2 / side - 1).astype(np.float32)


def _moved(values_PHW: Floats, move_P4: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Pictures (P, H, W) or (P, H, W, 2) read at moved and stretched places, and where these lie inside them."""
    side = values_PHW.shape[1]
    place, pair = _places(side), np.arange(len(values_PHW))[:, None, None]
    x_PW = place * (1 + move_P4[:, 1:2]) + move_P4[:, 0:1]
    y_PH = place * (1 + move_P4[:, 3:4]) + move_P4[:, 2:3]
    (left_PW, x_PW, in_PW), (top_PH, y_PH, in_PH) = _between(x_PW, side), _between(y_PH, side)
    top, left = top_PH[:, :, None], left_PW[:, None, :]
    x_PHW, y_PHW = x_PW[:, None, :], y_PH[:, :, None]
    if values_PHW.ndim == 4:
        x_PHW, y_PHW = x_PHW[..., None], y_PHW[..., None]
    above = values_PHW[pair, top, left] * (1 - x_PHW) + values_PHW[pair, top, left + 1] * x_PHW
    below = values_PHW[pair, top + 1, left] * (1 - x_PHW) + values_PHW[pair, top + 1, left + 1] * x_PHW
    return above * (1 - y_PHW) + below * y_PHW, in_PH[:, :, None] & in_PW[:, None, :]


def _between(place: Floats, side: int) -> tuple[NDArray[np.int64], Floats, NDArray[np.bool_]]:
    """The pixel before each place, the distance from it, and whether the place is inside the picture."""
    at = (place + 1) * side / 2 - 0.5
    inside = (at >= -0.5) & (at <= side - 0.5)
    at = at.clip(0, side - 1)
    before = np.floor(at).astype(np.int64).clip(0, side - 2)
    return before, (at - before).astype(np.float32), inside


def _smooth(values_PHW: Floats) -> Floats:
    """Weights 1, 2, 1 along both sides, which are continued by their last pixel."""
    for axis in (1, 2):
        padding = [(0, 0), (1, 1), (0, 0)] if axis == 1 else [(0, 0), (0, 0), (1, 1)]
        padded = np.pad(values_PHW, padding, mode="edge")
        first, middle, last = (np.take(padded, range(i, i + values_PHW.shape[axis]), axis) for i in range(3))
        values_PHW = ((first + 2 * middle + last) / 4).astype(np.float32)
    return values_PHW
