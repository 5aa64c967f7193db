"""Shapes and patterns as polygons in a box from -1 to 1 along its longer side."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]  # (n, 2): corners of a filled polygon, x right and y down
Rgb = tuple[int, int, int]
Part = tuple[str, Points]  # tone ("light" or "dark" of the object's colour, or a key of FIXED_TONES) and polygon

FIXED_TONES: dict[str, Rgb] = {
    "white": (255, 255, 255),
    "black": (38, 34, 40),
    "cream": (246, 238, 220),
    "wood": (122, 102, 86),
    "stem": (104, 138, 100),
}


@dataclass(frozen=True)
class Shape:
    """Polygons in the order of drawing. The body has the object's colour, the other parts their own tones."""

    behind: tuple[Part, ...]
    body: tuple[Points, ...]
    front: tuple[Part, ...]
    outlined: tuple[Points, ...]  # polygons with an outline: all except `front`
    corners: Points  # (n, 2): sharp corners of the outlines


def _polygon(*corners: tuple[float, float]) -> Points:
    return np.array(corners, dtype=np.float64)


def _oval(
    x: float, y: float, rx: float, ry: float | None = None, tilt: float = 0.0, start: float = 0.0, end: float = 360.0
) -> Points:
    """An ellipse, or its arc between two angles in degrees (0 right, 90 down)."""
    angle = np.radians(np.linspace(start, end, 40))
    points = np.stack([rx * np.cos(angle), (rx if ry is None else ry) * np.sin(angle)], axis=1)
    return points @ rotation(tilt) + (x, y)


def rotation(degrees: float) -> Points:
    """Matrix that rotates row vectors clockwise, with y pointing down."""
    a = np.radians(degrees)
    return np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])


def _line(x0: float, y0: float, x1: float, y1: float, width: float) -> Points:
    along = np.array([x1 - x0, y1 - y0])
    side = np.array([-along[1], along[0]]) * (width / 2 / np.hypot(*along))
    start, end = np.array([x0, y0]), np.array([x1, y1])
    return np.stack([start + side, end + side, end - side, start - side])


def _arc(x: float, y: float, radius: float, start: float, end: float, width: float) -> Points:
    outer = _oval(x, y, radius + width / 2, start=start, end=end)
    return np.concatenate([outer, _oval(x, y, radius - width / 2, start=end, end=start)])


def _eyes(x: float, y: float, apart: float, eye: float) -> Iterator[Part]:
    """Two eyes with a glint, at a distance of `apart` from the middle and with radius `eye`."""
    for side in (-1, 1):
        yield "black", _oval(x + side * apart, y, eye, 1.25 * eye)
        yield "white", _oval(x + side * apart - 0.3 * eye, y - 0.3 * eye, 0.4 * eye, 0.5 * eye)


def _face(x: float, y: float, apart: float, eye: float) -> Iterator[Part]:
    yield from _eyes(x, y, apart, eye)
    yield "black", _arc(x, y + 0.6 * eye, 0.55 * apart, 20, 160, 0.5 * eye)


def _star() -> Points:
    angle = np.radians(np.arange(10) * 36 - 90)
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.52)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _heart() -> Points:
    t = np.linspace(0, 2 * np.pi, 60)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 16, -y / 16], axis=1)


def _crescent() -> Points:
    outer = _oval(0, 0, 1, start=-62, end=-298)
    # The inner edge passes through both ends of the outer edge.
    (x, y0), (_, y1) = outer[0], outer[-1]
    reach = 0.50
    centre, radius = x + reach, float(np.hypot(reach, y0))
    open_angle = float(np.degrees(np.arctan2(abs(y0), reach)))
    assert y0 < 0 < y1
    return np.concatenate([outer, _oval(centre, 0, radius, start=180 - open_angle, end=180 + open_angle)])


def _dome(edge: float, scallops: int) -> Points:
    """Half an ellipse above `scallops` arches of height `edge`. Arches of negative height bulge downwards."""
    top = _oval(0, 0, 1, 0.95, start=180, end=360)
    width = 2 / scallops
    arches = [_oval(1 - width * (i + 0.5), 0, width / 2, -edge, start=0, end=180) for i in range(scallops)]
    return np.concatenate([top, *arches])


