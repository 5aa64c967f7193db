"""Copies look alike; pictures that differ in a colour or a detail do not."""

import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.curation.look_alike import look_alike
from pipeline.pictures.perceptual_hash import perceptual_hash
from pipeline.pictures.thumbnails import BYTES, planes, thumbnail

Change = Callable[[Image.Image], Image.Image]


def saved(image: Image.Image, format: str, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format, quality=quality)
    return Image.open(buffer).convert("RGB")


def resized(factor: float) -> Change:
    return lambda image: image.resize(
        (round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC
    )


def trimmed(left: float, top: float, right: float, bottom: float) -> Change:
    """Shares of the sides that are cut off."""

    def trim(image: Image.Image) -> Image.Image:
        width, height = image.size
        return image.crop(
            (round(left * width), round(top * height), round(width - right * width), round(height - bottom * height))
        )

    return trim


def alike(image: Image.Image, other: Image.Image) -> bool:
    thumbnails = [np.frombuffer(thumbnail(each), np.uint8)[None] for each in (image, other)]
    found, mirrored = look_alike(*thumbnails), look_alike(*thumbnails[::-1])
    assert found == mirrored, "in either order"
    return bool(found[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda image: saved(image, "JPEG", 30),
        lambda image: saved(image, "WEBP", 50),
        resized(0.5),
        resized(2),
        lambda image: saved(resized(0.4)(image), "JPEG", 75),
    ],
)
def test_copies_look_alike(change: Change, drawn: Any) -> None:
    assert all(alike(drawn(seed), change(drawn(seed))) for seed in range(8))


def test_most_copies_with_edges_trimmed_by_a_hundredth_look_alike(drawn: Any) -> None:
    change = trimmed(0.01, 0.005, 0, 0.01)
    assert sum(alike(drawn(seed), change(drawn(seed))) for seed in range(20)) >= 18


def test_other_pictures_do_not_look_alike(drawn: Any) -> None:
    thumbnails = [np.frombuffer(thumbnail(drawn(seed)), np.uint8) for seed in range(30)]
    left, right = np.triu_indices(30, 1)
    stacked = np.stack(thumbnails)
    assert not look_alike(stacked[left], stacked[right]).any()


def face(colour: str = "gold", smiles: bool = True) -> Image.Image:
    image = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 30, 226, 226), fill=colour, outline="black", width=5)
    for x in (95, 160):
        draw.ellipse((x - 12, 90, x + 12, 114), fill="black")
    draw.arc((90, 120, 166, 180), *((20, 160) if smiles else (200, 340)), fill="black", width=6)
    return image


@pytest.mark.parametrize("other", [face("orange"), face("deepskyblue"), face(smiles=False)])
def test_another_colour_or_a_detail_is_another_picture(other: Image.Image) -> None:
    """Their hashes are equal or nearly so, which once made all of them copies of one another."""
    bits = perceptual_hash(thumbnail(face())) ^ perceptual_hash(thumbnail(other))
    assert bits.bit_count() <= 4
    assert alike(face(), face())
    assert not alike(face(), other)


def test_a_thumbnail_is_brightness_then_colour() -> None:
    noise_HW3 = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    made = thumbnail(Image.fromarray(noise_HW3))
    assert len(made) == BYTES
    bright_NHW, colour_NHW2 = planes(np.frombuffer(made, np.uint8)[None])
    red, green, blue = noise_HW3.astype(float).transpose(2, 0, 1)
    np.testing.assert_allclose(bright_NHW[0], 0.299 * red + 0.587 * green + 0.114 * blue, atol=1)
    cb = 128 - 0.168736 * red - 0.331264 * green + 0.5 * blue
    # Each part of two pixels is weighted with a triangle over four.
    distance = np.abs(np.arange(32) + 0.5 - (2 * np.arange(16)[:, None] + 1)) / 2
    weight = (1 - distance).clip(0)
    weight /= weight.sum(1, keepdims=True)
    np.testing.assert_allclose(colour_NHW2[0, :, :, 0], weight @ cb @ weight.T, atol=1)


def test_a_thumbnail_is_the_same_bytes_on_every_machine(drawn: Any) -> None:
    """Computed with this value by Pillow and pillow-simd, whose resizing differs."""
    digest = hashlib.sha256(b"".join(thumbnail(drawn(seed)) for seed in range(4)))
    digest.update(thumbnail(drawn(0).resize((2000, 1500), Image.Resampling.NEAREST)))
    assert digest.hexdigest()[:16] == "900e3edff094fb33"


def test_a_grey_picture_has_a_thumbnail_without_colour(drawn: Any) -> None:
    grey = thumbnail(drawn(0).convert("L"))
    assert set(planes(np.frombuffer(grey, np.uint8)[None])[1].ravel().tolist()) == {128}
