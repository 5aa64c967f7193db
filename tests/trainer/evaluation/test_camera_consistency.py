"""Known displacements are measured, and a camera that moves right moves its content left."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.drawings.illustrations import compose
from pipeline.drawings.painting import draw
from trainer.diffusion.positions import camera, full_position_map
from trainer.evaluation.camera_consistency import (
    CameraMove,
    camera_consistency,
    content_displacement,
    expected_displacement,
)

HEIGHT, WIDTH = 48, 64


def waves(down: float = 0.0, right: float = 0.0, seed: int = 0) -> NDArray[np.uint8]:
    """A periodic layout, moved by any number of pixels."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(float)
    picture = np.full((HEIGHT, WIDTH, 3), 128.0)
    for rows in range(-6, 7):
        for columns in range(7):
            phase = 2 * math.pi * (rows * (y - down) / HEIGHT + columns * (x - right) / WIDTH)
            amplitude, start = generator.uniform(0, 8, 3), generator.uniform(0, 2 * math.pi, 3)
            picture += amplitude * np.cos(phase[..., None] + start)
    return np.clip(picture, 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (5, 0), (0, -16), (-12, 16), (3, -31)])
def test_whole_pixels_are_measured_exactly(down: int, right: int) -> None:
    before = waves()
    found = content_displacement(before, np.roll(before, (down, right), axis=(0, 1)))
    assert found == pytest.approx((down / HEIGHT, right / WIDTH), abs=1e-6)


@pytest.mark.parametrize(("down", "right"), [(0.5, 0.0), (0.0, 0.25), (-3.3, 7.7)])
def test_parts_of_a_pixel_are_measured_to_a_twentieth(down: float, right: float) -> None:
    found = content_displacement(waves(), waves(down, right))
    assert found[0] * HEIGHT == pytest.approx(down, abs=0.05)
    assert found[1] * WIDTH == pytest.approx(right, abs=0.05)


def test_noise_as_strong_as_the_picture_costs_less_than_a_pixel() -> None:
    generator = np.random.default_rng(1)
    before, after = waves(), waves(6, -16)

    def noisy(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        noise = generator.normal(0, picture.std(), picture.shape)
        return np.clip(picture + noise, 0, 255).astype(np.uint8)

    found = content_displacement(noisy(before), noisy(after))
    assert found[0] * HEIGHT == pytest.approx(6, abs=1)
    assert found[1] * WIDTH == pytest.approx(-16, abs=1)


def test_texture_that_stays_in_place_does_not_hide_that_the_layout_moves() -> None:
    """Like the sampler's noise, which does not move with the camera."""
    texture = np.random.default_rng(0).integers(-40, 41, (HEIGHT, WIDTH, 1))
    before, after = (np.clip(waves(0, right).astype(int) + texture, 0, 255).astype(np.uint8) for right in (0, 16))
    assert content_displacement(before, after)[1] == pytest.approx(0.25, abs=0.02)


def test_a_frame_that_moves_over_a_drawn_picture_is_followed() -> None:
    """Content comes in on one side and leaves on the other."""
    ratios = []
    for index in range(60):
        picture = np.asarray(draw(compose(seed=3, index=index)))
        side = picture.shape[0]
        if picture.shape[1] >= 1.3 * side:
            step, start = side // 4, (picture.shape[1] - side) // 2
            frames = [
                picture[:, left : left + side] for left in (start, start + step) if left + side <= picture.shape[1]
            ]
            if len(frames) == 2:
                ratios.append(content_displacement(frames[0], frames[1])[1] / (-step / side))
    assert len(ratios) >= 5
    assert min(ratios) > 0
    assert np.median(ratios) == pytest.approx(1, abs=0.1)


def test_uniform_pictures_have_no_displacement_and_sizes_must_agree() -> None:
    plain = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    assert content_displacement(plain, plain) == (0.0, 0.0)
    with pytest.raises(ValueError, match="one size"):
        content_displacement(plain, plain[:, 1:])


@pytest.mark.parametrize(("x_shift", "y_shift"), [(0.25, 0.0), (0.0, 0.25), (-0.125, 0.25)])
def test_content_is_expected_where_the_moved_camera_has_its_position(x_shift: float, y_shift: float) -> None:
    """On the position map that the model is given, for a picture with unequal sides."""
    rows, columns = 36, 64
    still = full_position_map(columns, rows, rows, columns)
    moved = camera(still, x_shift, y_shift).reshape(rows, columns, 2)
    y, x = 18, 32
    position = still.reshape(rows, columns, 2)[y, x]
    nearest = int((moved - position).square().sum(-1).argmin())
    down, right = expected_displacement(x_shift, y_shift, columns, rows)
    assert nearest // columns - y == pytest.approx(down * rows, abs=0.51)
    assert nearest % columns - x == pytest.approx(right * columns, abs=0.51)
    assert torch.equal(camera(still), still)


def test_consistency_is_measured_along_the_expected_direction() -> None:
    before = waves()

    def move(down: int, right: int, x_shift: float, y_shift: float) -> CameraMove:
        return CameraMove(before, np.roll(before, (down, right), axis=(0, 1)), x_shift, y_shift)

    unit = math.sqrt(HEIGHT * WIDTH)
    moves = [
        move(0, -16, 16 / unit, 0),  # as expected
        move(-6, 0, 0, 12 / unit),  # half as far
        move(0, 8, 16 / unit, 0),  # in the wrong direction
    ]
    found = camera_consistency(moves)
    assert found.ratio == pytest.approx(0.5, abs=1e-3)
    assert (found.within_40_percent, found.right_direction) == pytest.approx((1 / 3, 2 / 3))
    with pytest.raises(ValueError, match="moved camera"):
        camera_consistency([])
    with pytest.raises(ValueError, match="did not move"):
        camera_consistency([move(0, 0, 0, 0)])
