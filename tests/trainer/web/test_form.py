"""What the page's form means, and what of it is refused."""

import math
from typing import Any

import pytest

from trainer.web.form import RequestLimits, example_rows, read_form, size_presets

LIMITS = RequestLimits(largest_side=128, most_steps=1000)
GOOD: dict[str, Any] = {
    "prompt": "red star", "negative": "", "width": 64, "height": 48, "steps": 2, "guidance": 3, "sampler": "euler",
    "seed": 7, "x_shift": 0.25, "y_shift": 0, "zoom": 1.5,
}  # fmt: skip


def test_a_form_requests_one_picture_and_whole_numbers_may_be_floats() -> None:
    request = read_form(GOOD | {"width": 64.0, "seed": 7.0, "zoom": 2}, LIMITS)
    assert (request.prompt, request.seed, request.settings.width, request.settings.zoom) == ("red star", 7, 64, 2.0)
    assert isinstance(request.seed, int)
    assert read_form(GOOD | {"seed": 2**53 - 1}, LIMITS).seed == 2**53 - 1
    assert isinstance(request.settings.zoom, float)
    assert read_form(GOOD | {"prompt": None, "negative": None}, LIMITS).prompt == ""


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("zoom", 0, "zoom"),
        ("zoom", -1, "zoom -1"),
        ("zoom", math.nan, "zoom"),
        ("zoom", math.inf, "zoom"),
        ("x_shift", math.nan, "x_shift"),
        ("y_shift", -math.inf, "y shift"),
        ("guidance", math.nan, "guidance"),
        ("guidance", 10**400, "guidance"),
        ("width", 0, "width"),
        ("width", -64, "width"),
        ("width", 129, "128 pixels at most"),
        ("height", 10**9, "128 pixels at most"),
        ("height", 10**400, "height is out of all bounds"),
        pytest.param("width", -(10**5000), "width is out of all bounds", id="width-of-5000-digits"),
        ("height", 64.5, "height 64.5: must be a whole number"),
        ("height", math.nan, "height"),
        ("height", math.inf, "height"),
        ("width", None, "width is empty"),
        ("width", "", "width is empty"),
        ("width", "wide", 'width "wide"'),
        ("width", True, "width"),
        ("width", [64], "width"),
        ("steps", 0, "steps"),
        ("steps", 1001, "1000 at most"),
        ("seed", -1, "seed"),
        ("seed", 2.0**70, "seed"),
        ("seed", 2.0**53, "seed: at most 9,007,199,254,740,991, because browsers round larger numbers"),
        ("seed", 890238189411846300, "seed: at most"),
        ("sampler", "ddim", "euler, heun"),
        ("sampler", None, "euler, heun"),
        ("sampler", {"a": 1}, "sampler"),
        ("prompt", 3, "prompt"),
        ("prompt", "\ud800", "prompt"),
        ("negative", "a" * 4001, "negative prompt has 4001 characters"),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(field: str, value: Any, named: str) -> None:
    with pytest.raises(ValueError) as refusal:
        read_form(GOOD | {field: value}, LIMITS)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_form_without_a_field_is_refused() -> None:
    with pytest.raises(ValueError, match="zoom is empty"):
        read_form({name: value for name, value in GOOD.items() if name != "zoom"}, LIMITS)


@pytest.mark.parametrize("resolution", [64, 256, 1024])
def test_presets_are_whole_tokens_with_about_the_training_area(resolution: int) -> None:
    presets = size_presets(resolution, token=8, largest_side=4096)
    assert (resolution, resolution) in presets.values()
    assert {(height, width) for width, height in presets.values()} == set(presets.values())
    for width, height in presets.values():
        assert width % 8 == height % 8 == 0
        assert width * height == pytest.approx(resolution**2, rel=0.15)
    assert list(size_presets(resolution, 8, largest_side=resolution).values()) == [(resolution, resolution)]


def test_each_example_has_a_prompt_and_a_valid_camera() -> None:
    rows = example_rows([f"prompt {n}" for n in range(8)])
    assert len({row[1:] for row in rows}) > 4, "moves of several kinds"
    for number, (prompt, x_shift, y_shift, zoom) in enumerate(rows):
        camera_of_row = {"x_shift": x_shift, "y_shift": y_shift, "zoom": zoom}
        assert read_form(GOOD | {"prompt": prompt} | camera_of_row, LIMITS).prompt == f"prompt {number}"
