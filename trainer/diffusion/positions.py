"""Where each token lies in its picture: the position map of a crop, of a whole picture, and of a moved camera.

A position is a pair (y, x), y down and x right, 0 at the centre of the WHOLE picture, taken at the centre of a token:

    position = (pixel - picture centre) / unit

Both conventions use the same unit for y and x, so a circle stays a circle; they differ in what the unit is.

- paper: unit = sqrt(W * H), so the picture spans r_H = sqrt(H/W) by r_W = sqrt(W/H), whose product is 1 (HDM report,
  section 3.4). The report's formula counts from the corner; from the centre, a zoom leaves the middle where it is.
- released: unit = half the longer side, which then spans [-1, 1]. The public weights want one pair per LATENT pixel:
  give them the latent grid where `paper` takes the token grid.

Axes: B batch, G tokens along one side of the crop, N tokens row by row, 2 = (y, x).
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
    """Position map (B, grid * grid, 2), float32, of square crops, on the device of the inputs.

    x0_B, y0_B: left and top edge of each crop; crop: its side; width_B, height_B: the picture it was cut from, after
    resizing; all in pixels. It equals the same cut of `full_position_map`, bit for bit, wherever the crop starts on a
    multiple of crop / grid (HDM report, section 3.5).
    """
    return _position_map(x0_B, y0_B, crop / grid, crop / grid, width_B, height_B, grid, grid, convention)


def full_position_map(
    width: int,
    height: int,
    rows: int,
    columns: int,
    convention: Convention = "paper",
    device: torch.device | str | None = None,
) -> Tensor:
    """Position map (rows * columns, 2), float32, of a whole picture of width x height pixels, for sampling."""
    zero_1 = torch.zeros(1, device=device)
    map_1N2 = _position_map(
        zero_1, zero_1, width / columns, height / rows, zero_1 + width, zero_1 + height, rows, columns, convention
    )
    return map_1N2[0]


def camera(position_map: Tensor, x_shift: float = 0.0, y_shift: float = 0.0, zoom: float = 1.0) -> Tensor:
    """The position map (..., 2) seen by a moved camera: position += (y_shift, x_shift), then position /= zoom.

    Positive x_shift moves the camera right, positive y_shift down, zoom above 1 goes closer (HDM report, section 3.8).
    Shifts are in the map's own unit: 0.25 is a quarter of a square picture in `paper`, an eighth of the longer side in
    `released`. Raises ValueError unless the shifts are finite and the zoom is finite and above 0.
    """
    if not (math.isfinite(x_shift) and math.isfinite(y_shift)):
        raise ValueError(f"camera shift must be a finite number: got x_shift={x_shift}, y_shift={y_shift}")
    if not (math.isfinite(zoom) and zoom > 0):
        raise ValueError(f"zoom must be a finite number above 0 (1 is no zoom, 2 twice as close): got {zoom}")
    return (position_map + position_map.new_tensor([y_shift, x_shift])) / zoom


def _position_map(
    x0_B: Tensor,
    y0_B: Tensor,
    token_width: float,
    token_height: float,
    width_B: Tensor,
    height_B: Tensor,
    rows: int,
    columns: int,
    convention: Convention,
) -> Tensor:
    """Token centres in pixels, exact in float32, then one subtraction and one division: equal pixels, equal bits."""
    width_B1, height_B1 = width_B.float()[:, None], height_B.float()[:, None]
    if convention == "paper":
        unit_B1 = torch.sqrt(width_B1 * height_B1)
    elif convention == "released":
        unit_B1 = torch.maximum(width_B1, height_B1) / 2
    else:
        raise ValueError(f"position convention must be paper or released: got {convention!r}")
    device = x0_B.device
    y_BR = y0_B.float()[:, None] + (torch.arange(rows, device=device) + 0.5) * token_height
    x_BG = x0_B.float()[:, None] + (torch.arange(columns, device=device) + 0.5) * token_width
    y_BR = (y_BR - height_B1 / 2) / unit_B1
    x_BG = (x_BG - width_B1 / 2) / unit_B1
    batch = x0_B.shape[0]
    map_BRG2 = torch.stack(
        [y_BR[:, :, None].expand(batch, rows, columns), x_BG[:, None, :].expand(batch, rows, columns)], dim=-1
    )
    return map_BRG2.flatten(1, 2)
