"""Square crops for training, and the smaller tier of a dataset."""

import base64
import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.pictures.crops import Crop, downsize, square_crop, thumbnail_uri
from pipeline.pictures.decoder import DecodeLimits, Header, Picture, decode


def smooth(width: int, height: int) -> Image.Image:
    """Waves that every downscaling filter treats alike."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 60 + phase) + np.cos(y / 45 - phase) for phase in (0, 1, 2)]
    return Image.fromarray((127 + 60 * np.stack(waves, axis=-1)).astype(np.uint8))


def grainy(image: Image.Image) -> Image.Image:
    """Adds film grain: with hard edges, the hardest input for a filter."""
    grain = np.random.default_rng(0).normal(0, 12, (image.height, image.width, 1))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> Picture:
    found = decode(data, DecodeLimits(min_side=1))
    assert isinstance(found, Picture), found
    return found


# The shifted square crop


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize(("width", "height"), [(900, 600), (601, 997), (640, 640)])
@pytest.mark.parametrize("side", [64, 256])
@pytest.mark.parametrize(("source", "tolerance"), [("smooth", 0.6), ("grainy", 2.5)])
def test_a_crop_equals_the_same_crop_of_the_whole_resized_picture(
    format: str, width: int, height: int, side: int, source: str, tolerance: float, drawn: Any
) -> None:
    image = smooth(width, height) if source == "smooth" else grainy(drawn(0, (width, height)))
    data = encoded(image, format)
    crop = square_crop(data, side, 0.37, 0.81)
    assert isinstance(crop, Crop)
    scale = side / min(width, height)
    assert (crop.width, crop.height) == (round(width * scale), round(height * scale))
    whole = decoded(data).image.resize((crop.width, crop.height), Image.Resampling.LANCZOS)
    expected = np.asarray(whole)[crop.y0 : crop.y0 + side, crop.x0 : crop.x0 + side]
    difference = np.abs(crop.pixels_HWC.astype(int) - expected)
    if format == "PNG":
        assert difference.max() <= 1
    assert difference.mean() <= tolerance


def test_a_small_picture_is_enlarged() -> None:
    crop = square_crop(encoded(smooth(100, 50), "PNG"), 128, 0, 0)
    assert isinstance(crop, Crop)
    assert (crop.width, crop.height, crop.pixels_HWC.shape) == (256, 128, (128, 128, 3))


def test_every_offset_is_equally_likely() -> None:
    wide, tall = encoded(smooth(72, 64), "PNG"), encoded(smooth(64, 72), "PNG")
    middles = [(step + 0.5) / 9 for step in range(9)]
    for data, axis in ((wide, 0), (tall, 1)):
        crops = [square_crop(data, 64, place, place) for place in (0.0, *middles, math.nextafter(1, 0))]
        offsets = [(crop.x0, crop.y0)[axis] for crop in crops if isinstance(crop, Crop)]
        assert offsets == [0, *range(9), 8]
        assert {(crop.y0, crop.x0)[axis] for crop in crops if isinstance(crop, Crop)} == {0}


# The smaller tier


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_downsizing_never_enlarges(format: Any) -> None:
    large = decoded(encoded(smooth(600, 400), "PNG"))
    small = downsize(large, 100, format)
    assert (small.width, small.height) == (150, 100)
    again = decoded(small.data)
    assert (again.header.format, again.header.width, again.header.height) == (format, 150, 100)
    reference = np.asarray(large.image.resize((150, 100), Image.Resampling.LANCZOS), int)
    assert np.abs(np.asarray(again.image) - reference).mean() < 2
    kept = downsize(large, 1000, format)
    assert (kept.width, kept.height) == (600, 400)


def test_a_downsized_jpeg_keeps_colour_at_full_resolution() -> None:
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    picture = Picture(noisy, Header(format="PNG", width=64, height=64, frames=1))
    image = Image.open(io.BytesIO(downsize(picture, 64, "JPEG").data))
    assert [component[1:3] for component in image.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]


def test_downsizing_respects_the_longest_side_of_webp() -> None:
    long = Picture(Image.new("RGB", (20_000, 10)), Header(format="PNG", width=20_000, height=10, frames=1))
    assert (downsize(long, 10, "WEBP").width, downsize(long, 10, "JPEG").width) == (16_383, 20_000)


# Thumbnails


def test_a_thumbnail_is_a_small_webp_and_none_for_a_broken_file() -> None:
    uri = thumbnail_uri(encoded(smooth(600, 400), "PNG"))
    assert uri is not None
    header, _, data = uri.partition(",")
    assert header == "data:image/webp;base64"
    assert decoded(base64.b64decode(data)).image.size == (176, 117)
    assert thumbnail_uri(b"no image") is None
