"""Extracts what a decoder needs for the first image of a JPEG, PNG or GIF file. WebP and AVIF files stay whole: their
libraries bound their own work.

Pillow's parsers read everything that a file carries (comments, texts, thumbnails, checksums of unused chunks, later
frames). Some of it makes Pillow warn or refuse the image, or costs time and memory bounded only by the file's size: a
million empty PNG chunks took 5.7 s, two million empty JPEG comments 3.3 s and 136 MB. Here every loop over a file has a
limit. Uses only the standard library.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class RejectReason(StrEnum):
    """Why a picture is refused. The values are stored in rejected/."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not an image"
    UNSUPPORTED_FORMAT = "unsupported format"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    BLANK = "blank"
    TOO_MANY_BYTES = "too many bytes"
    TOO_MANY_PIXELS = "too many pixels"
    TOO_MANY_SCANS = "too many scans"
    TOO_FRAGMENTED = "too fragmented"
    TOO_ELONGATED = "too elongated"
    TOO_SMALL = "too small"
    DECODE_FAILED = "decode failed"
    OUT_OF_MEMORY = "out of memory"
    DECODER_DIED = "decoder died"  # with its process, for example by a segmentation fault


class UnusableFile(Exception):
    """Raised for a file without an image that may be decoded."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class FirstImage:
    data: bytes  # a file of the same format with this image and no metadata
    frames: int = 1  # in the original file
    exif: bytes = b""
    profile: bytes | None = None  # ICC
    notes: tuple[str, ...] = ()  # faults that were survived


MAX_PROFILE: Final = 4 << 20  # bytes of an ICC profile; the largest printing profiles have 3 MB

_SRGB: Final = bytes([1, 13, 0, 1])  # as cICP says it: primaries, transfer, matrix, full range
_SRGB_GAMMA: Final = 45_455  # as gAMA says it: 1 / 2.2, times 100,000
_SAME_GAMMA: Final = 0.05

# Every scan of a progressive JPEG is decoded over the whole image: real files have about ten, a bomb has thousands.
_MAX_SCANS = 100
# Real files stay far below these limits: 64 MB are a thousand JPEG segments, 8,000 PNG chunks as libpng writes them, or
# 250,000 GIF blocks. Parsing up to a limit takes 0.1 to 0.2 s.
_MAX_SEGMENTS = 10_000
_MAX_CHUNKS = 100_000
_MAX_BLOCKS = 500_000
_MAX_TABLES = 256 << 10  # bytes of a JPEG before its first scan, without metadata: real files have about 600

_APP1, _APP2, _APP14, _SOS, _EOI = 0xE1, 0xE2, 0xEE, 0xDA, 0xD9
_METADATA = {*range(0xE0, 0xF0), 0xFE}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
# Any marker except fill bytes, escaped bytes of compressed data, and markers without a segment.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")

_CHECKED = (b"IHDR", b"PLTE", b"tRNS")  # PNG chunks that determine pixels


def extract_jpeg(data: bytes) -> FirstImage:
    """Tables, frame header and scans (ITU T.81, annex B), and the JFIF and Adobe segments, which define the colour
    space. Data after the end of the image, such as further images of a multi-picture file, is harmless and stays."""
    kept, exif, profile, layers, progressive = [b"\xff\xd8"], b"", list[bytes](), 0, False
    for marker, start, end in _jpeg_segments(data):
        body = data[start + 4 : end]
        if marker == _SOS:
            if (progressive or body[:1] != bytes([layers])) and _has_many_scans(data, start):
                raise UnusableFile(RejectReason.TOO_MANY_SCANS, f"more than {_MAX_SCANS} scans")
            break
        if marker == _APP1 and body.startswith(b"Exif\0\0"):
            exif = exif or body
        elif marker == _APP2 and body.startswith(b"ICC_PROFILE\0"):
            profile.append(body[12:])
        elif marker not in _METADATA or _defines_colour(marker, body):
            kept.append(data[start:end])
            if marker in _FRAMES:
                layers, progressive = int.from_bytes(body[5:6], "big"), marker in _PROGRESSIVE
    else:
        raise UnusableFile(RejectReason.TRUNCATED, "ends before the first scan")
    if (tables := sum(map(len, kept))) > _MAX_TABLES:
        raise UnusableFile(RejectReason.TOO_FRAGMENTED, f"{tables} bytes of tables, limit {_MAX_TABLES}")
    joined, notes = _join_profile(profile)
    return FirstImage(data=b"".join([*kept, memoryview(data)[start:]]), exif=exif, profile=joined, notes=notes)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields marker, start and end of each segment up to the end of the image, skipping compressed data."""
    at = 2
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if not found or found[0][1] == _EOI or found.end() + 2 > len(data):
            return
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        yield found[0][1], found.start(), at
    raise UnusableFile(RejectReason.TOO_FRAGMENTED, f"more than {_MAX_SEGMENTS} segments")


