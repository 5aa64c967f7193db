"""Image file -> checked RGB. The only image decoder of ingest, captioner and trainer: it returns a picture or a reason
for refusing it and never raises.

DecodeLimits are checked against the header before any pixel is decoded. Threads may decode concurrently: nothing
process-wide (Pillow's MAX_IMAGE_PIXELS, Python's warning filters) is changed. Instead, Pillow's plugins are opened
directly on data from which containers.py has removed everything that makes Pillow warn, and EXIF is parsed here.
"""

import io
import struct
from dataclasses import dataclass, replace
from typing import Final

from PIL import Image, features
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.pictures.containers import EXTRACTORS, FirstImage, RejectReason, UnusableFile
from pipeline.pictures.damage import JPEG_END, lacks_only_its_end
from pipeline.pictures.memory_limit import one_large_picture
from pipeline.pictures.pixels import flatten, to_srgb, upright


@dataclass(frozen=True)
class Refused:
    reason: RejectReason
    detail: str  # one line about this file


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """Pictures outside these limits are refused before decoding. Decoding takes up to 18 bytes per pixel: 0.4 GB (JPEG)
    to 1.8 GB (WebP) at 100 megapixels."""

    max_bytes: int = 64_000_000
    max_pixels: int = 100_000_000
    max_aspect: float = 10.0  # longer side / shorter side
    min_side: int = 32  # pixels


@dataclass(frozen=True, kw_only=True)
class Header:
    format: str  # JPEG | PNG | WEBP | GIF | AVIF, detected from the content
    width: int  # pixels, after applying the EXIF orientation
    height: int
    frames: int  # only the first one is ever decoded
    notes: tuple[str, ...] = ()  # faults that were survived, such as an unreadable colour profile


@dataclass(frozen=True)
class Picture:
    image: Image.Image  # RGB in sRGB, upright, opaque, without metadata
    header: Header


@dataclass(frozen=True)
class OpenedImage:
    """An image file whose header was read and whose pixels were not."""

    file: ImageFile
    header: Header
    orientation: int  # EXIF, 1 to 8
    profile: bytes | None  # ICC


DEFAULT_LIMITS: Final = DecodeLimits()


class _Webp(WebPImageFile):
    """Pillow's WebP plugin, with alpha for every animation: its first frame may leave parts of the canvas empty."""

    def _open(self) -> None:
        super()._open()
        if self.is_animated:
            self._mode = self.rawmode = "RGBA"


