"""A picture's file says how it was made. Other files and damaged ones are refused."""

import json
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.drawing.picture_files import picture_png, read_metadata, save_picture
from trainer.drawing.settings import PictureRequest, SamplingSettings

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
SETTINGS = SamplingSettings(width=64, height=48, steps=2, negative="blue fish", shift=1.0)
MADE_WITH = {"checkpoint": {"step": 1, "saved_at": 2.5}, "device": "cpu"}


def test_png_and_json_say_how_a_picture_was_made(tmp_path: Path) -> None:
    batch = {"prompts": ["空, red star", "b"], "seeds": [3, 4], "place": 0}
    request = PictureRequest(prompt="空, red star", seed=3, settings=SETTINGS)
    path = save_picture(tmp_path, PIXELS, request, MADE_WITH, batch)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), PIXELS)
    metadata = read_metadata(path)
    assert metadata == json.loads(path.with_suffix(".json").read_text())
    assert metadata == {"prompt": "空, red star", "seed": 3, **asdict(SETTINGS), **MADE_WITH, "company": batch}
    assert path.name.startswith("000003-red-star-")


def test_only_the_same_request_and_checkpoint_overwrite_a_picture(tmp_path: Path) -> None:
    def name(settings: SamplingSettings = SETTINGS, step: int = 1) -> str:
        request = PictureRequest(prompt="a", seed=3, settings=settings)
        return save_picture(tmp_path, PIXELS, request, {"checkpoint": {"step": step}}).name

    assert name() == name()
    assert len({name(), name(replace(SETTINGS, zoom=2.0)), name(step=2)}) == 3


def test_a_file_that_does_not_say_how_it_was_made_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="does not exist"):
        read_metadata(path)
    for data, named in (
        (b"", "not a PNG"),
        (b"not a picture", "not a PNG"),
        (picture_png(PIXELS, {"pictures": []}), "sheet"),
        (picture_png(PIXELS, [1]), "does not say"),  # type: ignore[arg-type]
        (_png_without_text(), "does not say"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=named):
            read_metadata(path)


def _png_without_text() -> bytes:
    buffer = BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_damaged_png_is_refused_or_still_has_its_metadata(tmp_path: Path) -> None:
    metadata = {"prompt": "red star", "seed": 3, **asdict(SETTINGS)}
    whole = picture_png(PIXELS, metadata)
    path, rng = tmp_path / "a.png", np.random.default_rng(0)
    refused = 0
    for number in range(200):
        data = bytearray(whole)
        if number % 2:
            data = data[: rng.integers(len(data) - 20)]
        else:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            found = read_metadata(path)
        except ValueError:
            refused += 1
        else:
            assert found == metadata
    assert refused > 125
