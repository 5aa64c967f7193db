import io
import math
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageCms, ImageDraw, features

from pipeline.images import (
    FLAT,
    Crop,
    Header,
    Limits,
    Picture,
    Reason,
    Refused,
    decode,
    downsize,
    inspect,
    perceptual_hash,
    pillow_build,
    square_crop,
)

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", *(["AVIF"] if features.check("avif") else [])]
SMALL = Limits(min_side=1)


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


def picture(data: bytes, limits: Limits = SMALL) -> Picture:
    found = decode(data, limits)
    assert isinstance(found, Picture), found
    assert found.image.mode == "RGB"
    assert found.image.size == (found.header.width, found.header.height)
    return found


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(picture(data).image)


def reason(data: bytes, limits: Limits = SMALL) -> Reason | None:
    """The one answer of all three functions."""
    answers = inspect(data, limits), decode(data, limits), square_crop(data, 16, 0.5, 0.5, limits)
    reasons = {answer.reason if isinstance(answer, Refused) else None for answer in answers}
    assert len(reasons) == 1, answers
    return reasons.pop()


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)), *extra]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


# What the header says


@pytest.mark.parametrize("format", FORMATS)
def test_the_format_is_what_the_bytes_are(format: str) -> None:
    expected = Header(format=format, width=60, height=40, frames=1)
    assert inspect(encoded(smooth(60, 40), format), SMALL) == expected
    assert picture(encoded(smooth(60, 40), format)).header == expected


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


def test_broken_exif_is_survived_and_noted_without_a_warning() -> None:
    data = encoded(smooth(64, 32), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = picture(data)
    assert found.header.notes[0].startswith("EXIF ignored")
    assert (found.header.width, found.header.height) == (64, 32)


def test_no_pixel_is_decoded_for_the_header() -> None:
    data = png(64, 64, 8, 2, b"")
    assert isinstance(inspect(data, SMALL), Header)
    assert isinstance(decode(data, SMALL), Refused)


def test_ninety_five_megapixels_are_within_the_limit_and_warn_of_nothing() -> None:
    data = png(10_000, 9_500, 1, 0, bytes(10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect(data) == Header(format="PNG", width=10_000, height=9_500, frames=1)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", *(["AVIF"] if "AVIF" in FORMATS else [])])
def test_an_animation_is_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    assert picture(data).header.frames == 3
    np.testing.assert_allclose(pixels(data).astype(int), np.broadcast_to([255, 0, 0], (40, 40, 3)), atol=3)


def test_a_multi_picture_jpeg_is_its_first_picture() -> None:
    data = encoded(smooth(64, 48), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    assert picture(data).header == Header(format="JPEG", width=64, height=48, frames=1)
    assert pixels(data).mean() > 100


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


def test_transparent_palette_entries_lie_on_white() -> None:
    image = Image.new("P", (32, 32), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 16, 32))
    for format in ("PNG", "GIF"):
        found = pixels(encoded(image, format, transparency=0))
        assert found[0, 0].tolist() == [0, 0, 255]
        assert found[0, 31].tolist() == [255, 255, 255]
    half = pixels(encoded(image, "PNG", transparency=bytes([128, 255])))
    np.testing.assert_allclose(half[0, 31].astype(int), [255, 127, 127], atol=1)


def test_a_transparent_colour_lies_on_white() -> None:
    image = Image.new("RGB", (32, 32), (10, 20, 30))
    image.paste((10, 20, 31), (0, 0, 16, 32))
    found = pixels(encoded(image, "PNG", transparency=(10, 20, 30)))
    assert found[0, 0].tolist() == [10, 20, 31]
    assert found[0, 31].tolist() == [255, 255, 255]


def test_grey_of_every_depth_is_grey() -> None:
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (32, 256))
    expected = np.repeat(ramp[..., None], 3, axis=2)
    assert np.array_equal(pixels(encoded(Image.fromarray(ramp), "PNG")), expected)
    rows16 = b"".join(b"\0" + (ramp[0].astype(">u2") * 257).tobytes() for _ in range(32))
    assert np.array_equal(pixels(png(256, 32, 16, 0, rows16)), expected)
    keyed = pixels(png(256, 32, 16, 0, rows16, (b"tRNS", struct.pack(">H", 7 * 257))))
    assert keyed[0, 6:9, 0].tolist() == [6, 255, 8]
    rgb16 = b"".join(b"\0" + np.repeat(ramp[0].astype(">u2") * 257, 3).tobytes() for _ in range(32))
    assert np.array_equal(pixels(png(256, 32, 16, 2, rgb16)), expected)
    grey_alpha = Image.merge("LA", [Image.fromarray(ramp), Image.new("L", (256, 32), 0)])
    assert (pixels(encoded(grey_alpha, "PNG")) == 255).all()
    bits = pixels(encoded(Image.fromarray(ramp).convert("1", dither=Image.Dither.NONE), "PNG"))
    assert bits[0, [0, 127, 128, 255], 0].tolist() == [0, 0, 255, 255]


def test_cmyk_is_read_with_and_without_adobes_inversion() -> None:
    cyan = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    adobe = encoded(cyan, "JPEG", quality=100)
    np.testing.assert_allclose(pixels(adobe).astype(int), np.broadcast_to([0, 255, 255], (32, 32, 3)), atol=2)
    marker = adobe.index(b"\xff\xeeAd" if b"\xff\xeeAd" in adobe else b"\xff\xee\x00\x0eAdobe")
    unmarked = adobe[:marker] + adobe[marker + 16 :]
    inverted = np.asarray(ImageChops.invert(cyan).convert("RGB"), int)
    np.testing.assert_allclose(pixels(unmarked).astype(int), inverted, atol=2)


def linear_profile() -> bytes:
    """An ICC profile with the primaries of sRGB and no gamma (ICC.1:2001-04, monitor profile)."""
    fixed = lambda *numbers: b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)  # noqa: E731
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 7) + b"linear\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249),
        b"rXYZ": b"XYZ \0\0\0\0" + fixed(0.43607, 0.22249, 0.01392),
        b"gXYZ": b"XYZ \0\0\0\0" + fixed(0.38515, 0.71687, 0.09708),
        b"bXYZ": b"XYZ \0\0\0\0" + fixed(0.14307, 0.06061, 0.71410),
        **{name: b"curv\0\0\0\0" + struct.pack(">I", 0) for name in (b"rTRC", b"gTRC", b"bTRC")},
    }
    table, body = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    size = 128 + len(table) + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    return (head + bytes(28) + fixed(0.9642, 1.0, 0.8249)).ljust(128, b"\0") + table + body


@pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow was built without littlecms2")
def test_a_linear_profile_becomes_the_curve_of_srgb() -> None:
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (32, 256, 3))
    linear = np.arange(256) / 255
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    expected = np.broadcast_to((255 * curve)[None, :, None], (32, 256, 3))
    data = encoded(Image.fromarray(ramp), "PNG", icc_profile=linear_profile())
    assert picture(data).header.notes == ()
    np.testing.assert_allclose(pixels(data), expected, atol=1.5)
    crop = square_crop(data, 32, 0.5, 0, SMALL)
    assert isinstance(crop, Crop)
    np.testing.assert_allclose(crop.pixels_HWC, expected[:, crop.x0 : crop.x0 + 32], atol=1.5)


@pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow was built without littlecms2")
def test_srgb_by_any_name_changes_no_pixel() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels(encoded(smooth(64, 64), "PNG", icc_profile=profile)), np.asarray(smooth(64, 64)))


@pytest.mark.parametrize("image", [smooth(64, 64), smooth(64, 64).convert("L")], ids=["broken", "another mode's"])
def test_an_unusable_profile_is_ignored_and_noted(image: Image.Image) -> None:
    profile = b"nonsense" * 40 if image.mode == "RGB" else linear_profile()
    found = picture(encoded(image, "PNG", icc_profile=profile))
    assert [note.split(":")[0] for note in found.header.notes] == ["colour profile ignored"]
    assert np.array_equal(np.asarray(found.image), np.asarray(image.convert("RGB")))


def test_metadata_is_left_behind() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    found = picture(encoded(smooth(64, 64), "JPEG", exif=exif, comment=b"a secret place"))
    assert found.image.info == {}
    for format in ("JPEG", "WEBP"):
        assert b"secret" not in downsize(found, 64, format).data


