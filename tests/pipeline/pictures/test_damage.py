"""Damaged files are recognised, sound ones are not refused, and a JPEG without its end marker is kept."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, features

from pipeline.pictures.containers import RejectReason
from pipeline.pictures.damage import find_damage
from pipeline.pictures.decoder import Picture, Refused, decode
from pipeline.pictures.pixels import is_blank

FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 90},
    "progressive JPEG": {"quality": 90, "progressive": True},
    "optimized JPEG": {"quality": 75, "optimize": True},
    "PNG": {},
    "WEBP": {"quality": 90},
    "GIF": {},
} | ({"AVIF": {"quality": 80, "speed": 10}} if features.check("avif") else {})
PLACES = np.linspace(0.06, 0.98, 20)


def encoded(image: Image.Image, name: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name.split()[-1], **FORMATS[name])
    return buffer.getvalue()


def is_kept(data: bytes) -> bool:
    """Whether ingest keeps a file: it can be decoded and shows no damage."""
    picture = decode(data)
    if isinstance(picture, Refused):
        return False
    header = picture.header
    return find_damage(data, header.format, header.width * header.height) is None


@pytest.fixture(scope="module")
def detailed() -> Image.Image:
    """Blurred noise: detail everywhere, as in a painting."""
    noise_HW3 = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    return Image.fromarray(noise_HW3).resize((512, 384), Image.Resampling.BICUBIC)


def cut(data: bytes, place: float) -> bytes:
    return data[: int(len(data) * place)]


def zero_tail(data: bytes, place: float) -> bytes:
    return cut(data, place) + bytes(len(data) - int(len(data) * place))


def dropped(data: bytes, place: float) -> bytes:
    start = int(len(data) * place)
    return data[:start] + data[start + len(data) // 100 :]


def zeroed_block(data: bytes, place: float) -> bytes:
    """Zeros in place of a 4 KB block, as after a failed write."""
    start = int(len(data) * place)
    return data[:start] + bytes(min(4096, len(data) - start)) + data[start + 4096 :]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("damage", [cut, zero_tail])
def test_a_file_without_its_end_is_never_kept(name: str, damage: Callable[..., bytes], detailed: Image.Image) -> None:
    data = encoded(detailed, name)
    assert is_kept(data)
    places = PLACES[:-2] if name == "WEBP" and damage is zero_tail else PLACES  # shorter than what flat pictures have
    assert not [place for place in places if is_kept(damage(data, place))]


# Of single wrong bytes libjpeg recognises those after which it loses its place. PNG has checksums.
@pytest.mark.parametrize(
    ("name", "damage", "least"),
    [
        ("JPEG", dropped, 20),
        ("progressive JPEG", dropped, 14),
        ("PNG", dropped, 20),
        ("WEBP", dropped, 20),
        ("JPEG", zeroed_block, 14),
        ("PNG", zeroed_block, 19),
        ("WEBP", zeroed_block, 18),
    ],
)
def test_damage_in_the_middle(name: str, damage: Callable[..., bytes], least: int, detailed: Image.Image) -> None:
    data = encoded(detailed, name)
    assert sum(not is_kept(damage(data, place)) for place in PLACES) >= least


def sound() -> Iterator[Image.Image]:
    for side in (64, 700):
        yield Image.new("RGB", (side, side), "white")
        yield Image.fromarray(np.tile(np.linspace(0, 255, side).astype(np.uint8), (side, 1))).convert("RGB")
        drawing = Image.new("RGB", (side, side), "white")
        ImageDraw.Draw(drawing).rectangle((8, 8, side // 3, side // 3), fill="navy")
        yield drawing
    yield Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 300, 3), np.uint8))


@pytest.mark.parametrize("name", FORMATS)
def test_no_sound_file_is_refused(name: str, drawn: Any) -> None:
    pictures = [*sound(), *(drawn(seed) for seed in range(4))]
    assert all(is_kept(encoded(picture, name)) for picture in pictures)


@pytest.mark.parametrize("change", [lambda image: image.convert("L"), lambda image: image.convert("CMYK")])
def test_sound_jpegs_of_other_modes_are_kept(change: Callable[..., Image.Image], drawn: Any) -> None:
    assert is_kept(encoded(change(drawn(0)), "JPEG"))
    assert is_kept(encoded(change(drawn(0)), "JPEG") + b"trailing bytes")


def test_a_jpeg_that_lacks_only_its_end_marker_is_kept_with_a_note(detailed: Image.Image) -> None:
    data = encoded(detailed, "JPEG")
    whole, lacking = decode(data), decode(data[:-2])
    assert isinstance(whole, Picture)
    assert isinstance(lacking, Picture)
    assert lacking.header.notes == ("ends without EOI",)
    assert np.array_equal(np.asarray(lacking.image), np.asarray(whole.image))
    assert is_kept(data[:-2])
    refused = decode(data[:-40])
    assert isinstance(refused, Refused)
    assert refused.reason is RejectReason.TRUNCATED


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
def test_a_picture_of_one_colour_is_blank(name: str, drawn: Any) -> None:
    blank = decode(encoded(Image.new("RGB", (300, 200), (200, 40, 90)), name))
    assert isinstance(blank, Picture)
    assert is_blank(blank.image)
    dot = Image.new("RGB", (300, 200), "white")
    dot.putpixel((5, 5), (0, 0, 0))
    assert not is_blank(dot)
    assert not is_blank(drawn(0))


def test_a_transparent_picture_is_blank_whatever_its_hidden_colours() -> None:
    hidden = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    hidden.putalpha(0)
    buffer = io.BytesIO()
    hidden.save(buffer, "PNG")
    picture = decode(buffer.getvalue())
    assert isinstance(picture, Picture)
    assert is_blank(picture.image)
