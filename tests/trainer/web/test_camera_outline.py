"""The outline of what the camera sees, against the camera of the model's positions."""

import math
from dataclasses import astuple

import pytest
import torch

from trainer.diffusion.positions import camera, full_position_map
from trainer.web.camera_outline import camera_view


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 64), (64, 160)])
@pytest.mark.parametrize(("x_shift", "y_shift", "zoom"), [(0, 0, 1), (0.25, -0.5, 1), (0, 0, 2), (-0.3, 0.1, 0.7)])
def test_the_outline_is_where_the_camera_puts_the_edges_of_a_picture(
    width: int, height: int, x_shift: float, y_shift: float, zoom: float
) -> None:
    """The outermost tokens' centres are half a token inside of them."""
    rows, columns = height // 8, width // 8
    at_rest = full_position_map(width, height, rows, columns)
    half_y, half_x = (at_rest.amax(0) + torch.tensor([4.0, 4.0]) / math.sqrt(width * height)).tolist()
    moved = camera(at_rest, x_shift, y_shift, zoom)
    (top, left), (bottom, right) = moved.amin(0).tolist(), moved.amax(0).tolist()
    token_x, token_y = 1 / columns / zoom, 1 / rows / zoom  # half a token, in half sides of the frame
    expected = (left / half_x - token_x, top / half_y - token_y, right / half_x + token_x, bottom / half_y + token_y)
    assert astuple(camera_view(width, height, x_shift, y_shift, zoom)) == pytest.approx(expected, abs=1e-5)


def test_a_camera_that_is_not_moved_sees_the_frame() -> None:
    assert astuple(camera_view(96, 32, 0, 0, 1)) == (-1, -1, 1, 1)
