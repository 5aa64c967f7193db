"""Picture files taken apart: the few bytes and facts that the first picture of a JPEG, PNG or GIF file needs. WebP and
AVIF files, whose libraries are bounded, stay whole.

A decoder is handed these instead of the file. Pillow's own parsers read all that a file carries (comments, texts,
thumbnails, checksums of what nobody looks at, later frames), and some of it warns, fails the picture, or takes a time
and memory that only the size of the file bounds: a million empty chunks of a PNG took 5.7 s, two million empty
comments of a JPEG 3.3 s and 136 MB. Here every walk over a file has a limit. Only the standard library is used.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Reason(StrEnum):
    """Why a picture is refused."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not an image"
    UNSUPPORTED_FORMAT = "unsupported format"
    TRUNCATED = "truncated"
    TOO_MANY_BYTES = "too many bytes"
    TOO_MANY_PIXELS = "too many pixels"
    TOO_MANY_SCANS = "too many scans"
    TOO_FRAGMENTED = "too fragmented"
    TOO_ELONGATED = "too elongated"
    TOO_SMALL = "too small"
    DECODE_FAILED = "decode failed"


class Unusable(Exception):
    """A file without a picture that may be decoded."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class FirstPicture:
    data: bytes  # a file of the same format that holds this picture and no metadata
    frames: int = 1  # pictures in the whole file
    exif: bytes = b""
    profile: bytes | None = None  # ICC
    notes: tuple[str, ...] = ()  # faults that were survived


MAX_PROFILE: Final = 4 << 20  # bytes of an ICC profile; the largest of printing houses have 3 MB

# A progressive JPEG decodes every scan over the whole picture: real ones have about ten, a bomb has thousands.
_MAX_SCANS = 100
# Real files stay far below these: of JPEG segments, 64 KB each, a thousand make 64 MB; so do 8,000 PNG chunks of
# libpng's and 250,000 GIF blocks. At the limits a walk takes 0.1 to 0.2 s.
_MAX_SEGMENTS = 10_000
_MAX_CHUNKS = 100_000
_MAX_BLOCKS = 500_000
_MAX_TABLES = 256 << 10  # bytes before the first scan of a JPEG, less metadata: real ones have about 600

_APP1, _APP2, _APP14, _SOS, _EOI = 0xE1, 0xE2, 0xEE, 0xDA, 0xD9
_METADATA = {*range(0xE0, 0xF0), 0xFE}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
# But for fill bytes, bytes of compressed pixels and the markers that stand alone.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")

_CHECKED = (b"IHDR", b"PLTE", b"tRNS")  # PNG chunks that decide pixels


def first_of_jpeg(data: bytes) -> FirstPicture:
    """Tables, frame header and scans (ITU T.81, annex B). What the markers of JFIF and Adobe say of colour is kept;
    whatever follows the end of the picture, such as the others of a multi-picture file, is harmless and stays."""
    kept, exif, profile, layers, progressive = [b"\xff\xd8"], b"", list[bytes](), 0, False
    for marker, start, end in _jpeg_segments(data):
        body = data[start + 4 : end]
        if marker == _SOS:
            if (progressive or body[:1] != bytes([layers])) and _has_many_scans(data, start):
                raise Unusable(Reason.TOO_MANY_SCANS, f"more than {_MAX_SCANS} scans")
            break
        if marker == _APP1 and body.startswith(b"Exif\0\0"):
            exif = exif or body
        elif marker == _APP2 and body.startswith(b"ICC_PROFILE\0"):
            profile.append(body[12:])
        elif marker not in _METADATA or _tells_colour(marker, body):
            kept.append(data[start:end])
            if marker in _FRAMES:
                layers, progressive = int.from_bytes(body[5:6], "big"), marker in _PROGRESSIVE
    else:
        raise Unusable(Reason.TRUNCATED, "ends before the first scan")
    if (tables := sum(map(len, kept))) > _MAX_TABLES:
        raise Unusable(Reason.TOO_FRAGMENTED, f"{tables} bytes of tables, limit {_MAX_TABLES}")
    joined, notes = _join_profile(profile)
    return FirstPicture(data=b"".join([*kept, memoryview(data)[start:]]), exif=exif, profile=joined, notes=notes)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment up to the end of the picture, whose compressed pixels lie between them."""
    at = 2
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if not found or found[0][1] == _EOI or found.end() + 2 > len(data):
            return
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        yield found[0][1], found.start(), at
    raise Unusable(Reason.TOO_FRAGMENTED, f"more than {_MAX_SEGMENTS} segments")


