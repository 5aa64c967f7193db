import io
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw, features

from pipeline.pictures.crops import Crop, downsize, square_crop
from pipeline.pictures.decoder import DecodeLimits, Header, Picture, Refused, decode, inspect
from pipeline.pictures.perceptual_hash import FLAT, perceptual_hash

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", *(["AVIF"] if features.check("avif") else [])]
SMALL = DecodeLimits(min_side=1)


def smooth(width: int, height: int) -> Image.Image:
    """Waves that every downscaling filter treats alike."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 60 + phase) + np.cos(y / 45 - phase) for phase in (0, 1, 2)]
    return Image.fromarray((127 + 60 * np.stack(waves, axis=-1)).astype(np.uint8))


def noisy(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def grainy(width: int, height: int) -> Image.Image:
    """Hard edges under film grain: the most that pictures ask of a filter."""
    grain = np.random.default_rng(0).normal(0, 12, (height, width, 1))
    return Image.fromarray((np.asarray(drawn(0, (width, height))) + grain).clip(0, 255).astype(np.uint8))


def drawn(seed: int, size: tuple[int, int] = (480, 640)) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(rng.integers(150, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = (rng.random(2) * size).astype(int).tolist()
        radius = int(rng.integers(40, 160))
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), tuple(rng.integers(0, 256, 3).tolist()), "black", 4
        )
    return image


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(data: bytes, limits: DecodeLimits = SMALL) -> Picture:
    found = decode(data, limits)
    assert isinstance(found, Picture), found
    assert found.image.mode == "RGB"
    assert found.image.size == (found.header.width, found.header.height)
    return found


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(picture(data).image)


# What the header says


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turning_is_undone(format: str, orientation: int) -> None:
    upright = smooth(64, 32)
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    data = encoded(upright if stored is None else upright.transpose(stored), format, exif=exif, **options)
    header = inspect(data, SMALL)
    assert isinstance(header, Header)
    assert (header.width, header.height, header.notes) == (64, 32, ())
    np.testing.assert_allclose(pixels(data).astype(int), np.asarray(upright), atol=5 if format == "JPEG" else 0)
    crop = square_crop(data, 32, 0.25, 0, SMALL)
    assert isinstance(crop, Crop)
    assert crop.x0 == 8
    np.testing.assert_allclose(
        crop.pixels_HWC.astype(int), np.asarray(upright)[:, 8:40], atol=5 if format == "JPEG" else 0
    )


# What the pixels become


def test_alpha_lies_on_white() -> None:
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[..., 3] = np.arange(32) * 8
    blended = 255 + (rgba[..., :3].astype(float) - 255) * rgba[..., 3:] / 255
    np.testing.assert_allclose(pixels(encoded(Image.fromarray(rgba), "PNG")), blended, atol=1)
    crop = square_crop(encoded(Image.fromarray(rgba), "PNG"), 32, 0, 0, SMALL)
    assert isinstance(crop, Crop)
    np.testing.assert_allclose(crop.pixels_HWC, blended, atol=1)


@pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow was built without littlecms2")
def test_srgb_by_any_name_changes_no_pixel() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels(encoded(smooth(64, 64), "PNG", icc_profile=profile)), np.asarray(smooth(64, 64)))


def test_metadata_is_left_behind() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    found = picture(encoded(smooth(64, 64), "JPEG", exif=exif, comment=b"a secret place"))
    assert found.image.info == {}
    for format in ("JPEG", "WEBP"):
        assert b"secret" not in downsize(found, 64, format).data


# Whatever the bytes; pictures that are broken or odd in one known way: test_picture_corpus.py


def damaged(data: bytes, seed: int) -> list[bytes]:
    """Cut at every 50th byte, and with one to eight random bytes changed."""
    rng = np.random.default_rng(seed)
    files = [data[:length] for length in range(1, len(data), 50)]
    for _ in range(150):
        changed = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 9)):
            changed[at] = rng.integers(0, 256)
        files.append(bytes(changed))
    return files


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("animated", [False, True])
def test_no_bytes_raise_or_warn(format: str, animated: bool, recwarn: pytest.WarningsRecorder) -> None:
    frames = {"save_all": True, "append_images": [smooth(64, 48)]} if animated and format != "JPEG" else {}
    exif = Image.Exif()
    exif[0x0112] = 6
    # An animated AVIF that is turned makes the encoder of libavif 1.3 crash, which is not ours to test.
    turned = {"exif": exif} if format != "GIF" and not (animated and format == "AVIF") else {}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    extras = turned | ({} if format == "GIF" else {"icc_profile": profile})
    data = encoded(drawn(1, (64, 48)), format, **extras, **frames)
    outcomes = set()
    for file in damaged(data, seed=len(format)):
        assert isinstance(inspect(file, SMALL), Header | Refused)
        found = decode(file, SMALL)
        assert isinstance(found, Picture | Refused)
        crop = square_crop(file, 16, 0.9, 0.9, SMALL)
        assert isinstance(crop, Crop | Refused)
        assert not isinstance(crop, Crop) or crop.pixels_HWC.shape == (16, 16, 3)
        outcomes.add(type(found))
    assert outcomes == {Picture, Refused}
    assert not recwarn.list


def test_random_bytes_behind_a_signature_do_not_raise() -> None:
    rng = np.random.default_rng(0)
    for signature in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8X", b"\0\0\0\x1cftypavif"):
        for length in (0, 1, 5, 20, 300, 5000):
            assert isinstance(decode(signature + rng.bytes(length), SMALL), Refused)


def test_threads_see_what_one_thread_sees() -> None:
    files = [file for format in FORMATS for file in damaged(encoded(drawn(2, (64, 48)), format), seed=1)[::4]]
    alone = [decode(file, SMALL) for file in files]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda file: decode(file, SMALL), files))
    for one, other in zip(alone, together, strict=True):
        if isinstance(one, Picture) and isinstance(other, Picture):
            assert one.header == other.header
            assert one.image.tobytes() == other.image.tobytes()
        else:
            assert one == other


# The shifted square crop


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize(("width", "height"), [(900, 600), (601, 997), (640, 640)])
@pytest.mark.parametrize("side", [64, 256])
@pytest.mark.parametrize(("source", "tolerance"), [(smooth, 0.6), (grainy, 2.5)])
def test_a_crop_is_the_whole_resized_picture_cut(
    format: str, width: int, height: int, side: int, source: Any, tolerance: float
) -> None:
    data = encoded(source(width, height), format)
    crop = square_crop(data, side, 0.37, 0.81)
    assert isinstance(crop, Crop)
    scale = side / min(width, height)
    assert (crop.width, crop.height) == (round(width * scale), round(height * scale))
    whole = picture(data).image.resize((crop.width, crop.height), Image.Resampling.LANCZOS)
    expected = np.asarray(whole)[crop.y0 : crop.y0 + side, crop.x0 : crop.x0 + side]
    difference = np.abs(crop.pixels_HWC.astype(int) - expected)
    if format == "PNG":
        assert difference.max() <= 1
    assert difference.mean() <= tolerance


def test_a_small_picture_is_enlarged() -> None:
    crop = square_crop(encoded(smooth(100, 50), "PNG"), 128, 0, 0)
    assert isinstance(crop, Crop)
    assert (crop.width, crop.height, crop.pixels_HWC.shape) == (256, 128, (128, 128, 3))


def test_every_offset_is_equally_likely_and_the_last_one_is_reached() -> None:
    wide, tall = encoded(smooth(72, 64), "PNG"), encoded(smooth(64, 72), "PNG")
    middles = [(step + 0.5) / 9 for step in range(9)]
    for data, axis in ((wide, 0), (tall, 1)):
        crops = [square_crop(data, 64, place, place) for place in (0.0, *middles, math.nextafter(1, 0))]
        offsets = [(crop.x0, crop.y0)[axis] for crop in crops if isinstance(crop, Crop)]
        assert offsets == [0, *range(9), 8]
        assert {(crop.y0, crop.x0)[axis] for crop in crops if isinstance(crop, Crop)} == {0}


# The perceptual hash


def bits_apart(one: int, other: int) -> int:
    return (one ^ other).bit_count()


@pytest.mark.parametrize("seed", range(6))
def test_a_hash_survives_encoding_and_resizing(seed: int) -> None:
    image = drawn(seed)
    hashed = perceptual_hash(image)
    assert 0 < hashed < 2**64
    for width, height in ((480, 640), (240, 320), (333, 444), (720, 960)):
        resized = image.resize((width, height), Image.Resampling.LANCZOS)
        for format, quality in (("JPEG", 92), ("JPEG", 50), ("WEBP", 70), ("PNG", 0)):
            data = encoded(resized, format, **({"quality": quality} if quality else {}))
            assert bits_apart(hashed, perceptual_hash(picture(data).image)) <= 4


def test_different_drawings_have_different_hashes() -> None:
    hashes = [perceptual_hash(drawn(seed)) for seed in range(40)]
    assert min(bits_apart(one, other) for at, one in enumerate(hashes) for other in hashes[:at]) > 8


def test_a_hash_is_the_signs_of_the_lowest_frequencies() -> None:
    """Bits 0 and 1 are half a wave across and half a wave down: brighter on the left, brighter at the top."""
    texture = np.random.default_rng(3).integers(-40, 41, (32, 32))
    y, x = np.mgrid[0:32, 0:32]
    for across in (-2, 2):
        for down in (-2, 2):
            brightness = 127 + texture + across * (x - 15.5) + down * (y - 15.5)
            image = Image.fromarray(brightness.clip(0, 255).astype(np.uint8))
            assert perceptual_hash(image) & 3 == (across < 0) + 2 * (down < 0)


def test_pictures_without_structure_share_one_hash() -> None:
    rng = np.random.default_rng(0)
    flat = Image.new("RGB", (300, 200), "navy")
    grain = Image.fromarray(rng.integers(126, 130, (200, 300), np.uint8))
    assert perceptual_hash(flat) == perceptual_hash(grain) == perceptual_hash(Image.new("L", (40, 40), 255)) == FLAT


# The smaller tier


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_downsizing_never_enlarges(format: Any) -> None:
    large = picture(encoded(smooth(600, 400), "PNG"))
    small = downsize(large, 100, format)
    assert (small.width, small.height) == (150, 100)
    again = picture(small.data)
    assert (again.header.format, again.header.width, again.header.height) == (format, 150, 100)
    reference = np.asarray(large.image.resize((150, 100), Image.Resampling.LANCZOS), int)
    assert np.abs(np.asarray(again.image) - reference).mean() < 2
    kept = downsize(large, 1000, format)
    assert (kept.width, kept.height) == (600, 400)


def test_a_smaller_jpeg_keeps_colour_at_full_resolution() -> None:
    image = Image.open(
        io.BytesIO(
            downsize(Picture(noisy(64, 64), Header(format="PNG", width=64, height=64, frames=1)), 64, "JPEG").data
        )
    )
    assert [component[1:3] for component in image.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]


def test_webp_stays_within_what_its_format_can_say() -> None:
    long = Picture(Image.new("RGB", (20_000, 10)), Header(format="PNG", width=20_000, height=10, frames=1))
    assert (downsize(long, 10, "WEBP").width, downsize(long, 10, "JPEG").width) == (16_383, 20_000)
