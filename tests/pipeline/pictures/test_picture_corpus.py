"""Broken and odd image files, each with its expected result. All are generated here."""

import gc
import io
import json
import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from pipeline.pictures.containers import RejectReason as Reason
from pipeline.pictures.crops import Crop, square_crop
from pipeline.pictures.decoder import DEFAULT_LIMITS, DecodeLimits, Header, Picture, Refused, decode, open_image

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
needs_littlecms = pytest.mark.skipif(
    not features.check("littlecms2"), reason="this Pillow was built without littlecms2"
)

SMALL = DecodeLimits(min_side=1)
TIGHT = DecodeLimits(max_bytes=12_500, max_pixels=15_000, max_aspect=10, min_side=10)

Rgb = tuple[int, int, int]
RED, LIME, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True)
class Shown:
    """A decoded picture: its format, its upright size, and the colours of some pixels (column, row)."""

    format: str
    size: tuple[int, int]
    pixels: dict[tuple[int, int], Rgb]
    notes: tuple[str, ...] = ()  # the beginning of each
    frames: int = 1
    within: int = 0  # tolerance of the colours, in levels of 255


@dataclass(frozen=True)
class InPixels:
    """Refused when the pixels are decoded; the header is good."""

    reason: Reason


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], bytes]
    expected: Shown | Reason | InPixels
    limits: DecodeLimits = SMALL
    marks: tuple[pytest.MarkDecorator, ...] = field(default=())


