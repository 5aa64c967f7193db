"""Pixels of a WebP file straight from the libwebp that Pillow itself has loaded.

Pillow decodes every WebP as an animation: through two canvases and two more copies of all pixels. `WebPDecodeRGBAInto`
of libwebp (webp/decode.h) writes them once, where Pillow can read them: the same pixels in a sixth less time.
"""

import ctypes
from typing import Final, Literal

import numpy as np
from PIL import Image, _webp


def _load() -> ctypes.CDLL | None:
    """None where Pillow holds a libwebp whose functions cannot be found, as in its wheels for Windows."""
    try:
        # A handle of Pillow's extension also finds what it is linked to, by whatever name that was installed.
        library = ctypes.CDLL(_webp.__file__)
        size = ctypes.POINTER(ctypes.c_int)
        # Data and its bytes; where width and height go. 0 for what is not WebP.
        library.WebPGetInfo.argtypes = [ctypes.c_char_p, ctypes.c_size_t, size, size]
        # Data and its bytes; output, its bytes, bytes of a row. The output's address, or NULL.
        library.WebPDecodeRGBAInto.argtypes = [
            ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        ]  # fmt: skip
        library.WebPDecodeRGBAInto.restype = ctypes.c_void_p
    except (OSError, AttributeError):
        return None
    return library


_LIBWEBP: Final = _load()


def decode_still(data: bytes, width: int, height: int, mode: Literal["RGBA", "RGBX"]) -> Image.Image | None:
    """The picture of this size, in either mode four bytes a pixel; None for an animation, for broken bytes, for another
    size, and where libwebp cannot be called. Any number of threads may decode: the interpreter lock is let go."""
    found = ctypes.c_int(), ctypes.c_int()
    if not _LIBWEBP or not _LIBWEBP.WebPGetInfo(data, len(data), found[0], found[1]):
        return None
    # Another size would leave a part of the memory as it was found.
    if (found[0].value, found[1].value) != (width, height):
        return None
    pixels_HWC = np.empty((height, width, 4), np.uint8)
    if not _LIBWEBP.WebPDecodeRGBAInto(data, len(data), pixels_HWC.ctypes.data, pixels_HWC.nbytes, 4 * width):
        return None
    return Image.frombuffer(mode, (width, height), pixels_HWC, "raw", mode, 0, 1)  # without a copy
