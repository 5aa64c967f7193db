"""Sheets: every picture in its place, with as much of its prompt under it as fits."""

import json
from dataclasses import asdict
from io import BytesIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFont

from trainer.drawing.settings import SamplingSettings
from trainer.drawing.sheet import grid_png, limit_size, wrap_text

SETTINGS = SamplingSettings(width=64, height=64, steps=5)


def pictures(count: int, side: int) -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8))


def sheet(count: int, side: int) -> NDArray[np.uint8]:
    prompts = [f"picture number {number}" for number in range(count)]
    return np.asarray(Image.open(BytesIO(grid_png(prompts, pictures(count, side), list(range(count)), SETTINGS))))


def test_small_pictures_are_enlarged_by_a_whole_factor_and_are_in_reading_order() -> None:
    found = sheet(5, 64)  # three columns, two rows; 192 is the first multiple of 64 that is at least 160
    assert found.shape == (8 + 2 * (192 + 48 + 8), 8 + 3 * (192 + 8), 3)
    for number, picture in enumerate(pictures(5, 64)):
        y, x = 8 + number // 3 * 248, 8 + number % 3 * 200
        np.testing.assert_array_equal(found[y : y + 192, x : x + 192], picture.repeat(3, axis=0).repeat(3, axis=1))
        assert (found[y + 192 : y + 240, x : x + 192] < 128).any(), "a caption"
    assert (found[8 + 248 :, 8 + 2 * 200 :] == 255).all(), "no sixth picture"


@pytest.mark.parametrize(("side", "shown"), [(160, 160), (512, 512), (1024, 512)])
def test_large_pictures_are_reduced_to_512_pixels(side: int, shown: int) -> None:
    assert sheet(1, side).shape[1] == 8 + shown + 8


def test_the_file_says_how_its_pictures_were_made() -> None:
    png = grid_png(["red ball", "空"], pictures(2, 64), [3, 4], SETTINGS)
    metadata = json.loads(Image.open(BytesIO(png)).info["hdm"])
    assert metadata == {"prompts": ["red ball", "空"], "seeds": [3, 4], **asdict(SETTINGS)}


def test_only_a_sheet_with_too_many_pixels_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.drawing.sheet._MAX_PIXELS", 10_000)
    assert limit_size(Image.new("L", (200, 100))).size == (141, 70)
    small = Image.new("L", (100, 100))
    assert limit_size(small) is small


def test_a_caption_breaks_between_words_and_shows_where_it_was_cut() -> None:
    font = ImageFont.load_default(12)
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    lines = wrap_text(words, 100)
    assert len(lines) == 3
    assert all(font.getlength(line) <= 100 for line in lines)
    assert lines[-1].endswith("...")
    assert words.startswith(" ".join(lines).removesuffix("...").strip())
    assert wrap_text(words, 10_000) == [words]
    [long] = wrap_text("x" * 100, 100)
    assert long.endswith("x...")
    assert font.getlength(long) <= 100
    assert wrap_text("", 100) == []


def test_a_latin_font_shows_question_marks_for_other_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.drawing.sheet._font", ImageFont.load_default_imagefont)
    assert wrap_text("空 café", 1000) == ["? café"]


def test_pictures_without_their_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompts, 1 pictures, 2 seeds"):
        grid_png(["a", "b"], pictures(1, 64), [0, 1], SETTINGS)
    with pytest.raises(ValueError, match="0 prompts"):
        grid_png([], [], [], SETTINGS)
