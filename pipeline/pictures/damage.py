"""Damage that Pillow decodes without a word: corrupt JPEG data, and files whose parts were replaced by zeros.

A corrupt JPEG has bands of shifted colours, a WebP or AVIF of which half is zeros is flat from there on. Single wrong
bits in WebP and AVIF cannot be recognised: these formats have no checksums. Only this file imports simplejpeg.
"""

import re
import zlib
from typing import Final

import simplejpeg

from pipeline.pictures.containers import png_chunks

JPEG_END: Final = b"\xff\xd9"
# Zeros in a row that compressed data of a picture with some detail never has. Flat pictures do have them, but hardly
# any bytes for each pixel.
_ZEROS: Final = {"WEBP": 1024, "AVIF": 64}
_LEAST_DETAIL: Final = 0.02  # bytes for each pixel
_PAYLOAD: Final = {"WEBP": b"VP8", "AVIF": b"mdat"}  # from here on; colour profiles may hold zeros


def find_damage(data: bytes, format: str, pixels: int) -> str | None:
    """What is wrong with a file of this format and number of pixels, or None.

    JPEG: what libjpeg warns of. PNG: the checksums of its pixels. WebP, AVIF: runs of zeros. GIF: nothing is known.
    """
    if format == "JPEG":
        return _jpeg_warning(data)
    if format == "PNG":
        return _wrong_checksum(data)
    if format not in _ZEROS or len(data) < _LEAST_DETAIL * pixels:
        return None
    payload = data[max(0, data.find(_PAYLOAD[format])) :]
    longest = max((len(run) for run in re.findall(rb"\0{%d,}" % _ZEROS[format], payload)), default=0)
    return f"{longest} zero bytes in a row" if longest else None


def lacks_only_its_end(data: bytes) -> bool:
    """True if a JPEG is whole but for the marker that ends it."""
    return not data.endswith(JPEG_END) and _jpeg_warning(data) is None


def _wrong_checksum(data: bytes) -> str | None:
    for kind, start, end in png_chunks(data):
        if kind == b"IDAT" and zlib.crc32(data[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return "wrong checksum of IDAT"
    return None


def _jpeg_warning(data: bytes) -> str | None:
    """The first warning of libjpeg-turbo, if any. It reads all of the file, but computes an eighth of the pixels."""
    whole = data if data.rstrip(b"\0").endswith(JPEG_END) else data + JPEG_END
    try:
        simplejpeg.decode_jpeg(whole, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        return str(error)
    return None