# Refusals


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", Reason.EMPTY),
        (b"\0" * 100, Reason.NOT_AN_IMAGE),
        (b"<html><body>404 Not Found", Reason.NOT_AN_IMAGE),
        (b"a", Reason.NOT_AN_IMAGE),
        (encoded(smooth(64, 64), "BMP"), Reason.UNSUPPORTED_FORMAT),
        (encoded(smooth(64, 64), "TIFF"), Reason.UNSUPPORTED_FORMAT),
        (b"PK\3\4" + bytes(60), Reason.UNSUPPORTED_FORMAT),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(60), Reason.UNSUPPORTED_FORMAT),
        (b"\x1aE\xdf\xa3" + bytes(60), Reason.UNSUPPORTED_FORMAT),
        (b"RIFF\x40\0\0\0AVI LIST" + bytes(60), Reason.UNSUPPORTED_FORMAT),
        (encoded(smooth(64, 64), "JPEG")[:40], Reason.TRUNCATED),
        (encoded(smooth(64, 64), "PNG")[:20], Reason.TRUNCATED),
        (encoded(smooth(64, 64), "WEBP")[:20], Reason.TRUNCATED),
        (encoded(smooth(64, 64), "WEBP")[:-2], Reason.TRUNCATED),
        (encoded(smooth(64, 64), "GIF")[:12], Reason.TRUNCATED),
        (encoded(smooth(200, 100), "PNG"), Reason.TOO_MANY_PIXELS),
        (encoded(smooth(101, 10), "PNG"), Reason.TOO_ELONGATED),
        (encoded(smooth(9, 12), "PNG"), Reason.TOO_SMALL),
        (encoded(noisy(70, 70), "PNG"), Reason.TOO_MANY_BYTES),
    ],
)
def test_each_refusal_has_its_reason(data: bytes, expected: Reason) -> None:
    assert reason(data, Limits(max_bytes=12_500, max_pixels=15_000, max_aspect=10, min_side=10)) is expected


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF"])
def test_a_file_cut_in_the_middle_is_truncated(format: str) -> None:
    data = encoded(drawn(0, (100, 100)), format)
    cut = decode(data[: len(data) // 2], SMALL)
    assert isinstance(cut, Refused)
    assert cut.reason is Reason.TRUNCATED


def test_limits_are_inclusive() -> None:
    data = encoded(smooth(100, 10), "PNG")
    limits = Limits(max_bytes=len(data), max_pixels=1000, max_aspect=10, min_side=10)
    assert reason(data, limits) is None


def claiming(format: str, width: int, height: int) -> bytes:
    """A small file whose header claims this size."""
    if format == "PNG":
        return png(width, height, 8, 2, bytes(100))
    if format == "GIF":
        data = encoded(smooth(16, 16), "GIF")
        return data[:6] + struct.pack("<HH", width, height) + data[10:]
    if format == "WEBP":
        frame = encoded(smooth(16, 16), "WEBP")[12:]
        body = b"WEBPVP8X\x0a\0\0\0\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        return b"RIFF" + struct.pack("<I", len(body) + len(frame)) + body + frame
    data = encoded(smooth(16, 16), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize(
    ("format", "width", "height"),
    [("PNG", 60_000, 60_000), ("GIF", 65_535, 65_535), ("JPEG", 60_000, 60_000), ("WEBP", 1 << 24, 1 << 24)],
)
def test_a_bomb_is_refused_by_its_header(format: str, width: int, height: int) -> None:
    assert reason(claiming(format, width, height)) is Reason.TOO_MANY_PIXELS


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = encoded(smooth(64, 64), "JPEG", progressive=True)
    assert reason(data) is None
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    assert reason(data[:-2] + last_scan * 200 + data[-2:]) is Reason.TOO_MANY_SCANS


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
@pytest.mark.filterwarnings("ignore:Invalid APNG")
def test_no_bytes_raise(format: str, animated: bool) -> None:
    frames = {"save_all": True, "append_images": [smooth(64, 48)]} if animated and format != "JPEG" else {}
    exif = Image.Exif()
    exif[0x0112] = 6
    # An animated AVIF that is turned makes the encoder of libavif 1.3 crash, which is not ours to test.
    turned = {"exif": exif} if format != "GIF" and not (animated and format == "AVIF") else {}
    extras = turned | ({} if format == "GIF" else {"icc_profile": linear_profile()})
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


def test_the_running_build_names_itself() -> None:
    name, version = pillow_build().split()
    assert name in ("pillow", "pillow-simd")
    assert version == Image.__version__
