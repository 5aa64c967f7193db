"""Headers, pixels and damaged files."""

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from pipeline.pictures.crops import Crop, downsize, square_crop
from pipeline.pictures.decoder import DecodeLimits, OpenedImage, Picture, Refused, decode, open_image

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", *(["AVIF"] if features.check("avif") else [])]
SMALL = DecodeLimits(min_side=1)


def smooth(width: int, height: int) -> Image.Image:
    """Waves that all downscaling filters reproduce equally."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 60 + phase) + np.cos(y / 45 - phase) for phase in (0, 1, 2)]
    return Image.fromarray((127 + 60 * np.stack(waves, axis=-1)).astype(np.uint8))


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


# The header


@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(format: str, orientation: int) -> None:
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
    opened = open_image(data, SMALL)
    assert isinstance(opened, OpenedImage)
    header = opened.header
    assert (header.width, header.height, header.notes) == (64, 32, ())
    np.testing.assert_allclose(pixels(data).astype(int), np.asarray(upright), atol=5 if format == "JPEG" else 0)
    crop = square_crop(data, 32, 0.25, 0, SMALL)
    assert isinstance(crop, Crop)
    assert crop.x0 == 8
    np.testing.assert_allclose(
        crop.pixels_HWC.astype(int), np.asarray(upright)[:, 8:40], atol=5 if format == "JPEG" else 0
    )


# The pixels


def test_alpha_is_composited_on_white() -> None:
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[..., 3] = np.arange(32) * 8
    blended = 255 + (rgba[..., :3].astype(float) - 255) * rgba[..., 3:] / 255
    np.testing.assert_allclose(pixels(encoded(Image.fromarray(rgba), "PNG")), blended, atol=1)
    crop = square_crop(encoded(Image.fromarray(rgba), "PNG"), 32, 0, 0, SMALL)
    assert isinstance(crop, Crop)
    np.testing.assert_allclose(crop.pixels_HWC, blended, atol=1)


@pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow was built without littlecms2")
def test_an_srgb_profile_changes_no_pixel() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels(encoded(smooth(64, 64), "PNG", icc_profile=profile)), np.asarray(smooth(64, 64)))


def test_metadata_is_removed() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    found = picture(encoded(smooth(64, 64), "JPEG", exif=exif, comment=b"a secret place"))
    assert found.image.info == {}
    for format in ("JPEG", "WEBP"):
        assert b"secret" not in downsize(found, 64, format).data


# Randomly damaged files; for files with one known fault see test_picture_corpus.py


def damaged(data: bytes, seed: int) -> list[bytes]:
    """Truncated at every 50th byte, and with one to eight random bytes changed."""
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
def test_damaged_files_neither_raise_nor_warn(
    format: str, animated: bool, recwarn: pytest.WarningsRecorder, drawn: Any
) -> None:
    frames = {"save_all": True, "append_images": [smooth(64, 48)]} if animated and format != "JPEG" else {}
    exif = Image.Exif()
    exif[0x0112] = 6
    # The encoder of libavif 1.3 crashes on animated AVIFs with an orientation.
    turned = {"exif": exif} if format != "GIF" and not (animated and format == "AVIF") else {}
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    extras = turned | ({} if format == "GIF" else {"icc_profile": profile})
    data = encoded(drawn(1, (64, 48)), format, **extras, **frames)
    outcomes = set()
    for file in damaged(data, seed=len(format)):
        assert isinstance(open_image(file, SMALL), OpenedImage | Refused)
        found = decode(file, SMALL)
        assert isinstance(found, Picture | Refused)
        crop = square_crop(file, 16, 0.9, 0.9, SMALL)
        assert isinstance(crop, Crop | Refused)
        assert not isinstance(crop, Crop) or crop.pixels_HWC.shape == (16, 16, 3)
        outcomes.add(type(found))
    assert outcomes == {Picture, Refused}
    assert not recwarn.list


def test_random_bytes_after_a_signature_do_not_raise() -> None:
    rng = np.random.default_rng(0)
    for signature in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8X", b"\0\0\0\x1cftypavif"):
        for length in (0, 1, 5, 20, 300, 5000):
            assert isinstance(decode(signature + rng.bytes(length), SMALL), Refused)


def test_threads_decode_like_a_single_thread(drawn: Any) -> None:
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