# Files built from their parts


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def halves(width: int = 64, height: int = 32, left: Rgb = RED, right: Rgb = BLUE) -> Image.Image:
    image = Image.new("RGB", (width, height), left)
    image.paste(right, (width // 2, 0, width, height))
    return image


def noisy(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


HALVES = {(0, 0): RED, (31, 31): RED, (32, 0): BLUE, (63, 31): BLUE}
JPEG_HALVES = Shown("JPEG", (64, 32), HALVES, within=5)
PNG_HALVES = Shown("PNG", (64, 32), HALVES)
WEBP_HALVES = Shown("WEBP", (64, 32), HALVES)


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def gamma(value: int) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", value))


def png(
    width: int, height: int, bits: int, colour: int, rows: bytes, *extra: bytes, after: bytes = b"", interlaced: int = 0
) -> bytes:
    """`extra` chunks come before the pixels, `after` follows them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + after + chunk(b"IEND")


def png_rows(row: bytes, height: int) -> bytes:
    return (b"\0" + row) * height


def plain_png(*extra: bytes, after: bytes = b"") -> bytes:
    """8 x 8 pixels of (10, 20, 30)."""
    return png(8, 8, 8, 2, png_rows(bytes([10, 20, 30]) * 8, 8), *extra, after=after)


PLAIN = Shown("PNG", (8, 8), {(0, 0): (10, 20, 30), (7, 7): (10, 20, 30)})


def noted(note: str) -> Shown:
    return Shown("PNG", (8, 8), PLAIN.pixels, notes=(note,))


def interlaced_png(image: Image.Image) -> bytes:
    """Adam7 (PNG, third edition, section 8.2)."""
    pixels_HWC = np.asarray(image)
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    parts = [pixels_HWC[y::down, x::across] for x, y, across, down in passes]
    rows = b"".join(b"\0" + row.tobytes() for part in parts for row in part)
    return png(*image.size, 8, 2, rows, interlaced=1)


def frame_control(number: int, width: int = 8, height: int = 8) -> bytes:
    return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, width, height, 0, 0, 1, 10, 0, 0))


def animation_control(frames: int) -> bytes:
    return chunk(b"acTL", struct.pack(">II", frames, 0))


def gif(width: int, height: int, *blocks: bytes) -> bytes:
    """A screen with the palette black, red, lime, blue."""
    palette = bytes(chain(BLACK, RED, LIME, BLUE))
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x81, 0, 0) + palette + b"".join(blocks) + b";"


def gif_image(width: int, height: int, index: int, x: int = 0, y: int = 0) -> bytes:
    """A rectangle of one colour. The code table is cleared before every pixel, so that codes stay at 3 bits."""
    bits = "".join(f"{code:03b}"[::-1] for code in [*([4, index] * (width * height)), 5])
    data = bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8))
    blocks = b"".join(bytes([len(data[at : at + 255])]) + data[at : at + 255] for at in range(0, len(data), 255))
    return b"," + struct.pack("<HHHHB", x, y, width, height, 0) + b"\2" + blocks + b"\0"


def gif_control(disposal: int = 0, transparent: int | None = None) -> bytes:
    return b"!\xf9\x04" + bytes([disposal << 2 | (transparent is not None), 5, 0, transparent or 0, 0])


def gif_comment(text: bytes) -> bytes:
    blocks = (text[at : at + 255] for at in range(0, len(text), 255))
    return b"!\xfe" + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def riff(*chunks: bytes, size: int | None = None) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def riff_chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def three_bytes(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(3, "little") for number in numbers)


def webp_canvas(width: int, height: int, flags: int = 0) -> bytes:
    return riff_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + three_bytes(width - 1, height - 1))


def webp_frame(image: Image.Image) -> bytes:
    return encoded(image, "WEBP", lossless=True)[12:]


def webp_animation(width: int, height: int, frames: Iterable[tuple[int, int, Image.Image]]) -> bytes:
    parts = [webp_canvas(width, height, flags=2), riff_chunk(b"ANIM", bytes([0, 0, 0, 255, 0, 0]))]
    for x, y, image in frames:
        place = three_bytes(x // 2, y // 2, image.width - 1, image.height - 1, 50) + b"\0"
        parts.append(riff_chunk(b"ANMF", place + webp_frame(image)))
    return riff(*parts)


def odd_webp(counted: bool = True) -> bytes:
    """An image in a chunk of odd length, with one byte of padding."""
    frame = webp_frame(flat((1, 2, 3), size=(8, 8)))
    body = frame[8 : 8 + struct.unpack_from("<I", frame, 4)[0]]
    body += bytes(1 - len(body) % 2)  # bytes after the last pixel are ignored
    return riff(riff_chunk(frame[:4], body), size=4 + 8 + len(body) + counted)


UNPADDED = Shown("WEBP", (8, 8), {(0, 0): (1, 2, 3), (7, 7): (1, 2, 3)}, notes=("ends without padding",))


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg(*segments: bytes, image: Image.Image | None = None, **options: Any) -> bytes:
    """A JPEG with these segments after its first marker."""
    data = encoded(halves() if image is None else image, "JPEG", **{"quality": 95, "subsampling": 0} | options)
    return data[:2] + b"".join(segments) + data[2:]


def jpeg_with_byte(marker: int, offset: int, value: int, **options: Any) -> bytes:
    """A JPEG with `value` at `offset` from the marker of a segment."""
    data = bytearray(jpeg(**options))
    data[data.index(bytes([0xFF, marker])) + offset] = value
    return bytes(data)


def many_scans(count: int, size: int = 64) -> bytes:
    data = encoded(halves(size, size), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def repeated_sequential_scan(count: int) -> bytes:
    """A sequential JPEG with one scan per component, and the last scan repeated."""
    data = encoded(Image.new("L", (64, 64), 90), "JPEG")
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    tables, head = data[2:frame], struct.pack(">BHHB", 8, 64, 64, 3) + b"\1\x11\0\2\x11\0\3\x11\0"
    pixels = data[scan + 10 : -2]
    scans = [jpeg_segment(0xDA, bytes([1, component, 0, 0, 63, 0])) + pixels for component in [1, 2, *[3] * count]]
    huffman = data[frame + 13 : scan]
    return data[:2] + tables + jpeg_segment(0xC0, head) + huffman + b"".join(scans) + b"\xff\xd9"


def tiff(orientation: int, order: str = "<") -> bytes:
    """The shortest EXIF block with an orientation."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(f"{order}IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def exif(orientation: int) -> bytes:
    return b"Exif\0\0" + tiff(orientation)


def broken_exif() -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 20


UPRIGHT = {(0, 0): RED, (31, 31): RED, (0, 32): BLUE, (31, 63): BLUE}  # halves() rotated by 90 degrees clockwise


def fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A version 2 monitor profile (ICC.1:2001-04)."""
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249),
        **tags,
    }
    table, body = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    size = 128 + len(table) + len(body)
    head = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02100000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp"
    return (head + bytes(28) + fixed(0.9642, 1.0, 0.8249)).ljust(128, b"\0") + table + body


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


# Columns: the red, green and blue primaries in XYZ under D50.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])


def rgb_profile(primaries: np.ndarray, gamma: float) -> bytes:
    columns = {name: b"XYZ \0\0\0\0" + fixed(*primaries[:, at]) for at, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return profile(b"RGB ", columns | {name: curve(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")})


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", {b"kTRC": curve(gamma)})


def in_srgb(colour: Rgb, primaries: np.ndarray, gamma: float) -> Rgb:
    """According to sRGB (IEC 61966-2-1), with colours outside its gamut clipped."""
    linear = (np.linalg.inv(SRGB) @ primaries @ (np.array(colour) / 255) ** gamma).clip(0, 1)
    values = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = (round(value) for value in (255 * values).tolist())
    return red, green, blue


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def with_profile(image: Image.Image, icc: bytes, format: str = "PNG") -> bytes:
    options: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    return encoded(image, format, icc_profile=icc, **options)


def flat(colour: Any, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new(mode, size, colour)


def one_colour(colour: Rgb, format: str = "PNG", notes: tuple[str, ...] = (), within: int = 0) -> Shown:
    return Shown(format, (8, 8), {(0, 0): colour, (7, 7): colour}, notes=notes, within=within)


def claiming(format: str, width: int, height: int) -> bytes:
    """A small file with a header that claims this size."""
    if format == "PNG":
        return png(width, height, 8, 2, bytes(100))
    if format == "GIF":
        return gif(width, height, gif_control(disposal=2), gif_image(16, 16, 1))
    if format == "WEBP":
        return riff(webp_canvas(width, height), webp_frame(flat(RED, size=(16, 16))))
    data = encoded(halves(), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def still_and_moved(format: str, **options: Any) -> bytes:
    frames = [flat(colour, size=(40, 40)) for colour in (RED, LIME, BLUE)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)


def palette_png(bits: int, *extra: bytes) -> bytes:
    """Every pixel has index 1 of the palette black, red, white."""
    row = {1: b"\xff", 2: b"\x55\x55", 4: b"\x11" * 4, 8: b"\1" * 8}[bits]
    return png(8, 8, bits, 3, png_rows(row, 8), chunk(b"PLTE", bytes(chain(BLACK, RED, WHITE))), *extra)


def half_transparent(mode: str, format: str, **options: Any) -> bytes:
    """Black of alpha 0, 128 and 255 in columns 0, 1 and 2."""
    image = flat((0,) * len(mode), mode)
    for column, alpha in enumerate((0, 128, 255)):
        image.paste((0,) * (len(mode) - 1) + (alpha,), (column, 0, column + 1, 8))
    return encoded(image, format, **options)


ON_WHITE = {(0, 0): WHITE, (1, 0): (127, 127, 127), (2, 0): BLACK, (7, 7): WHITE}


def cut(data: bytes, part: float) -> bytes:
    return data[: int(len(data) * part)]


def wrong_checksum(data: bytes, kind: bytes) -> bytes:
    at = data.index(kind)
    (length,) = struct.unpack_from(">I", data, at - 4)
    changed = bytearray(data)
    changed[at + 4 + length] ^= 0xFF
    return bytes(changed)


def compressed_text(kind: bytes, size: int) -> bytes:
    head = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[kind]
    return chunk(kind, head + zlib.compress(bytes(size)))


# The table

FORMATS = [
    Case("jpeg", lambda: jpeg(quality=100), Shown("JPEG", (64, 32), HALVES, within=3)),
    Case("jpeg, progressive", lambda: jpeg(progressive=True), JPEG_HALVES),
    Case("jpeg, grey", lambda: jpeg(image=flat(77, "L")), one_colour((77, 77, 77), "JPEG", within=1)),
    Case("jpeg that stores rgb", lambda: jpeg(image=flat(RED), keep_rgb=True), one_colour(RED, "JPEG", within=3)),
    Case("png", lambda: encoded(halves(), "PNG"), PNG_HALVES),
    Case("png, interlaced", lambda: interlaced_png(halves()), PNG_HALVES),
    Case(
        "webp, lossy", lambda: encoded(halves(), "WEBP", quality=100), Shown("WEBP", (64, 32), {(0, 0): RED}, within=6)
    ),
    Case("webp, lossless", lambda: encoded(halves(), "WEBP", lossless=True), WEBP_HALVES),
    Case("webp, extended", lambda: riff(webp_canvas(64, 32), webp_frame(halves())), WEBP_HALVES),
    Case("gif", lambda: gif(8, 8, gif_image(8, 8, 1)), one_colour(RED, "GIF")),
    Case("gif 87a", lambda: gif(8, 8, gif_image(8, 8, 1)).replace(b"89a", b"87a"), one_colour(RED, "GIF")),
    Case(
        "avif",
        lambda: encoded(halves(), "AVIF", quality=100, subsampling="4:4:4"),
        Shown("AVIF", (64, 32), HALVES, within=4),
        marks=(needs_avif,),
    ),
]

TURNS = [
    Case("jpeg, turned", lambda: jpeg(exif=exif(6)), Shown("JPEG", (32, 64), UPRIGHT, within=5)),
    Case("png, turned", lambda: encoded(halves(), "PNG", exif=exif(6)), Shown("PNG", (32, 64), UPRIGHT)),
    Case(
        "webp, turned", lambda: encoded(halves(), "WEBP", lossless=True, exif=exif(6)), Shown("WEBP", (32, 64), UPRIGHT)
    ),
    Case(
        "avif, turned",
        lambda: encoded(halves(), "AVIF", quality=100, subsampling="4:4:4", exif=exif(6)),
        Shown("AVIF", (32, 64), UPRIGHT, within=4),
        marks=(needs_avif,),
    ),
    Case(
        "png, turned by EXIF behind the pixels",
        lambda: png(2, 1, 8, 2, b"\0" + bytes(chain(RED, BLUE)), after=chunk(b"eXIf", tiff(6, ">"))),
        Shown("PNG", (1, 2), {(0, 0): RED, (0, 1): BLUE}),
        DecodeLimits(min_side=1),
    ),
    Case("EXIF with an orientation of 9", lambda: jpeg(exif=exif(9)), JPEG_HALVES),
    Case(
        "EXIF that breaks off",
        lambda: jpeg(exif=broken_exif()),
        Shown("JPEG", (64, 32), HALVES, notes=("EXIF ignored",), within=5),
    ),
    Case(
        "avif with EXIF that breaks off",
        lambda: encoded(flat(RED), "AVIF", exif=b"Exif\0\0" + tiff(1)).replace(
            tiff(1), b"II*\0\xff\xff\0\0" + tiff(1)[8:]
        ),
        one_colour(RED, "AVIF", within=4),
        marks=(needs_avif,),
    ),
    Case(
        "EXIF of 64 KB with the end of a picture in it",
        lambda: jpeg(jpeg_segment(0xE1, exif(6) + b"\xff\xd8\xff\xda\0\2\xff\xd9" * 8000)),
        Shown("JPEG", (32, 64), UPRIGHT, within=5),
    ),
    Case("a hundred APP1 of 64 KB", lambda: jpeg(jpeg_segment(0xE1, bytes(65_000)) * 100), JPEG_HALVES),
    Case("a thousand comments", lambda: jpeg(jpeg_segment(0xFE, b"\xff\xd9") * 1000), JPEG_HALVES),
]

ALPHA = [
    Case("RGBA png", lambda: half_transparent("RGBA", "PNG"), Shown("PNG", (8, 8), ON_WHITE, within=1)),
    Case("LA png", lambda: half_transparent("LA", "PNG"), Shown("PNG", (8, 8), ON_WHITE, within=1)),
    Case(
        "RGBA webp",
        lambda: half_transparent("RGBA", "WEBP", lossless=True, exact=True),
        Shown("WEBP", (8, 8), ON_WHITE, within=1),
    ),
    Case(
        "RGBA avif",
        lambda: half_transparent("RGBA", "AVIF", quality=100),
        Shown("AVIF", (8, 8), ON_WHITE, within=4),
        marks=(needs_avif,),
    ),
    Case("palette png, one entry transparent", lambda: palette_png(8, chunk(b"tRNS", b"\xff\0")), one_colour(WHITE)),
    Case(
        "palette png, one entry half transparent",
        lambda: palette_png(8, chunk(b"tRNS", b"\0\x80")),
        one_colour((255, 127, 127), within=1),
    ),
    Case(
        "png with a transparent colour",
        lambda: plain_png(chunk(b"tRNS", struct.pack(">HHH", 10, 20, 30))),
        one_colour(WHITE),
    ),
    Case(
        "png with another transparent colour", lambda: plain_png(chunk(b"tRNS", struct.pack(">HHH", 10, 20, 31))), PLAIN
    ),
    Case(
        "16-bit png with a transparent colour",
        lambda: png(1, 1, 16, 2, b"\0\x12\x34\x56\x78\x9a\xbc", chunk(b"tRNS", b"\x12\x34\x56\x78\x9a\xbc")),
        Shown("PNG", (1, 1), {(0, 0): WHITE}),
    ),
    Case(
        "2-bit grey with a transparent level",
        lambda: png(4, 1, 2, 0, b"\0\x1b", chunk(b"tRNS", b"\0\1")),
        Shown("PNG", (4, 1), {(0, 0): BLACK, (1, 0): WHITE, (2, 0): (170,) * 3, (3, 0): WHITE}),
    ),
    Case(
        "16-bit grey with a transparent level",
        lambda: png(2, 1, 16, 0, b"\0\x12\x34\x12\x35", chunk(b"tRNS", b"\x12\x34")),
        Shown("PNG", (2, 1), {(0, 0): WHITE, (1, 0): (0x12,) * 3}),
    ),
    Case(
        "gif with a transparent colour",
        lambda: gif(8, 8, gif_control(transparent=1), gif_image(8, 8, 1)),
        one_colour(WHITE, "GIF"),
    ),
    Case(
        "gif whose transparent colour is another",
        lambda: gif(8, 8, gif_control(transparent=2), gif_image(8, 8, 1)),
        one_colour(RED, "GIF"),
    ),
]

GREY = (0, 85, 170, 255)
DEPTHS = [
    Case("1-bit grey", lambda: png(8, 1, 1, 0, b"\0\x0f"), Shown("PNG", (8, 1), {(0, 0): BLACK, (7, 0): WHITE})),
    Case(
        "2-bit grey",
        lambda: png(4, 1, 2, 0, b"\0\x1b"),
        Shown("PNG", (4, 1), {(x, 0): (level,) * 3 for x, level in enumerate(GREY)}),
    ),
    Case(
        "4-bit grey",
        lambda: png(4, 1, 4, 0, b"\0\x05\xaf"),
        Shown("PNG", (4, 1), {(x, 0): (level,) * 3 for x, level in enumerate(GREY)}),
    ),
    Case(
        "8-bit grey",
        lambda: png(4, 1, 8, 0, b"\0" + bytes(GREY)),
        Shown("PNG", (4, 1), {(x, 0): (level,) * 3 for x, level in enumerate(GREY)}),
    ),
    Case(
        "16-bit grey",
        lambda: png(4, 1, 16, 0, b"\0" + b"".join(bytes([level, 7]) for level in GREY)),
        Shown("PNG", (4, 1), {(x, 0): (level,) * 3 for x, level in enumerate(GREY)}),
    ),
    Case(
        "16-bit rgb",
        lambda: png(1, 1, 16, 2, b"\0\x0a\xff\x14\xff\x1e\xff"),
        Shown("PNG", (1, 1), {(0, 0): (10, 20, 30)}),
    ),
    Case(
        "16-bit rgba",
        lambda: png(2, 1, 16, 6, b"\0\x0a\xff\x14\xff\x1e\xff\xff\xff" + bytes(8)),
        Shown("PNG", (2, 1), {(0, 0): (10, 20, 30), (1, 0): WHITE}),
    ),
    Case(
        "16-bit grey and alpha",
        lambda: png(2, 1, 16, 4, b"\0\x0a\xff\xff\xff" + bytes(4)),
        Shown("PNG", (2, 1), {(0, 0): (10,) * 3, (1, 0): WHITE}),
    ),
    *(Case(f"{bits}-bit palette", lambda bits=bits: palette_png(bits), one_colour(RED)) for bits in (1, 2, 4, 8)),
    Case(
        "an index outside of the palette",
        lambda: png(1, 1, 8, 3, b"\0\x09", chunk(b"PLTE", bytes(RED))),
        Shown("PNG", (1, 1), {(0, 0): BLACK}),
    ),
    Case("a palette png without a palette", lambda: png(1, 1, 8, 3, b"\0\0"), Reason.DECODE_FAILED),
    Case("12-bit jpeg", lambda: jpeg_with_byte(0xC0, 4, 12), Reason.DECODE_FAILED),
    Case("hierarchical jpeg", lambda: jpeg_with_byte(0xC0, 1, 0xC5), InPixels(Reason.DECODE_FAILED)),
    Case("jpeg of two components", lambda: jpeg_with_byte(0xC0, 9, 2), Reason.DECODE_FAILED),
    Case(
        "cmyk jpeg of Adobe's",
        lambda: jpeg(image=flat((255, 0, 0, 0), "CMYK"), quality=100),
        one_colour((0, 255, 255), "JPEG", within=2),
    ),
    Case(
        "cmyk jpeg without Adobe's mark",
        lambda: jpeg_with_byte(0xEE, 1, 0xED, image=flat((255, 0, 0, 0), "CMYK"), quality=100),
        one_colour(BLACK, "JPEG", within=2),
    ),
    # Cyan is read as brightness; magenta and yellow, in the middle of their range, as colourless.
    Case(
        "ycck jpeg",
        lambda: jpeg_with_byte(0xEE, 15, 2, image=flat((60, 127, 127, 0), "CMYK"), quality=100),
        one_colour((60, 60, 60), "JPEG", within=2),
    ),
]

COLOUR: Rgb = (200, 100, 50)
PROFILES = [
    Case(
        "linear profile",
        lambda: with_profile(flat(COLOUR), rgb_profile(SRGB, 1)),
        one_colour(in_srgb(COLOUR, SRGB, 1), within=2),
    ),
    *(
        Case(
            f"{format}, Display P3",
            lambda format=format: with_profile(flat(COLOUR), rgb_profile(DISPLAY_P3, 2.2), format),
            one_colour(in_srgb(COLOUR, DISPLAY_P3, 2.2), format, within=4),
        )
        for format in ("PNG", "JPEG", "WEBP")
    ),
    Case("sRGB profile", lambda: with_profile(flat(COLOUR), srgb_profile()), one_colour(COLOUR)),
    Case(
        "grey profile",
        lambda: with_profile(flat(100, "L"), grey_profile(1)),
        one_colour(in_srgb((100,) * 3, SRGB, 1), within=2),
    ),
    Case(
        "profile under alpha",
        lambda: with_profile(flat((*COLOUR, 255), "RGBA"), rgb_profile(SRGB, 1)),
        one_colour(in_srgb(COLOUR, SRGB, 1), within=2),
    ),
    Case(
        "profile of another mode",
        lambda: with_profile(flat(100, "L"), rgb_profile(SRGB, 1)),
        one_colour((100,) * 3, notes=("colour profile ignored: it describes RGB",)),
    ),
    Case(
        "profile that is nonsense",
        lambda: with_profile(flat(COLOUR), b"nonsense" * 40),
        one_colour(COLOUR, notes=("colour profile ignored",)),
    ),
    Case(
        "profile that breaks off",
        lambda: with_profile(flat(COLOUR), cut(rgb_profile(SRGB, 1), 0.5)),
        one_colour(COLOUR, notes=("colour profile ignored",)),
    ),
    Case(
        "profile of 5 MB",
        lambda: with_profile(flat(COLOUR), rgb_profile(SRGB, 1) + bytes(5 << 20)),
        one_colour(COLOUR, notes=("colour profile ignored: over",)),
    ),
    Case(
        "profile not compressed as png wants",
        lambda: plain_png(chunk(b"iCCP", b"name\0\0nonsense")),
        noted("colour profile ignored"),
    ),
    Case("png of linear light", lambda: plain_png(gamma(100_000)), noted("gamma ignored: 1")),
    Case("png with the gamma of sRGB", lambda: plain_png(gamma(45_455)), PLAIN),
    Case("png with another gamma and sRGB", lambda: plain_png(gamma(100_000), chunk(b"sRGB", b"\0")), PLAIN),
    Case(
        "png in the colours of HDR video",
        lambda: plain_png(chunk(b"cICP", bytes([9, 16, 0, 1]))),
        noted("colours ignored: cICP 9 16 0 1"),
    ),
    Case("png whose cICP says sRGB", lambda: plain_png(chunk(b"cICP", bytes([1, 13, 0, 1]))), PLAIN),
    Case(
        "jpeg without the second part of its profile",
        lambda: jpeg(jpeg_segment(0xE2, b"ICC_PROFILE\0\1\2" + rgb_profile(SRGB, 1))),
        Shown("JPEG", (64, 32), HALVES, notes=("colour profile ignored: 1 of 2",), within=5),
    ),
    Case(
        "jpeg with a profile of no parts",
        lambda: jpeg(jpeg_segment(0xE2, b"ICC_PROFILE\0")),
        Shown("JPEG", (64, 32), HALVES, notes=("colour profile ignored: 0 of 0",), within=5),
    ),
]

ANIMATIONS = [
    Case(
        "animated gif", lambda: still_and_moved("GIF"), Shown("GIF", (40, 40), {(0, 0): RED, (39, 39): RED}, frames=3)
    ),
    Case(
        "animated png", lambda: still_and_moved("PNG"), Shown("PNG", (40, 40), {(0, 0): RED, (39, 39): RED}, frames=3)
    ),
    Case(
        "animated webp",
        lambda: still_and_moved("WEBP", lossless=True),
        Shown("WEBP", (40, 40), {(0, 0): RED, (39, 39): RED}, frames=3),
    ),
    Case(
        "animated avif",
        lambda: still_and_moved("AVIF", quality=100),
        Shown("AVIF", (40, 40), {(0, 0): RED}, frames=3, within=4),
        marks=(needs_avif,),
    ),
    Case(
        "gif whose first frame is small",
        lambda: gif(16, 16, gif_image(8, 8, 1, x=4, y=4)),
        Shown("GIF", (16, 16), {(3, 3): WHITE, (4, 4): RED, (11, 11): RED, (12, 12): WHITE}),
    ),
    Case(
        "gif whose first frame is small and restored",
        lambda: gif(16, 16, gif_control(disposal=3, transparent=2), gif_image(8, 8, 1, x=4, y=4), gif_image(16, 16, 3)),
        Shown("GIF", (16, 16), {(3, 3): WHITE, (4, 4): RED, (12, 12): WHITE}, frames=2),
    ),
    Case(
        "gif whose first frame is disposed of",
        lambda: gif(8, 8, gif_control(disposal=2), gif_image(8, 8, 1), gif_image(8, 8, 3)),
        Shown("GIF", (8, 8), {(0, 0): RED, (7, 7): RED}, frames=2),
    ),
    Case(
        "gif whose first frame is larger than the screen", lambda: gif(4, 4, gif_image(8, 8, 1)), one_colour(RED, "GIF")
    ),
    Case(
        "gif whose second frame is cut",
        lambda: gif(8, 8, gif_image(8, 8, 1), gif_image(8, 8, 3))[:-20],
        Shown("GIF", (8, 8), {(0, 0): RED, (7, 7): RED}, frames=2),
    ),
    Case("gif without frames", lambda: gif(8, 8), Reason.DECODE_FAILED),
    Case("gif of a comment", lambda: gif(8, 8, gif_comment(b"nothing to see")), Reason.DECODE_FAILED),
    Case("gif with a frame of no size", lambda: gif(8, 8, gif_image(0, 0, 1)), Reason.DECODE_FAILED),
    Case(
        "webp whose first frame is small",
        lambda: webp_animation(16, 16, [(4, 4, flat(RED)), (0, 0, flat(BLUE))]),
        Shown("WEBP", (16, 16), {(3, 3): WHITE, (4, 4): RED, (12, 12): WHITE}, frames=2),
    ),
    Case(
        "png animated around its picture",
        lambda: plain_png(
            animation_control(2),
            after=b"".join(
                frame_control(2 * n) + chunk(b"fdAT", struct.pack(">I", 2 * n + 1) + zlib.compress(bytes(200)))
                for n in (0, 1)
            ),
        ),
        Shown("PNG", (8, 8), PLAIN.pixels, frames=3),
    ),
    Case("png said to be animated twice", lambda: plain_png(animation_control(2) * 2, frame_control(0)), PLAIN),
    Case("png animated by no frames", lambda: plain_png(animation_control(0)), PLAIN),
    Case("png animated in the wrong order", lambda: plain_png(animation_control(2), frame_control(7, 99, 99)), PLAIN),
    Case(
        "mpo",
        lambda: encoded(halves(), "MPO", save_all=True, append_images=[flat(LIME)], quality=95, subsampling=0),
        JPEG_HALVES,
    ),
]

ODD = [
    Case("jpeg with trailing junk", lambda: jpeg() + noisy(64, 64).tobytes(), JPEG_HALVES),
    Case(
        "jpeg with markers of scans in trailing junk", lambda: jpeg(progressive=True) + b"\xff\xda" * 200, JPEG_HALVES
    ),
    Case("jpeg with leading junk", lambda: b"\r\n" + jpeg(), Reason.NOT_AN_IMAGE),
    Case("jpeg with junk behind its first marker", lambda: jpeg(b"\xff\xff\xff\0junk\0"), JPEG_HALVES),
    Case("jpeg with a short mark of Adobe's", lambda: jpeg(jpeg_segment(0xEE, b"Adobe")), JPEG_HALVES),
    Case("jpeg of one row", lambda: jpeg(image=flat(RED, size=(8, 1))), Shown("JPEG", (8, 1), {(0, 0): RED}, within=3)),
    Case("jpeg without rows", lambda: claiming("JPEG", 64, 0), Reason.DECODE_FAILED),
    Case("jpeg without pixels", lambda: b"\xff\xd8\xff\xd9", Reason.TRUNCATED),
    Case(
        "png with a wrong checksum of a text",
        lambda: wrong_checksum(plain_png(chunk(b"tEXt", b"a\0b")), b"tEXt"),
        PLAIN,
    ),
    Case(
        "png with a wrong checksum of the header",
        lambda: wrong_checksum(plain_png(), b"IHDR"),
        Reason.DECODE_FAILED,
    ),
    Case(
        "png with a wrong checksum of the palette",
        lambda: wrong_checksum(palette_png(8), b"PLTE"),
        Reason.DECODE_FAILED,
    ),
    Case("png with a wrong checksum of good pixels", lambda: wrong_checksum(plain_png(), b"IDAT"), PLAIN),
    Case(
        "png with changed pixels",
        lambda: plain_png().replace(zlib.compress(png_rows(bytes([10, 20, 30]) * 8, 8))[:8], b"\x78\x9c" + b"\xff" * 6),
        InPixels(Reason.DECODE_FAILED),
    ),
    Case("png without an end", lambda: plain_png()[:-12], noted("ends without IEND")),
    Case(
        "png with junk for a chunk behind the pixels", lambda: plain_png(after=b"\xff" * 30), noted("ends without IEND")
    ),
    Case("png with trailing junk", lambda: plain_png() + b"junk" * 100, PLAIN),
    Case("png whose pixels are in many chunks", lambda: plain_png(chunk(b"IDAT") * 1000), PLAIN),
    Case("png with a text between its pixels", lambda: plain_png(chunk(b"IDAT") + chunk(b"tEXt", b"a\0b")), PLAIN),
    Case("png with a text called transparency", lambda: plain_png(chunk(b"tEXt", b"transparency\0yes")), PLAIN),
    Case("png with a text called interlace", lambda: plain_png(chunk(b"tEXt", b"interlace\0yes")), PLAIN),
    Case("png with a text called icc_profile", lambda: plain_png(chunk(b"tEXt", b"icc_profile\0yes")), PLAIN),
    Case("png with a bomb of a text", lambda: plain_png(compressed_text(b"zTXt", 50_000_000)), PLAIN),
    Case(
        "png with a bomb of a text behind the pixels",
        lambda: plain_png(after=compressed_text(b"iTXt", 50_000_000)),
        PLAIN,
    ),
    Case(
        "png with a bomb of a profile",
        lambda: plain_png(compressed_text(b"iCCP", 50_000_000)),
        noted("colour profile ignored: over"),
    ),
    Case("png without width", lambda: png(0, 8, 8, 2, bytes(8)), Reason.DECODE_FAILED),
    Case(
        "png of no pixels",
        lambda: b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)) + chunk(b"IEND"),
        Reason.TRUNCATED,
    ),
    # Known weakness: Pillow does not notice that the compressed rows end early if they end properly.
    Case(
        "png with too few rows",
        lambda: png(8, 8, 8, 0, png_rows(b"\xff" * 8, 5)),
        Shown("PNG", (8, 8), {(0, 4): WHITE, (0, 5): BLACK}),
    ),
    Case("png with too many rows", lambda: png(8, 8, 8, 2, png_rows(bytes([10, 20, 30]) * 8, 20_000)), PLAIN),
    Case("png of 3 bits", lambda: png(8, 8, 3, 0, bytes(40)), Reason.DECODE_FAILED),
    Case(
        "png with a short header",
        lambda: b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(4)) + chunk(b"IDAT") + chunk(b"IEND"),
        Reason.TRUNCATED,
    ),
    Case("webp without its padding", lambda: odd_webp()[:-1], UNPADDED),
    Case("webp whose padding is not counted", lambda: odd_webp(counted=False), UNPADDED),
    Case("webp whose padding is neither there nor counted", lambda: odd_webp(counted=False)[:-1], UNPADDED),
    Case("webp that needs padding and has it", lambda: odd_webp(), replace(UNPADDED, notes=())),
    Case("webp with a stray byte inside", lambda: riff(webp_frame(halves()) + b"x"), Reason.DECODE_FAILED),
    Case("webp with trailing junk", lambda: riff(webp_frame(halves())) + b"junk" * 100, WEBP_HALVES),
    Case("webp that claims to be longer", lambda: riff(webp_frame(halves()), size=10_000), Reason.TRUNCATED),
    Case(
        "webp whose canvas is not its picture",
        lambda: riff(webp_canvas(100, 100), webp_frame(halves())),
        Reason.DECODE_FAILED,
    ),
    Case(
        "webp without a picture",
        lambda: riff(webp_canvas(100, 100), riff_chunk(b"EXIF", tiff(1))),
        Reason.DECODE_FAILED,
    ),
]

REFUSED = [
    Case("nothing", lambda: b"", Reason.EMPTY),
    Case("one byte", lambda: b"a", Reason.NOT_AN_IMAGE),
    Case("zeros", lambda: bytes(100), Reason.NOT_AN_IMAGE),
    Case("html", lambda: b"<html><body>404 Not Found", Reason.NOT_AN_IMAGE),
    Case("text", lambda: b"Just some words about a picture", Reason.NOT_AN_IMAGE),
    Case("svg", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', Reason.UNSUPPORTED_FORMAT),
    Case("zip", lambda: b"PK\3\4" + bytes(60), Reason.UNSUPPORTED_FORMAT),
    Case("mp4", lambda: b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(60), Reason.UNSUPPORTED_FORMAT),
    Case("heic", lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60), Reason.UNSUPPORTED_FORMAT),
    Case("webm", lambda: b"\x1aE\xdf\xa3" + bytes(60), Reason.UNSUPPORTED_FORMAT),
    Case("avi", lambda: b"RIFF\x40\0\0\0AVI LIST" + bytes(60), Reason.UNSUPPORTED_FORMAT),
    Case("bmp", lambda: encoded(halves(), "BMP"), Reason.UNSUPPORTED_FORMAT),
    Case("tiff", lambda: encoded(halves(), "TIFF"), Reason.UNSUPPORTED_FORMAT),
    Case("jpeg cut in its tables", lambda: jpeg()[:40], Reason.TRUNCATED),
    Case("jpeg cut in its pixels", lambda: cut(jpeg(image=noisy(64, 64)), 0.6), InPixels(Reason.TRUNCATED)),
    Case(
        "progressive jpeg cut in its pixels",
        lambda: cut(jpeg(image=noisy(64, 64), progressive=True), 0.6),
        InPixels(Reason.TRUNCATED),
    ),
    Case("png cut in its header", lambda: plain_png()[:20], Reason.TRUNCATED),
    Case("png cut in the checksum of its header", lambda: plain_png()[:31], Reason.TRUNCATED),
    Case("png cut in its pixels", lambda: cut(encoded(noisy(64, 64), "PNG"), 0.6), InPixels(Reason.TRUNCATED)),
    Case("gif cut in its screen", lambda: gif(8, 8)[:12], Reason.TRUNCATED),
    Case("gif cut in its palette", lambda: gif(8, 8)[:20], Reason.TRUNCATED),
    Case(
        "gif cut in its first frame",
        lambda: cut(gif(32, 32, gif_image(32, 32, 1)), 0.6),
        InPixels(Reason.TRUNCATED),
    ),
    Case("webp cut in its header", lambda: encoded(halves(), "WEBP")[:20], Reason.TRUNCATED),
    Case("webp cut at its end", lambda: encoded(halves(), "WEBP")[:-2], Reason.TRUNCATED),
    Case("avif cut in its header", lambda: encoded(halves(), "AVIF")[:60], Reason.TRUNCATED, marks=(needs_avif,)),
    Case(
        "png called webp by its first bytes",
        lambda: b"RIFF" + struct.pack("<I", 100) + b"WEBP" + plain_png() + bytes(60),
        Reason.TOO_ELONGATED,
    ),
    Case(
        "gif called jpeg by its first bytes",
        lambda: b"\xff\xd8\xff" + gif(8, 8, gif_image(8, 8, 1)),
        Reason.TRUNCATED,
    ),
]

LIMITS = [
    Case("the last allowed byte", lambda: plain_png(), PLAIN, DecodeLimits(min_side=8, max_bytes=len(plain_png()))),
    Case(
        "one byte too many",
        lambda: plain_png(),
        Reason.TOO_MANY_BYTES,
        DecodeLimits(min_side=8, max_bytes=len(plain_png()) - 1),
    ),
    Case("the last allowed pixel", lambda: plain_png(), PLAIN, DecodeLimits(min_side=8, max_pixels=64)),
    Case("one pixel too many", lambda: plain_png(), Reason.TOO_MANY_PIXELS, DecodeLimits(min_side=8, max_pixels=63)),
    Case("ten to one", lambda: png(10, 1, 8, 0, bytes(11)), Shown("PNG", (10, 1), {(0, 0): BLACK})),
    Case("eleven to one", lambda: png(11, 1, 8, 0, bytes(12)), Reason.TOO_ELONGATED),
    Case("one to eleven", lambda: png(1, 11, 8, 0, bytes(22)), Reason.TOO_ELONGATED),
    Case("a line of 50,000 pixels", lambda: png(50_000, 1, 8, 0, bytes(50_001)), Reason.TOO_ELONGATED),
    Case("the shortest allowed side", lambda: plain_png(), PLAIN, DecodeLimits(min_side=8)),
    Case("one pixel too short", lambda: plain_png(), Reason.TOO_SMALL, DecodeLimits(min_side=9)),
    Case("too many bytes of noise", lambda: encoded(noisy(70, 70), "PNG"), Reason.TOO_MANY_BYTES, TIGHT),
    Case("png bomb", lambda: claiming("PNG", 60_000, 60_000), Reason.TOO_MANY_PIXELS),
    Case("largest png bomb", lambda: claiming("PNG", 2**32 - 1, 2**32 - 1), Reason.TOO_MANY_PIXELS),
    Case("gif bomb", lambda: claiming("GIF", 65_535, 65_535), Reason.TOO_MANY_PIXELS),
    Case(
        "gif bomb in its first frame",
        lambda: gif(
            8,
            8,
            gif_control(disposal=2),
            gif_image(8, 8, 1).replace(struct.pack("<HH", 8, 8), struct.pack("<HH", 65_535, 65_535)),
        ),
        Reason.TOO_MANY_PIXELS,
    ),
    Case(
        "gif of more pixels than Pillow likes",
        lambda: gif(
            8,
            8,
            gif_control(disposal=2),
            gif_image(8, 8, 1).replace(struct.pack("<HH", 8, 8), struct.pack("<HH", 13_000, 13_000)),
        ),
        Reason.TOO_MANY_PIXELS,
    ),
    Case("jpeg bomb", lambda: claiming("JPEG", 60_000, 60_000), Reason.TOO_MANY_PIXELS),
    Case("webp bomb", lambda: claiming("WEBP", 1 << 24, 1 << 24), Reason.TOO_MANY_PIXELS),
    Case(
        "lossy webp bomb",
        lambda: encoded(halves(), "WEBP")[:26] + struct.pack("<HH", 16_383, 16_383) + encoded(halves(), "WEBP")[30:],
        Reason.TOO_MANY_PIXELS,
    ),
    Case(
        "jpeg of a hundred scans",
        lambda: many_scans(90),
        Shown("JPEG", (64, 64), {(0, 0): RED, (63, 63): BLUE}, within=6),
    ),
    Case("jpeg of endless scans", lambda: many_scans(200), Reason.TOO_MANY_SCANS),
    Case("sequential jpeg of three scans", lambda: repeated_sequential_scan(1), Shown("JPEG", (64, 64), {})),
    Case("sequential jpeg of endless scans", lambda: repeated_sequential_scan(200), Reason.TOO_MANY_SCANS),
]

# Each makes Pillow's own parser work for seconds or allocate unbounded memory.
BOMBS = [
    Case("jpeg of comments", lambda: jpeg(jpeg_segment(0xFE, b"") * 500_000), Reason.TOO_FRAGMENTED),
    Case(
        "jpeg of frame headers",
        lambda: jpeg(jpeg_segment(0xC0, struct.pack(">BHHB", 8, 8, 8, 3) + b"\1\x11\0" * 21_000) * 100),
        Reason.TOO_FRAGMENTED,
    ),
    Case(
        "jpeg of quantization tables",
        lambda: jpeg(jpeg_segment(0xDB, (b"\0" + b"\1" * 64) * 1000) * 100),
        Reason.TOO_FRAGMENTED,
    ),
    Case("jpeg of fill bytes", lambda: jpeg(b"\xff" * 8_000_000 + b"\0"), JPEG_HALVES),
    Case("jpeg of junk", lambda: jpeg(b"\xff" + b"\0" * 8_000_000), JPEG_HALVES),
    Case("png of chunks", lambda: plain_png(chunk(b"teST") * 500_000), Reason.TOO_FRAGMENTED),
    Case(
        "png of chunks behind the pixels",
        lambda: plain_png(after=chunk(b"teST") * 500_000),
        Reason.TOO_FRAGMENTED,
    ),
    Case("png of empty pixels", lambda: plain_png(chunk(b"IDAT") * 500_000), Reason.TOO_FRAGMENTED),
    Case("png of texts", lambda: plain_png(compressed_text(b"zTXt", 1_000_000) * 200), PLAIN),
    Case(
        "png of frames",
        lambda: plain_png(animation_control(90_000), *[frame_control(0)] * 90_000),
        Shown("PNG", (8, 8), PLAIN.pixels, frames=90_000),
    ),
    Case("gif of comments", lambda: gif(8, 8, b"!\xfe\0" * 1_000_000, gif_image(8, 8, 1)), Reason.TOO_FRAGMENTED),
    Case(
        "gif of one comment",
        lambda: gif(8, 8, gif_comment(bytes(8_000_000)), gif_image(8, 8, 1)),
        one_colour(RED, "GIF"),
    ),
    Case(
        "gif of single bytes",
        lambda: gif(8, 8, b"!\xfe" + b"\1a" * 4_000_000 + b"\0", gif_image(8, 8, 1)),
        Reason.TOO_FRAGMENTED,
    ),
    Case(
        "gif of frames",
        lambda: gif(64, 64, *[gif_image(64, 64, 1)] * 5_000),
        Shown("GIF", (64, 64), {(0, 0): RED}, frames=5_000),
    ),
    Case(
        "webp of frames",
        lambda: webp_animation(64, 64, [(0, 0, flat(RED))] * 5_000),
        Shown("WEBP", (64, 64), {(0, 0): RED}, frames=5_000),
    ),
    Case(
        "avif of frames",
        lambda: encoded(
            flat(RED, size=(64, 64)), "AVIF", save_all=True, append_images=[flat(RED, size=(64, 64))] * 99, speed=10
        ),
        Shown("AVIF", (64, 64), {(0, 0): RED}, frames=100, within=4),
        marks=(needs_avif,),
    ),
]

PROFILES = [replace(case, marks=(needs_littlecms,)) for case in PROFILES]
CORPUS = [*FORMATS, *TURNS, *ALPHA, *DEPTHS, *PROFILES, *ANIMATIONS, *ODD, *REFUSED, *LIMITS, *BOMBS]


def inspect(data: bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> Header | Refused:
    opened = open_image(data, limits)
    return opened if isinstance(opened, Refused) else opened.header


def can_run(case: Case) -> bool:
    return not any(mark.args[0] for mark in case.marks)


def parameters(cases: Iterable[Case]) -> list[Any]:
    return [pytest.param(case, id=case.name, marks=case.marks) for case in cases]


def test_case_names_are_unique() -> None:
    assert len({case.name for case in CORPUS}) == len(CORPUS) >= 150


@pytest.fixture
def _no_collection() -> Iterator[None]:
    """Garbage of other tests could warn if it were collected while a picture is decoded."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize("case", parameters(CORPUS))
def test_a_file_gives_the_expected_picture_or_reason(case: Case) -> None:
    """Header, picture and crop agree; nothing raises or warns."""
    data = case.make()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        header, picture = inspect(data, case.limits), decode(data, case.limits)
        side = min(picture.image.size) if isinstance(picture, Picture) else 1
        crop = square_crop(data, side, 0, 0, case.limits)
    assert not warned, [str(warning.message) for warning in warned]
    if isinstance(case.expected, Shown):
        assert isinstance(header, Header), header
        assert isinstance(picture, Picture), picture
        assert isinstance(crop, Crop), crop
        assert_shown(case.expected, header, picture, crop)
        return
    only_pixels = isinstance(case.expected, InPixels)
    reason = case.expected.reason if isinstance(case.expected, InPixels) else case.expected
    for answer in (picture, crop) if only_pixels else (header, picture, crop):
        assert isinstance(answer, Refused), answer
        assert answer.reason is reason, answer
        assert answer.detail == " ".join(answer.detail.split())
    assert not only_pixels or isinstance(header, Header), header


def assert_shown(expected: Shown, header: Header, picture: Picture, crop: Crop) -> None:
    found = picture.header
    assert (found.format, (found.width, found.height), found.frames) == (
        expected.format,
        expected.size,
        expected.frames,
    )
    assert (header.format, header.width, header.height, header.frames) == (
        found.format,
        found.width,
        found.height,
        found.frames,
    )
    assert set(header.notes) <= set(found.notes)
    assert len(found.notes) == len(expected.notes), found.notes
    for note, beginning in zip(found.notes, expected.notes, strict=True):
        assert note.startswith(beginning)
    assert picture.image.mode == "RGB"
    assert picture.image.size == expected.size
    pixels_HWC = np.asarray(picture.image).astype(int)
    for (x, y), colour in expected.pixels.items():
        np.testing.assert_allclose(pixels_HWC[y, x], colour, atol=expected.within, err_msg=f"column {x}, row {y}")
    # The crop is not resized, so its pixels are the picture's.
    side = min(expected.size)
    assert np.array_equal(crop.pixels_HWC, pixels_HWC[:side, :side])


def test_threads_decode_the_corpus_like_one_thread_and_do_not_warn() -> None:
    """Warning filters are process-wide: the decoder must not set them, not even for a moment."""
    files = [(case.make(), case.limits) for case in CORPUS if case not in BOMBS and can_run(case)]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        alone = [outcome(decode(*file)) for file in files]
        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(lambda file: outcome(decode(*file)), files))
    assert alone == together
    assert not warned


def outcome(answer: Picture | Refused) -> tuple[Any, ...]:
    return (answer.header, answer.image.tobytes()) if isinstance(answer, Picture) else (answer.reason, answer.detail)


def test_ninety_five_megapixels_are_within_the_limit_and_do_not_warn() -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert inspect(claiming("PNG", 10_000, 9_500)) == Header(format="PNG", width=10_000, height=9_500, frames=1)
        assert inspect(claiming("GIF", 10_000, 9_500)) == Header(format="GIF", width=10_000, height=9_500, frames=1)
    assert not warned


# Bounds. A process forked for each file reports how much memory and processor time it took.

MEASURE = """
import json, os, pickle, resource, sys, time
from pipeline.pictures.decoder import DecodeLimits, Refused, decode, open_image

def use():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_maxrss >> 10, usage.ru_utime + usage.ru_stime

limits = DecodeLimits(min_side=1)
for name, data in pickle.load(sys.stdin.buffer):
    for look in (open_image, decode):
        child = os.fork()
        if not child:
            megabytes, seconds = use()
            answer = look(data, limits)
            grown, taken = use()
            found = answer.reason if isinstance(answer, Refused) else "shown"
            print(json.dumps([name, look.__name__, found, grown - megabytes, taken - seconds]), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
"""


def measured(files: dict[str, bytes]) -> list[tuple[str, str, str, int, float]]:
    """Name, function, outcome, megabytes and processor seconds of opening and of decoding each file."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        input=pickle.dumps(list(files.items())),
        capture_output=True,
        check=True,
        timeout=120,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 2 * len(files), done.stderr
    return rows


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_a_bomb_costs_at_most_a_second_and_100_megabytes() -> None:
    cases = [case for case in BOMBS if can_run(case)] + [case for case in LIMITS if "bomb" in case.name]
    for name, look, _, megabytes, seconds in measured({case.name: case.make() for case in cases}):
        assert megabytes < 100, (name, look, megabytes)
        assert seconds < 1, (name, look, seconds)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_decoding_takes_at_most_18_bytes_per_pixel() -> None:
    """The memory stated in DecodeLimits, measured at 4 megapixels; 8 MB are allowed for the code of the codec."""
    size = (2000, 2000)
    waves = Image.linear_gradient("L").resize(size).convert("RGB")
    files = {
        "png": encoded(waves, "PNG", compress_level=1),
        "palette png": encoded(Image.new("P", size), "PNG", transparency=0),
        "rgba png": encoded(Image.new("RGBA", size), "PNG", compress_level=1),
        "profiled png": encoded(waves, "PNG", compress_level=1, icc_profile=rgb_profile(SRGB, 1)),
        "16-bit grey png": png(*size, 16, 0, bytes((2 * size[0] + 1) * size[1])),
        "jpeg": encoded(waves, "JPEG"),
        "progressive jpeg": encoded(waves, "JPEG", progressive=True, subsampling=0),
        "turned jpeg": encoded(waves, "JPEG", exif=exif(6)),
        "cmyk jpeg": encoded(Image.new("CMYK", size), "JPEG"),
        "webp": encoded(waves, "WEBP", method=0),
        "rgba webp": encoded(Image.new("RGBA", size), "WEBP", method=0, lossless=True),
        "gif": encoded(Image.new("P", size), "GIF", transparency=0),
    }
    for name, look, found, megabytes, _ in measured(files):
        assert found == "shown", name
        most = 8 if look == "open_image" else 8 + 18 * size[0] * size[1] / 2**20
        assert megabytes <= most, (name, look, megabytes)