def _has_many_scans(data: bytes, first: int) -> bool:
    if data.count(bytes([0xFF, _SOS]), first) <= _MAX_SCANS:
        return False
    # Count again, exactly: the bytes may belong to something else, such as a video appended to the image.
    scans = 0
    for marker, _, _ in _jpeg_segments(data):
        scans += marker == _SOS
        if scans > _MAX_SCANS:
            return True
    return False


def _defines_colour(marker: int, body: bytes) -> bool:
    return body.startswith(b"JFIF\0") or (marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12)


def _join_profile(parts: list[bytes]) -> tuple[bytes | None, tuple[str, ...]]:
    """Joins the numbered parts of an ICC profile (ICC.1, annex B.4), which may be in any order."""
    if not parts:
        return None, ()
    numbered = {part[0]: part[2:] for part in parts if len(part) >= 2}
    count = max((part[1] for part in parts if len(part) >= 2), default=0)
    if not count or set(numbered) != set(range(1, count + 1)):
        return None, (f"colour profile ignored: {len(numbered)} of {count} parts",)
    return b"".join(numbered[number] for number in sorted(numbered)), ()


def extract_png(data: bytes) -> FirstImage:
    """Header, palette, transparent colour and pixels (PNG, third edition). Of an animation, the default image."""
    found, pixels, frames, kind = dict[bytes, bytes](), list[memoryview](), 0, b""
    for kind, start, end in png_chunks(data):
        if kind == b"IDAT":
            pixels.append(memoryview(data)[start:end])
        elif kind == b"fcTL":
            # Pixels before the first frame control chunk are an image that is not part of the animation.
            frames += 2 if pixels and not frames else 1
        elif kind in _CHECKED:
            found.setdefault(kind, _checked(data, start, end))
        elif kind in (b"iCCP", b"eXIf", b"acTL", b"cICP", b"sRGB", b"gAMA"):
            found.setdefault(kind, data[start:end])
    if b"IHDR" not in found or not pixels:
        raise UnusableFile(RejectReason.TRUNCATED, "ends before the first pixel")
    if found[b"IHDR"][9:10] == b"\3" and b"PLTE" not in found:
        raise UnusableFile(RejectReason.DECODE_FAILED, "no palette")
    if b"tRNS" in found:
        found[b"tRNS"] = _as_decoded(found[b"tRNS"], *found[b"IHDR"][8:10])
    profile, notes = _unpack_profile(found[b"iCCP"]) if b"iCCP" in found else (None, _ignored_colours(found))
    head = [_png_chunk(kind, found[kind]) for kind in _CHECKED if kind in found]
    idat = struct.pack(">I4s", sum(map(len, pixels)), b"IDAT")
    return FirstImage(
        # The checksum of the pixels is left zero: Pillow does not check it, and zlib has its own.
        data=b"".join([data[:8], *head, idat, *pixels, bytes(4), _png_chunk(b"IEND", b"")]),
        frames=max(1, frames) if b"acTL" in found else 1,
        exif=found.get(b"eXIf", b""),
        profile=profile,
        notes=notes if kind == b"IEND" else (*notes, "ends without IEND"),
    )


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields type, start and end of the body of each chunk, up to IEND or the first bytes that are no chunk."""
    at = 8
    for _ in range(_MAX_CHUNKS):
        kind, start = data[at + 4 : at + 8], at + 8
        if len(kind) < 4 or not kind.isalpha():
            return
        at = start + int.from_bytes(data[at : at + 4], "big") + 4
        yield kind, start, at - 4
        if kind == b"IEND":
            return
    raise UnusableFile(RejectReason.TOO_FRAGMENTED, f"more than {_MAX_CHUNKS} chunks")


def _checked(data: bytes, start: int, end: int) -> bytes:
    """The body of a chunk. Raises UnusableFile if its checksum is wrong."""
    kind, checksum = data[start - 4 : start].decode(), data[end : end + 4]
    if len(checksum) < 4:
        raise UnusableFile(RejectReason.TRUNCATED, f"ends within {kind}")
    if zlib.crc32(data[start - 4 : end]) != int.from_bytes(checksum, "big"):
        raise UnusableFile(RejectReason.DECODE_FAILED, f"wrong checksum of {kind}")
    return data[start:end]


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _as_decoded(transparent: bytes, bits: int, colour: int) -> bytes:
    """Scales the transparent colour to 8 bits: Pillow compares it with decoded pixels without scaling it."""
    if colour == 0 and bits in (2, 4) and len(transparent) >= 2:
        return struct.pack(">H", (transparent[1] & (1 << bits) - 1) * 255 // ((1 << bits) - 1))
    if colour == 2 and bits == 16 and len(transparent) >= 6:
        return struct.pack(">HHH", *transparent[0:6:2])
    return transparent


def _ignored_colours(found: Mapping[bytes, bytes]) -> tuple[str, ...]:
    """Notes on colours that are not sRGB's, but are read as such: chunks cICP and gAMA of a file without a profile."""
    colours, gamma = found.get(b"cICP", _SRGB), int.from_bytes(found.get(b"gAMA", b""), "big")
    if colours != _SRGB:
        return (f"colours ignored: cICP {' '.join(map(str, colours))}",)
    if gamma and b"sRGB" not in found and abs(gamma / _SRGB_GAMMA - 1) > _SAME_GAMMA:
        return (f"gamma ignored: {gamma / 100_000:.5g}",)
    return ()