_PLUGINS: dict[str, type[ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": _Webp,
    "GIF": GifImageFile,
}
if features.check("avif"):
    from PIL import _avif
    from PIL.AvifImagePlugin import AvifImageFile

    class _Avif(AvifImageFile):
        """Pillow's AVIF plugin, single-threaded and without parsing EXIF, which warns or fails where EXIF is broken.
        The container itself states the orientation (MIAF, ISO 23000-22, section 7.3.6.7)."""

        def _open(self) -> None:
            assert self.fp is not None
            self._decoder = _avif.AvifDecoder(self.fp.read(), "auto", 1)
            self._size, self.n_frames, self._mode, profile, _, self.orientation, _ = self._decoder.get_info()
            self.info["icc_profile"] = profile
            self.seek(0)

    _PLUGINS["AVIF"] = _Avif

_SIGNATURES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF"}
# Formats that are recognized only to be refused by name: such files may be worth converting.
_OTHER_SIGNATURES = {
    b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"8BPS": "PSD", b"PK\3\4": "zip", b"\x1aE\xdf\xa3": "WebM",
    b"FWS": "Flash", b"CWS": "Flash", b"ZWS": "Flash", b"%PDF": "PDF", b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL", b"\0\0\0\x0cjP  ": "JPEG 2000", b"<svg": "SVG", b"RIFF": "RIFF",
}  # fmt: skip

_ORIENTATION_TAG = 0x0112


def decode(data: bytes, limits: DecodeLimits = DEFAULT_LIMITS) -> Picture | Refused:
    """The whole first frame: upright, alpha composited on white, sRGB, without metadata."""
    opened = open_image(data, limits)
    if isinstance(opened, Refused):
        return opened
    with one_large_picture(opened.header.width * opened.header.height):
        try:
            flat = upright(flatten(opened.file), opened.orientation)
            image, notes = to_srgb(flat, opened.profile)
        except Exception as error:  # codecs raise anything on hostile bytes
            refused = decode_failure(error)
        else:
            image.info = {}
            return Picture(image, replace(opened.header, notes=opened.header.notes + notes))
    is_cut = opened.header.format == "JPEG" and refused.reason is RejectReason.TRUNCATED
    return _with_end(decode(data + JPEG_END, limits)) if is_cut and lacks_only_its_end(data) else refused


def _with_end(decoded: Picture | Refused) -> Picture | Refused:
    if isinstance(decoded, Refused):
        return decoded
    notes = (*decoded.header.notes, "ends without EOI")
    return replace(decoded, header=replace(decoded.header, notes=notes))


def open_image(data: bytes, limits: DecodeLimits) -> OpenedImage | Refused:
    """Reads the header and checks it against the limits, without decoding a pixel."""
    if not data:
        return Refused(RejectReason.EMPTY, "0 bytes")
    if len(data) > limits.max_bytes:
        return Refused(RejectReason.TOO_MANY_BYTES, f"{len(data)} bytes, limit {limits.max_bytes}")
    format = _detect_format(data)
    if format not in _PLUGINS:
        reason = RejectReason.UNSUPPORTED_FORMAT if format else RejectReason.NOT_AN_IMAGE
        return Refused(reason, format or f"begins with {data[:8].hex(' ')}")
    try:
        first = EXTRACTORS[format](data)
        if format == "WEBP" and (refused := _check_webp(first.data, limits)):
            return refused
        file = _PLUGINS[format](io.BytesIO(first.data))
        # Pass the data to the codec at once: in Pillow's blocks of 64 KB, JPEGs take up to 7% longer.
        file.decodermaxblock = len(first.data)
    except UnusableFile as unusable:
        return Refused(unusable.reason, str(unusable))
    except Exception as error:  # as in decode
        return decode_failure(error)
    if format in ("WEBP", "AVIF"):
        first = _with_metadata(first, file)
    notes = first.notes
    try:
        orientation = getattr(file, "orientation", 0) or _exif_orientation(first.exif)
    except (ValueError, struct.error) as error:
        orientation, notes = 1, (*notes, f"EXIF ignored: {error}")
    width, height = file.size if orientation < 5 else (file.height, file.width)
    header = Header(format=format, width=width, height=height, frames=first.frames, notes=notes)
    return _check_size(width, height, limits) or OpenedImage(file, header, orientation, first.profile)


def decode_failure(error: Exception) -> Refused:
    """The refusal for an exception raised by Pillow."""
    detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    if isinstance(error, MemoryError) or "out of memory" in detail:  # the second from Pillow's codecs
        return Refused(RejectReason.OUT_OF_MEMORY, detail)
    return Refused(RejectReason.TRUNCATED if "truncated" in detail.lower() else RejectReason.DECODE_FAILED, detail)


def _with_metadata(first: FirstImage, file: ImageFile) -> FirstImage:
    """Adds the metadata that Pillow read from a WebP or AVIF file."""
    exif, profile = file.info.get("exif", b""), file.info.get("icc_profile")
    return replace(first, frames=getattr(file, "n_frames", 1), exif=exif, profile=profile)


def _detect_format(data: bytes) -> str:
    """The format according to the first bytes, "" if they are unknown."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brands = data[8 : max(16, int.from_bytes(data[:4], "big"))][:256]
        return "AVIF" if b"avif" in brands or b"avis" in brands else "MP4 or HEIC"
    signatures = _SIGNATURES | _OTHER_SIGNATURES
    return next((name for signature, name in signatures.items() if data.startswith(signature)), "")


def _check_size(width: int, height: int, limits: DecodeLimits) -> Refused | None:
    size = f"{width}x{height}"
    if width * height > limits.max_pixels:
        return Refused(RejectReason.TOO_MANY_PIXELS, f"{size}, limit {limits.max_pixels} pixels")
    if max(width, height) > limits.max_aspect * min(width, height):
        return Refused(RejectReason.TOO_ELONGATED, f"{size}, limit {limits.max_aspect:g} to 1")
    if min(width, height) < limits.min_side:
        return Refused(RejectReason.TOO_SMALL, f"{size}, limit {limits.min_side} pixels")
    return None


def _check_webp(data: bytes, limits: DecodeLimits) -> Refused | None:
    """Checks size and length from the first 30 bytes (RFC 9649), before Pillow opens the file: opening allocates the
    whole canvas, up to 4 gigapixels, and the error for a truncated file does not say that it is truncated."""
    (length,) = struct.unpack_from("<I", data, 4)
    if length + 8 > len(data) or len(data) < 30:
        return Refused(RejectReason.TRUNCATED, f"{len(data)} bytes of {length + 8}")
    if data[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", data, 26))
    return _check_size(width, height, limits)


def _exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8 (EXIF 2.32, section 4.6.4); 1 if the block has none. Raises ValueError or struct.error
    if the block is broken before the orientation is found."""
    if not exif:
        return 1
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        raise ValueError(f"begins with {tiff[:4].hex(' ')}")
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (entries,) = struct.unpack_from(f"{order}H", tiff, start)
    for at in range(start + 2, start + 2 + 12 * entries, 12):
        tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, at)
        if tag == _ORIENTATION_TAG:
            return value if 1 <= value <= 8 else 1
    return 1
