"""The perceptual hash of near and of different pictures."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.pictures.decoder import Picture, decode
from pipeline.pictures.perceptual_hash import FLAT, perceptual_hash
from pipeline.pictures.thumbnails import thumbnail


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def bits_apart(one: int, other: int) -> int:
    return (one ^ other).bit_count()


@pytest.mark.parametrize("seed", range(6))
def test_a_hash_survives_encoding_and_resizing(seed: int, drawn: Any) -> None:
    image = drawn(seed)
    hashed = perceptual_hash(thumbnail(image))
    assert 0 < hashed < 2**64
    for width, height in ((480, 640), (240, 320), (333, 444), (720, 960)):
        resized = image.resize((width, height), Image.Resampling.LANCZOS)
        for format, quality in (("JPEG", 92), ("JPEG", 50), ("WEBP", 70), ("PNG", 0)):
            data = encoded(resized, format, **({"quality": quality} if quality else {}))
            picture = decode(data)
            assert isinstance(picture, Picture)
            assert bits_apart(hashed, perceptual_hash(thumbnail(picture.image))) <= 4


def test_different_drawings_have_different_hashes(drawn: Any) -> None:
    hashes = [perceptual_hash(thumbnail(drawn(seed))) for seed in range(40)]
    assert min(bits_apart(one, other) for at, one in enumerate(hashes) for other in hashes[:at]) > 8


def test_a_hash_is_the_signs_of_the_lowest_frequencies() -> None:
    """Bits 0 and 1 are half a wave across and half a wave down: brighter on the left, brighter at the top."""
    texture = np.random.default_rng(3).integers(-40, 41, (32, 32))
    y, x = np.mgrid[0:32, 0:32]
    for across in (-2, 2):
        for down in (-2, 2):
            brightness = 127 + texture + across * (x - 15.5) + down * (y - 15.5)
            image = Image.fromarray(brightness.clip(0, 255).astype(np.uint8))
            assert perceptual_hash(thumbnail(image)) & 3 == (across < 0) + 2 * (down < 0)


def test_pictures_without_structure_share_one_hash() -> None:
    rng = np.random.default_rng(0)
    flat = Image.new("RGB", (300, 200), "navy")
    grain = Image.fromarray(rng.integers(126, 130, (200, 300), np.uint8))
    white = Image.new("L", (40, 40), 255)
    assert {perceptual_hash(thumbnail(image)) for image in (flat, grain, white)} == {FLAT}