def _shape(body: Iterable[Points], behind: Iterable[Part] = (), front: Iterable[Part] = ()) -> Shape:
    """Centre the shape and scale its longer side to 2."""
    body, behind, front = tuple(body), tuple(behind), tuple(front)
    corners = np.concatenate([*body, *(points for _, points in behind + front)])
    low, high = corners.min(axis=0), corners.max(axis=0)
    centre, scale = (low + high) / 2, 2 / float((high - low).max())

    def fit(parts: Iterable[Part]) -> tuple[Part, ...]:
        return tuple((tone, (points - centre) * scale) for tone, points in parts)

    behind, front = fit(behind), fit(front)
    body = tuple((points - centre) * scale for points in body)
    outlined = (*(points for _, points in behind), *body)
    return Shape(behind, body, front, outlined, np.concatenate([_corners(points) for points in outlined]))


def _corners(polygon: Points) -> Points:
    """Corners at which the outline turns by more than 20 degrees."""
    before, after = polygon - np.roll(polygon, 1, axis=0), np.roll(polygon, -1, axis=0) - polygon
    angle = np.angle(np.exp(1j * (np.arctan2(after[:, 1], after[:, 0]) - np.arctan2(before[:, 1], before[:, 0]))))
    corners: Points = polygon[np.abs(angle) > np.radians(20)]
    return corners


