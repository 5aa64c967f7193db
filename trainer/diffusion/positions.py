"""Position maps: where each token lies in its picture, for a crop, a whole picture and a moved camera.

A position is a pair (y, x) of a token's centre, y down and x right, relative to the centre of the WHOLE picture:

    position = (pixel - picture centre) / unit

The unit is the same for y and x, so circles stay circles. There are two conventions for it.

- paper: unit = sqrt(W * H), so the picture spans r_H = sqrt(H/W) by r_W = sqrt(W/H), with product 1 (HDM report,
  section 3.4). The report counts from the corner; counting from the centre makes a zoom keep the middle in place.
- released: unit = half the longer side, which spans [-1, 1]. The public weights need one pair per LATENT pixel, so pass
  the latent grid in place of the token grid.

Axes: B batch, R token rows, G token columns, N tokens row by row, 2 = (y, x).
"""

import math
from typing import Literal

import torch
from torch import Tensor

Convention = Literal["paper", "released"]


def crop_position_map(
    x0_B: Tensor,
    y0_B: Tensor,
    crop: int,
    width_B: Tensor,
    height_B: Tensor,
    grid: int,
    convention: Convention = "paper",
) -> Tensor:
    """Position map (B, grid * grid, 2), float32, of square crops (HDM report, section 3.5), on the inputs' device.

    x0_B, y0_B: left and top edge of each crop; crop: its side; width_B, height_B: size of the resized picture it was
    cut from; all in pixels. If a crop starts on a multiple of crop / grid, its map is bit-identical to the same part of
    `full_position_map`.
    """
    unit_B1 = _unit(width_B, height_B, convention)
    y_BR = _from_centre(y0_B, crop / grid, grid, height_B) / unit_B1
    return _pairs(y_BR, _from_centre(x0_B, crop / grid, grid, width_B) / unit_B1)


def full_position_map(
    width: int,
    height: int,
    rows: int,
    columns: int,
    convention: Convention = "paper",
    device: torch.device | str | None = None,
) -> Tensor:
    """Position map (rows * columns, 2), float32, of a whole picture. width, height: in pixels."""
    start_1 = torch.zeros(1, device=device)
    width_1, height_1 = start_1 + width, start_1 + height
    unit_11 = _unit(width_1, height_1, convention)
    y_1R = _from_centre(start_1, height / rows, rows, height_1) / unit_11
    return _pairs(y_1R, _from_centre(start_1, width / columns, columns, width_1) / unit_11)[0]


def camera(position_map: Tensor, x_shift: float = 0.0, y_shift: float = 0.0, zoom: float = 1.0) -> Tensor:
    """The position map (..., 2) that a moved camera sees: (position + (y_shift, x_shift)) / zoom.

    Positive x_shift moves the camera right, positive y_shift down; zoom above 1 moves closer (HDM report, section 3.8).
    Shifts are in the map's unit: 0.25 is a quarter of a square picture for `paper`, an eighth of the longer side for
    `released`. Raises ValueError unless both shifts are finite and the zoom is finite and above 0.
    """
    if not (math.isfinite(x_shift) and math.isfinite(y_shift)):
        raise ValueError(f"camera shift must be a finite number: got x_shift={x_shift}, y_shift={y_shift}")
    if not (math.isfinite(zoom) and zoom > 0):
        raise ValueError(f"zoom must be a finite number above 0 (1 is no zoom, 2 twice as close): got {zoom}")
    return (position_map + position_map.new_tensor([y_shift, x_shift])) / zoom


def _unit(width_B: Tensor, height_B: Tensor, convention: Convention) -> Tensor:
    """The unit of a position in pixels, (B, 1), float32."""
    width_B1, height_B1 = width_B.float()[:, None], height_B.float()[:, None]
    if convention == "paper":
        return torch.sqrt(width_B1 * height_B1)
    if convention == "released":
        return torch.maximum(width_B1, height_B1) / 2
    raise ValueError(f"position convention must be paper or released: got {convention!r}")


def _from_centre(start_B: Tensor, token: float, count: int, size_B: Tensor) -> Tensor:
    """Distance (B, count) of token centres from the picture's centre along one axis, in pixels, exact in float32."""
    centre_BN = start_B.float()[:, None] + (torch.arange(count, device=start_B.device) + 0.5) * token
    return centre_BN - size_B.float()[:, None] / 2


def _pairs(y_BR: Tensor, x_BG: Tensor) -> Tensor:
    """All pairs (y, x), row by row: (B, R * G, 2)."""
    y_BRG = y_BR[:, :, None].expand(-1, -1, x_BG.shape[1])
    x_BRG = x_BG[:, None, :].expand(-1, y_BR.shape[1], -1)
    return torch.stack([y_BRG, x_BRG], dim=-1).flatten(1, 2)
