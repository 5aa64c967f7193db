"""Position maps: extents, cuts, circles and the camera."""

import math

import pytest
import torch

from trainer.diffusion.positions import Convention, camera, crop_position_map, full_position_map

CONVENTIONS: list[Convention] = ["paper", "released"]


@pytest.mark.parametrize(("width", "height"), [(256, 256), (512, 256), (256, 384), (1792, 1024)])
def test_paper_map_is_centred_and_its_extents_multiply_to_one(width: int, height: int) -> None:
    rows, columns = height // 16, width // 16
    map_RC2 = full_position_map(width, height, rows, columns).view(rows, columns, 2)
    # Token centres stop half a token short of the picture's edge at both ends.
    extent_y = (map_RC2[-1, 0, 0] - map_RC2[0, 0, 0]) * rows / (rows - 1)
    extent_x = (map_RC2[0, -1, 1] - map_RC2[0, 0, 1]) * columns / (columns - 1)
    torch.testing.assert_close(extent_y.item(), math.sqrt(height / width), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(extent_x.item(), math.sqrt(width / height), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(map_RC2, -map_RC2.flip(0, 1))


def test_released_map_spans_minus_one_to_one_along_the_longer_side() -> None:
    map_RC2 = full_position_map(96, 128, 16, 12, convention="released").view(16, 12, 2)
    torch.testing.assert_close(map_RC2[:, 0, 0], torch.linspace(-1 + 1 / 16, 1 - 1 / 16, 16))
    torch.testing.assert_close(map_RC2[0, :, 1], torch.linspace(-0.75 + 1 / 16, 0.75 - 1 / 16, 12))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(
    ("width", "height", "crop", "grid"), [(512, 256, 256, 16), (256, 464, 256, 16), (92, 64, 64, 8)]
)
def test_map_of_a_crop_is_the_same_cut_of_the_full_map_bit_for_bit(
    width: int, height: int, crop: int, grid: int, convention: Convention
) -> None:
    token = crop // grid
    full_RC2 = full_position_map(width // token * token, height, height // token, width // token, convention=convention)
    full_RC2 = full_RC2.view(height // token, width // token, 2)
    cuts = [(row, column) for row in range(height // token - grid + 1) for column in range(width // token - grid + 1)]
    rows, columns = torch.tensor(cuts).unbind(1)
    size = torch.ones(len(cuts), dtype=torch.int64)
    maps = crop_position_map(
        columns * token, rows * token, crop, size * (width // token * token), size * height, grid, convention=convention
    )
    for (row, column), map_N2 in zip(cuts, maps, strict=True):
        assert torch.equal(map_N2.view(grid, grid, 2), full_RC2[row : row + grid, column : column + grid])


def test_maps_of_a_batch_are_the_maps_of_its_samples() -> None:
    x0, y0 = torch.tensor([3, 0, 17]), torch.tensor([0, 5, 0])
    width, height = torch.tensor([300, 256, 512]), torch.tensor([256, 400, 256])
    together = crop_position_map(x0, y0, 256, width, height, 16)
    alone = [
        crop_position_map(x0[i : i + 1], y0[i : i + 1], 256, width[i : i + 1], height[i : i + 1], 16) for i in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_one_pixel_is_as_long_in_y_as_in_x(convention: Convention) -> None:
    map_RC2 = full_position_map(640, 256, 16, 40, convention=convention).view(16, 40, 2)
    step_y, step_x = map_RC2[1, 0, 0] - map_RC2[0, 0, 0], map_RC2[0, 1, 1] - map_RC2[0, 0, 1]
    torch.testing.assert_close(step_y, step_x, atol=1e-6, rtol=1e-5)


def test_camera_to_the_right_sees_what_lies_right() -> None:
    """The crop one token further right and down IS the view of a camera moved by one token."""
    size = torch.tensor([256])
    here = crop_position_map(torch.tensor([64]), torch.tensor([32]), 128, size, size, 8)
    right_and_down = crop_position_map(torch.tensor([80]), torch.tensor([48]), 128, size, size, 8)
    torch.testing.assert_close(camera(here, x_shift=16 / 256, y_shift=16 / 256), right_and_down)


def test_zooming_in_sees_the_middle_of_the_picture() -> None:
    """Twice as close, a picture of 8 x 8 tokens shows the middle half: the crop of half the side."""
    size = torch.tensor([256])
    middle = crop_position_map(torch.tensor([64]), torch.tensor([64]), 128, size, size, 8)
    torch.testing.assert_close(camera(full_position_map(256, 256, 8, 8), zoom=2.0), middle[0])


def test_camera_shifts_before_it_zooms_and_is_undone_by_its_inverse() -> None:
    position = full_position_map(512, 256, 4, 8)
    moved = camera(position, x_shift=0.25, y_shift=-0.1, zoom=1.33)
    torch.testing.assert_close(moved[:, 0], (position[:, 0] - 0.1) / 1.33)
    torch.testing.assert_close(moved[:, 1], (position[:, 1] + 0.25) / 1.33)
    back = camera(camera(moved, zoom=1 / 1.33), x_shift=-0.25, y_shift=0.1)
    torch.testing.assert_close(back, position)
    assert torch.equal(camera(position), position)


@pytest.mark.parametrize("zoom", [0.0, -1.0, math.inf, math.nan])
def test_camera_refuses_a_zoom_that_is_not_positive_and_finite(zoom: float) -> None:
    with pytest.raises(ValueError, match="zoom"):
        camera(full_position_map(64, 64, 4, 4), zoom=zoom)


@pytest.mark.parametrize("shift", [math.inf, math.nan])
def test_camera_refuses_a_shift_that_is_not_finite(shift: float) -> None:
    with pytest.raises(ValueError, match="shift"):
        camera(full_position_map(64, 64, 4, 4), x_shift=shift)