SHAPES: dict[str, Shape] = {
    "ball": _shape([_oval(0, 0, 1)], front=[("light", _oval(-0.38, -0.45, 0.26, 0.15, -40))]),
    "star": _shape([_star()], front=_face(0, -0.04, 0.22, 0.10)),
    "heart": _shape([_heart()], front=[("light", _oval(-0.52, -0.42, 0.20, 0.12, -40))]),
    "fish": _shape(
        [
            _oval(-0.2, 0, 0.8, 0.56),
            _polygon((0.40, 0), (1.05, -0.55), (0.90, 0), (1.05, 0.55)),
            _polygon((-0.45, -0.45), (0.2, -0.85), (0.25, -0.35)),
        ],
        front=[
            ("dark", _arc(-0.85, 0, 0.45, -40, 40, 0.06)),
            ("dark", _polygon((-0.1, 0.08), (0.22, -0.04), (0.18, 0.28))),
            ("white", _oval(-0.68, -0.1, 0.13)),
            ("black", _oval(-0.70, -0.1, 0.08)),
        ],
    ),
    "house": _shape(
        [
            _polygon((-0.72, -0.1), (0.72, -0.1), (0.72, 0.9), (-0.72, 0.9)),
            _polygon((0.32, -0.9), (0.56, -0.9), (0.56, -0.3), (0.32, -0.3)),
        ],
        front=[
            ("dark", _polygon((0, -1.0), (1.0, -0.05), (-1.0, -0.05))),
            ("white", _polygon((-0.5, 0.15), (-0.1, 0.15), (-0.1, 0.5), (-0.5, 0.5))),
            ("dark", _line(-0.3, 0.15, -0.3, 0.5, 0.05)),
            ("dark", _line(-0.5, 0.325, -0.1, 0.325, 0.05)),
            ("wood", _polygon((0.15, 0.3), (0.5, 0.3), (0.5, 0.9), (0.15, 0.9))),
            ("white", _oval(0.42, 0.62, 0.04)),
        ],
    ),
    "tree": _shape(
        [_oval(0, -0.5, 0.5), _oval(-0.42, -0.1, 0.45), _oval(0.42, -0.1, 0.45), _oval(0, 0.02, 0.48)],
        behind=[("wood", _polygon((-0.13, 0.2), (0.13, 0.2), (0.22, 1.0), (-0.22, 1.0)))],
        front=[("dark", _arc(-0.1, -0.45, 0.28, 100, 190, 0.06)), ("dark", _arc(0.38, -0.1, 0.26, 20, 110, 0.06))],
    ),
    "flower": _shape(
        [_oval(0, -0.44, 0.24, 0.36) @ rotation(degrees) + (0, -0.35) for degrees in range(0, 360, 60)],
        behind=[
            ("stem", _line(0, -0.2, 0, 1.1, 0.10)),
            ("stem", _oval(0.26, 0.72, 0.28, 0.11, -30)),
            ("stem", _oval(-0.26, 0.86, 0.28, 0.11, 30)),
        ],
        front=[("dark", _oval(0, -0.35, 0.25)), ("cream", _oval(0, -0.35, 0.20))],
    ),
    "mushroom": _shape(
        [_dome(-0.16, 1)],
        behind=[("cream", _polygon((-0.3, 0), (0.3, 0), (0.38, 0.85), (0.2, 0.95), (-0.2, 0.95), (-0.38, 0.85)))],
        front=[
            ("white", _oval(-0.5, -0.3, 0.17, 0.15)),
            ("white", _oval(0.08, -0.58, 0.19, 0.16)),
            ("white", _oval(0.55, -0.22, 0.14, 0.14)),
            *_face(0, 0.42, 0.15, 0.07),
        ],
    ),
    "umbrella": _shape(
        [_dome(0.14, 4)],
        behind=[
            ("black", _line(0, -1.05, 0, 0.85, 0.07)),
            ("black", _arc(0.15, 0.85, 0.15, 0, 180, 0.07)),
        ],
        front=[("dark", _line(0, -0.94, x, -0.10, 0.04)) for x in (-0.5, 0.0, 0.5)],
    ),
    "moon": _shape(
        [_crescent()],
        front=[("black", _arc(-0.60, -0.18, 0.11, 20, 160, 0.06)), ("black", _arc(-0.38, 0.30, 0.12, 40, 130, 0.06))],
    ),
    "cat": _shape(
        [
            _oval(0, 0.15, 1.0, 0.8),
            _polygon((-0.93, 0.0), (-0.85, -0.95), (-0.2, -0.55)),
            _polygon((0.93, 0.0), (0.85, -0.95), (0.2, -0.55)),
        ],
        front=[
            ("light", _polygon((-0.8, -0.3), (-0.76, -0.75), (-0.42, -0.5))),
            ("light", _polygon((0.8, -0.3), (0.76, -0.75), (0.42, -0.5))),
            *_eyes(0, 0.08, 0.4, 0.13),
            ("black", _polygon((-0.09, 0.33), (0.09, 0.33), (0, 0.43))),
            *(("black", _arc(x, 0.43, 0.11, 10, 170, 0.05)) for x in (-0.11, 0.11)),
            *(("black", _line(side * 0.6, 0.36, side * 1.08, 0.30, 0.035)) for side in (-1, 1)),
            *(("black", _line(side * 0.6, 0.48, side * 1.08, 0.54, 0.035)) for side in (-1, 1)),
        ],
    ),
    "butterfly": _shape(
        [
            *(_oval(side * 0.52, -0.35, 0.56, 0.42, -35 * side) for side in (-1, 1)),
            *(_oval(side * 0.42, 0.42, 0.42, 0.34, 40 * side) for side in (-1, 1)),
        ],
        front=[
            *(("light", _oval(side * 0.62, -0.42, 0.20, 0.14, -35 * side)) for side in (-1, 1)),
            *(("light", _oval(side * 0.46, 0.45, 0.13, 0.10, 40 * side)) for side in (-1, 1)),
            ("black", _oval(0, 0.02, 0.10, 0.55)),
            *(("black", _line(0, -0.45, side * 0.22, -0.9, 0.05)) for side in (-1, 1)),
            *(("black", _oval(side * 0.22, -0.9, 0.06)) for side in (-1, 1)),
        ],
    ),
}


def _squares(side: float) -> list[Points]:
    steps = np.arange(-1.6, 1.6, side)
    corners = _polygon((0, 0), (side, 0), (side, side), (0, side))
    return [corners + np.array((x, y)) for i, x in enumerate(steps) for j, y in enumerate(steps) if (i + j) % 2]


def _stripes(width: float, every: float) -> list[Points]:
    return [_line(-1.6, y, 1.6, y + 0.6, width) for y in np.arange(-2.1, 1.6, every).tolist()]


def _dots(radius: float, across: float, down: float) -> list[Points]:
    rows = enumerate(np.arange(-1.5, 1.6, down).tolist())
    columns = np.arange(-1.5, 1.6, across).tolist()
    return [_oval(x + across / 2 * (row % 2), y, radius) for row, y in rows for x in columns]


# Drawn over a body and clipped to it.
PATTERNS: dict[str, list[Points]] = {
    "plain": [],
    "striped": _stripes(0.24, every=0.55),
    "polka_dot": _dots(0.16, across=0.6, down=0.52),
    "checkered": _squares(0.38),
}