def _has_many_scans(data: bytes, first: int) -> bool:
    if data.count(bytes([0xFF, _SOS]), first) <= _MAX_SCANS:
        return False
    # Exactly, because the bytes may stand in something else, such as a film appended to the picture.
    scans = 0
    for marker, _, _ in _jpeg_segments(data):
        scans += marker == _SOS
        if scans > _MAX_SCANS:
            return True
    return False


def _tells_colour(marker: int, body: bytes) -> bool:
    return body.startswith(b"JFIF\0") or (marker == _APP14 and body.startswith(b"Adobe") and len(body) >= 12)


def _join_profile(parts: list[bytes]) -> tuple[bytes | None, tuple[str, ...]]:
    """The ICC profile of numbered parts (ICC.1, annex B.4), in whatever order they came."""
    if not parts:
        return None, ()
    numbered = {part[0]: part[2:] for part in parts if len(part) >= 2}
    count = max((part[1] for part in parts if len(part) >= 2), default=0)
    if not count or set(numbered) != set(range(1, count + 1)):
        return None, (f"colour profile ignored: {len(numbered)} of {count} parts",)
    return b"".join(numbered[number] for number in sorted(numbered)), ()


def first_of_png(data: bytes) -> FirstPicture:
    """Header, palette, transparent colour and pixels (PNG, third edition). The first picture of an animation is the
    one that decoders without animation show."""
    found, pixels, frames, kind = dict[bytes, bytes](), list[memoryview](), 0, b""
    for kind, start, end in _png_chunks(data):
        if kind == b"IDAT":
            pixels.append(memoryview(data)[start:end])
        elif kind == b"fcTL":
            # Pixels before the first frame's control are a picture of their own.
            frames += 2 if pixels and not frames else 1
        elif kind in _CHECKED:
            found.setdefault(kind, _checked(data, start, end))
        elif kind in (b"iCCP", b"eXIf", b"acTL"):
            found.setdefault(kind, data[start:end])
    if b"IHDR" not in found or not pixels:
        raise Unusable(Reason.TRUNCATED, "ends before the first pixel")
    if found[b"IHDR"][9:10] == b"\3" and b"PLTE" not in found:
        raise Unusable(Reason.DECODE_FAILED, "no palette")
    if b"tRNS" in found:
        found[b"tRNS"] = _as_decoded(found[b"tRNS"], *found[b"IHDR"][8:10])
    profile, notes = _unpack_profile(found[b"iCCP"]) if b"iCCP" in found else (None, ())
    head = [_png_chunk(kind, found[kind]) for kind in _CHECKED if kind in found]
    idat = struct.pack(">I4s", sum(map(len, pixels)), b"IDAT")
    return FirstPicture(
        # Without the checksum of the pixels: Pillow does not look at it, and zlib has its own.
        data=b"".join([data[:8], *head, idat, *pixels, bytes(4), _png_chunk(b"IEND", b"")]),
        frames=max(1, frames) if b"acTL" in found else 1,
        exif=found.get(b"eXIf", b""),
        profile=profile,
        notes=notes if kind == b"IEND" else (*notes, "ends without IEND"),
    )


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind of each chunk, and where its body starts and ends, as far as there are chunks."""
    at = 8
    for _ in range(_MAX_CHUNKS):
        kind, start = data[at + 4 : at + 8], at + 8
        if len(kind) < 4 or not kind.isalpha():
            return
        at = start + int.from_bytes(data[at : at + 4], "big") + 4
        yield kind, start, at - 4
        if kind == b"IEND":
            return
    raise Unusable(Reason.TOO_FRAGMENTED, f"more than {_MAX_CHUNKS} chunks")


def _checked(data: bytes, start: int, end: int) -> bytes:
    kind, checksum = data[start - 4 : start].decode(), data[end : end + 4]
    if len(checksum) < 4:
        raise Unusable(Reason.TRUNCATED, f"ends within {kind}")
    if zlib.crc32(data[start - 4 : end]) != int.from_bytes(checksum, "big"):
        raise Unusable(Reason.DECODE_FAILED, f"wrong checksum of {kind}")
    return data[start:end]


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _as_decoded(transparent: bytes, bits: int, colour: int) -> bytes:
    """The transparent colour in the 8 bits of decoded pixels, with which Pillow compares it as it stands."""
    if colour == 0 and bits in (2, 4) and len(transparent) >= 2:
        return struct.pack(">H", (transparent[1] & (1 << bits) - 1) * 255 // ((1 << bits) - 1))
    if colour == 2 and bits == 16 and len(transparent) >= 6:
        return struct.pack(">HHH", *transparent[0:6:2])
    return transparent


def _unpack_profile(body: bytes) -> tuple[bytes | None, tuple[str, ...]]:
    """At most one byte more than a profile may have."""
    name_end = body.find(b"\0")
    try:
        return zlib.decompressobj().decompress(body[name_end + 2 :], MAX_PROFILE + 1), ()
    except zlib.error as error:
        return None, (f"colour profile ignored: {error}",)


def first_of_gif(data: bytes) -> FirstPicture:
    """Screen, palettes, transparent colour and the first image (GIF89a). The screen is enlarged to hold the image."""
    if len(data) < 13:
        raise Unusable(Reason.TRUNCATED, "ends within the screen descriptor")
    picture, control, frames = b"", b"", 0
    screen = data[: 13 + _palette_bytes(data[10])]
    end = len(screen)
    for start, end in _gif_blocks(data, len(screen)):
        if data[start] == ord(","):
            frames += 1
            picture = picture or data[start:end]
        elif data[start + 1 : start + 3] == b"\xf9\x04" and not picture:
            # Nothing follows the picture, so how it is disposed of and when does not matter.
            control = bytes([*b"!\xf9\x04", data[start + 3] & 1, 0, 0, data[start + 6], 0])
    if not picture:
        reason = Reason.DECODE_FAILED if data[end : end + 1] == b";" else Reason.TRUNCATED
        raise Unusable(reason, "ends before the first image")
    x, y, width, height = struct.unpack_from("<HHHH", picture, 1)
    screen_width, screen_height = struct.unpack_from("<HH", screen, 6)
    size = max(screen_width, x + width), max(screen_height, y + height)
    if not width * height or max(size) > 0xFFFF:
        raise Unusable(Reason.DECODE_FAILED, f"the first image is {width}x{height} at {x},{y}")
    return FirstPicture(
        data=b"".join([screen[:6], struct.pack("<HH", *size), screen[10:], control, picture]), frames=frames
    )


def _gif_blocks(data: bytes, at: int) -> Iterator[tuple[int, int]]:
    """Start and end of each image and extension, as far as the file goes."""
    blocks = 0
    while at + 9 < len(data) and data[at] in b",!":
        start, blocks = at, blocks + 1
        at += 2 if data[at] == ord("!") else 11 + _palette_bytes(data[at + 9])
        while at < len(data) and data[at] and blocks <= _MAX_BLOCKS:
            at += 1 + data[at]
            blocks += 1
        if blocks > _MAX_BLOCKS:
            raise Unusable(Reason.TOO_FRAGMENTED, f"more than {_MAX_BLOCKS} blocks")
        at += 1
        yield start, min(at, len(data))


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def whole_webp(data: bytes) -> FirstPicture:
    """The file, with the byte behind a chunk of odd length (RFC 9649, section 2.3) that old versions of GD left out and
    others do not count; libwebp refuses both. Extended files are left as they are, and so is all metadata."""
    if data[12:16] in (b"VP8 ", b"VP8L") and len(data) >= 20:
        (length,), (picture,) = struct.unpack_from("<I", data, 4), struct.unpack_from("<I", data, 16)
        end = 20 + picture
        if picture % 2 and end <= len(data) and (length == end - 8 or len(data) == end):
            padded = data[:4] + struct.pack("<I", end - 7) + data[8:end] + b"\0"
            return FirstPicture(data=padded, notes=("ends without padding",))
    return FirstPicture(data=data)


FIRST_PICTURE: Final[dict[str, Callable[[bytes], FirstPicture]]] = {
    "JPEG": first_of_jpeg,
    "PNG": first_of_png,
    "GIF": first_of_gif,
    "WEBP": whole_webp,
    "AVIF": lambda data: FirstPicture(data=data),
}
