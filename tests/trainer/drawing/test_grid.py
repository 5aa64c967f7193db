"""The sheet of pictures: every picture where it belongs, with as much of its prompt under it as fits."""

import json
from dataclasses import asdict
from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFont

from trainer.drawing.grid import caption_lines, grid_png
from trainer.drawing.pictures import Settings

SETTINGS = Settings(width=64, height=64, steps=5)


def pictures(count: int, side: int) -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8))


def sheet(count: int, side: int) -> NDArray[np.uint8]:
    prompts = [f"picture number {number}" for number in range(count)]
    return np.asarray(Image.open(BytesIO(grid_png(prompts, pictures(count, side), list(range(count)), SETTINGS))))


def test_small_pictures_are_enlarged_by_a_whole_factor_and_stand_in_reading_order() -> None:
    found = sheet(5, 64)  # three columns, two rows; 192 pixels are the first multiple of 64 that is 160 at least
    assert found.shape == (8 + 2 * (192 + 48 + 8), 8 + 3 * (192 + 8), 3)
    for number, picture in enumerate(pictures(5, 64)):
        y, x = 8 + number // 3 * 248, 8 + number % 3 * 200
        np.testing.assert_array_equal(found[y : y + 192, x : x + 192], picture.repeat(3, axis=0).repeat(3, axis=1))
        assert (found[y + 192 : y + 240, x : x + 192] < 128).any(), "a caption"
    assert (found[8 + 248 :, 8 + 2 * 200 :] == 255).all(), "no sixth picture"


@pytest.mark.parametrize(("side", "shown"), [(160, 160), (512, 512), (1024, 512)])
def test_large_pictures_are_shown_at_half_a_thousand_pixels(side: int, shown: int) -> None:
    assert sheet(1, side).shape[1] == 8 + shown + 8


def test_what_made_the_pictures_is_in_the_file() -> None:
    png = grid_png(["red ball", "空"], pictures(2, 64), [3, 4], SETTINGS)
    made_by = json.loads(Image.open(BytesIO(png)).info["hdm"])
    assert made_by == {"prompts": ["red ball", "空"], "seeds": [3, 4], **asdict(SETTINGS)}


def test_a_caption_breaks_between_words_and_says_where_it_was_cut() -> None:
    font = ImageFont.load_default(12)
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    lines = caption_lines(words, 100)
    assert len(lines) == 3
    assert all(font.getlength(line) <= 100 for line in lines)
    assert lines[-1].endswith("...")
    assert words.startswith(" ".join(lines).removesuffix("...").strip())
    assert caption_lines(words, 10_000) == [words]
    [long] = caption_lines("x" * 100, 100)
    assert long.endswith("x...")
    assert font.getlength(long) <= 100
    assert caption_lines("", 100) == []


def test_a_font_of_latin_letters_only_shows_question_marks_for_the_others() -> None:
    assert caption_lines("空 café", 1000, ImageFont.load_default_imagefont()) == ["? café"]


def test_pictures_without_their_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompts, 1 pictures, 2 seeds"):
        grid_png(["a", "b"], pictures(1, 64), [0, 1], SETTINGS)
    with pytest.raises(ValueError, match="0 prompts"):
        grid_png([], [], [], SETTINGS)
