import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.pictures.decoder import Crop, Picture, decode, square_crop
from pipeline.pictures.libwebp import decode_still


def waves(width: int, height: int, channels: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    phases = [np.sin(x / 9 + phase) + np.cos(y / 7 - phase) for phase in range(channels)]
    return Image.fromarray((127 + 60 * np.stack(phases, axis=-1)).astype(np.uint8))


def webp(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **options)
    return buffer.getvalue()


STILLS = {
    "lossy": webp(waves(65, 41, 3)),
    "lossless": webp(waves(65, 41, 3), lossless=True),
    "lossy with alpha": webp(waves(65, 41, 4)),
    "lossless with alpha": webp(waves(65, 41, 4), lossless=True, exact=True),
    "extended": webp(waves(65, 41, 3), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
}


@pytest.mark.parametrize("name", STILLS)
def test_the_pixels_are_those_of_pillow(name: str) -> None:
    still = decode_still(STILLS[name], 65, 41, "RGBA")
    assert still is not None, "this Pillow hides the functions of its libwebp"
    with Image.open(io.BytesIO(STILLS[name])) as opened:
        assert np.array_equal(np.asarray(still), np.asarray(opened.convert("RGBA")))


@pytest.mark.parametrize("name", STILLS)
def test_pictures_and_crops_are_the_same_where_libwebp_cannot_be_called(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen() -> tuple[Any, ...]:
        picture, crop = decode(STILLS[name]), square_crop(STILLS[name], 32, 0.5, 0.5)
        assert isinstance(picture, Picture)
        assert isinstance(crop, Crop)
        return picture.header, picture.image.tobytes(), crop.pixels_HWC.tobytes()

    called = seen()
    monkeypatch.setattr("pipeline.pictures.decoder.decode_still", lambda *_: None)
    assert seen() == called


def test_what_is_not_a_whole_still_picture_of_this_size_is_left_to_pillow() -> None:
    data = STILLS["lossless"]
    animation = webp(waves(65, 41, 3), save_all=True, append_images=[waves(65, 41, 3).rotate(180)], lossless=True)
    for width, height in ((64, 41), (66, 41), (65, 42), (41, 65)):
        assert decode_still(data, width, height, "RGBA") is None
    for broken in (b"", data[:20], data[: len(data) // 2], bytes(100), animation):
        assert decode_still(broken, 65, 41, "RGBA") is None


def test_a_picture_outlives_the_bytes_it_came_from() -> None:
    expected = np.asarray(decode_still(STILLS["lossy"], 65, 41, "RGBX")).copy()
    pictures = [decode_still(bytes(bytearray(STILLS["lossy"])), 65, 41, "RGBX") for _ in range(20)]
    assert all(np.array_equal(np.asarray(picture), expected) for picture in pictures)