def _unpack_profile(body: bytes) -> tuple[bytes | None, tuple[str, ...]]:
    """Decompresses an iCCP chunk, up to one byte above MAX_PROFILE."""
    name_end = body.find(b"\0")
    try:
        return zlib.decompressobj().decompress(body[name_end + 2 :], MAX_PROFILE + 1), ()
    except zlib.error as error:
        return None, (f"colour profile ignored: {error}",)


def extract_gif(data: bytes) -> FirstImage:
    """Screen, palettes, transparent colour and the first image (GIF89a). Enlarges the screen to contain the image."""
    if len(data) < 13:
        raise UnusableFile(RejectReason.TRUNCATED, "ends within the screen descriptor")
    image, control, frames = b"", b"", 0
    screen = data[: 13 + _palette_bytes(data[10])]
    end = len(screen)
    for start, end in _gif_blocks(data, len(screen)):
        if data[start] == ord(","):
            frames += 1
            image = image or data[start:end]
        elif data[start + 1 : start + 3] == b"\xf9\x04" and not image:
            # Disposal and delay do not matter: no frame follows.
            control = bytes([*b"!\xf9\x04", data[start + 3] & 1, 0, 0, data[start + 6], 0])
    if not image:
        reason = RejectReason.DECODE_FAILED if data[end : end + 1] == b";" else RejectReason.TRUNCATED
        raise UnusableFile(reason, "ends before the first image")
    x, y, width, height = struct.unpack_from("<HHHH", image, 1)
    screen_width, screen_height = struct.unpack_from("<HH", screen, 6)
    size = max(screen_width, x + width), max(screen_height, y + height)
    if not width * height or max(size) > 0xFFFF:
        raise UnusableFile(RejectReason.DECODE_FAILED, f"the first image is {width}x{height} at {x},{y}")
    return FirstImage(
        data=b"".join([screen[:6], struct.pack("<HH", *size), screen[10:], control, image]), frames=frames
    )


def _gif_blocks(data: bytes, at: int) -> Iterator[tuple[int, int]]:
    """Yields start and end of each image and extension."""
    blocks = 0
    while at + 9 < len(data) and data[at] in b",!":
        start, blocks = at, blocks + 1
        at += 2 if data[at] == ord("!") else 11 + _palette_bytes(data[at + 9])
        while at < len(data) and data[at] and blocks <= _MAX_BLOCKS:
            at += 1 + data[at]
            blocks += 1
        if blocks > _MAX_BLOCKS:
            raise UnusableFile(RejectReason.TOO_FRAGMENTED, f"more than {_MAX_BLOCKS} blocks")
        at += 1
        yield start, min(at, len(data))


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _padded_webp(data: bytes) -> FirstImage:
    """The whole file. Adds the padding byte after a chunk of odd length (RFC 9649, section 2.3) if it is missing, as in
    files of old GD versions, or not counted in the length: libwebp refuses both. Extended files are not changed."""
    if data[12:16] in (b"VP8 ", b"VP8L") and len(data) >= 20:
        (length,), (body,) = struct.unpack_from("<I", data, 4), struct.unpack_from("<I", data, 16)
        end = 20 + body
        if body % 2 and end <= len(data) and (length == end - 8 or len(data) == end):
            padded = data[:4] + struct.pack("<I", end - 7) + data[8:end] + b"\0"
            return FirstImage(data=padded, notes=("ends without padding",))
    return FirstImage(data=data)


EXTRACTORS: Final[dict[str, Callable[[bytes], FirstImage]]] = {
    "JPEG": extract_jpeg,
    "PNG": extract_png,
    "GIF": extract_gif,
    "WEBP": _padded_webp,
    "AVIF": lambda data: FirstImage(data=data),
}
