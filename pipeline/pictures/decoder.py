"""Bytes -> checked RGB. The one decoder of ingest, captioner and trainer: a picture or a reason, never an exception.

Limits are checked from the header before a pixel is decoded. Pillow's bomb check and Python's filters of warnings are
settings of the whole process, so they are kept out of the way instead of being changed: plugins are opened directly
(formats outside the list are never tried), sizes are compared here, EXIF is read here, for one number, and what Pillow
would warn of never reaches it (pipeline/pictures/containers.py). Any number of threads may decode.

Axes: H rows and W columns of pixels, C the three channels of sRGB.
"""

import io
import struct
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, Literal

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageCms, features
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.pictures.containers import FIRST_PICTURE, MAX_PROFILE, FirstPicture, Unusable
from pipeline.pictures.containers import Reason as Reason
from pipeline.pictures.libwebp import decode_still


@dataclass(frozen=True)
class Refused:
    reason: Reason
    detail: str  # one line, for whoever wonders about this one picture


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused before decoding. 100 megapixels take 0.4 GB (JPEG) to 1.8 GB (WebP) while they are decoded."""

    max_bytes: int = 64_000_000
    max_pixels: int = 100_000_000
    max_aspect: float = 10.0  # longer side / shorter side
    min_side: int = 32  # pixels


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of itself; `notes` are faults that were survived, such as an unreadable colour profile."""

    format: str  # JPEG | PNG | WEBP | GIF | AVIF, by the content, whatever the file was called
    width: int  # pixels, after EXIF turning
    height: int
    frames: int  # only the first is ever decoded
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    image: Image.Image  # RGB in sRGB, upright, opaque, without metadata
    header: Header


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A square out of the resized picture, which is `width` x `height`; the square begins at column x0, row y0."""

    pixels_HWC: NDArray[np.uint8]
    x0: int
    y0: int
    width: int
    height: int


@dataclass(frozen=True)
class Encoded:
    data: bytes
    format: str  # as in Header
    width: int  # pixels
    height: int


DEFAULT_LIMITS: Final = Limits()
_SIMD: Final = ".post" in PIL.__version__


class _Webp(WebPImageFile):
    """Pillow's WebP, but an animation always has alpha: its first frame may leave parts of the canvas empty. Anything
    else is decoded without Pillow's detour through the canvases of an animation."""

    def _open(self) -> None:
        super()._open()
        if self.is_animated:
            self._mode = self.rawmode = "RGBA"

    def still(self) -> Image.Image | None:
        """RGBA, RGB or RGBX; None where Pillow must decode, or say what is wrong."""
        assert isinstance(self.fp, io.BytesIO)
        if self.is_animated:
            return None
        if self.mode == "RGBA":
            return decode_still(self.fp.getvalue(), *self.size, "RGBA")
        image = decode_still(self.fp.getvalue(), *self.size, "RGBX")
        # pillow-simd resizes four channels as fast as three, pillow takes a third longer.
        return image.convert("RGB") if image and not _SIMD else image


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
        """Pillow's AVIF, less the parsing of EXIF on opening, which warns or fails where EXIF is broken, and in one
        thread. The container itself says how the picture is turned (MIAF, ISO 23000-22, section 7.3.6.7)."""

        def _open(self) -> None:
            assert self.fp is not None
            self._decoder = _avif.AvifDecoder(self.fp.read(), "auto", 1)
            self._size, self.n_frames, self._mode, profile, _, self.orientation, _ = self._decoder.get_info()
            self.info["icc_profile"] = profile
            self.seek(0)

    _PLUGINS["AVIF"] = _Avif

_SIGNATURES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF"}
# Told apart from noise because a reason of its own is more help: these may be worth converting.
_OTHER_SIGNATURES = {
    b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"8BPS": "PSD", b"PK\3\4": "zip", b"\x1aE\xdf\xa3": "WebM",
    b"FWS": "Flash", b"CWS": "Flash", b"ZWS": "Flash", b"%PDF": "PDF", b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL", b"\0\0\0\x0cjP  ": "JPEG 2000", b"<svg": "SVG", b"RIFF": "RIFF",
}  # fmt: skip

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_FILTER = Image.Resampling.LANCZOS
_LONGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383}  # pixels that the encoder can do

_COLOUR_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # Pillow's mode -> how ICC profiles call it
_SAME_COLOUR = 2  # of 255
_PROBE_HWC = np.stack(np.meshgrid(*[np.linspace(0, 255, 9).round()] * 3), axis=-1).reshape(27, 27, 3).astype(np.uint8)

FLAT: Final = 0  # the perceptual hash of a picture without structure: no two of them need be alike

_HASH_SIDE = 32
_FREQUENCIES = np.arange(9)
# The orthonormal cosine transform, by rows.
_COSINES = np.sqrt(np.where(_FREQUENCIES, 2, 1) / _HASH_SIDE)[:, None] * np.cos(
    np.pi * _FREQUENCIES[:, None] * (2 * np.arange(_HASH_SIDE) + 1) / (2 * _HASH_SIDE)
)
# The 64 lowest but the mean, in order of frequency.
_LOWEST = np.unravel_index(
    np.argsort((_FREQUENCIES[:, None] ** 2 + _FREQUENCIES**2).ravel(), kind="stable")[1:65], (9, 9)
)
_ONE_LEVEL = _HASH_SIDE / 2  # the strength of a wave whose amplitude is one grey level
_LEAST_STRUCTURE = 16  # of the 64 frequencies


def inspect(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Header | Refused:
    """What the header says, or why the picture is refused; no pixel is decoded."""
    opened = _open(data, limits)
    return opened if isinstance(opened, Refused) else opened.header


def decode(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Picture | Refused:
    """The whole first frame: upright, alpha on white, sRGB, without metadata."""
    opened = _open(data, limits)
    if isinstance(opened, Refused):
        return opened
    try:
        flat = _upright(_flatten(opened.file), opened.orientation)
        image, notes = _to_srgb(flat, opened.profile)
    except Exception as error:  # whatever a decoder makes of hostile bytes is a refusal
        return _failure(error)
    image.info = {}
    return Picture(image, replace(opened.header, notes=opened.header.notes + notes))


def square_crop(data: bytes, side: int, across: float, down: float, limits: Limits = DEFAULT_LIMITS) -> Crop | Refused:
    """The shifted square crop (HDM, section 3.5): resized so that the short side is `side` pixels, smaller pictures
    enlarged, and cut at an offset that `across` and `down`, both in [0, 1), choose evenly among all of them.

    Only the square is resized. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves at least the resized
    picture: up to twice as fast, and 0.6 grey levels away from the long way, on average, at 256 pixels.
    """
    assert side >= 1, side
    assert 0 <= across < 1, across
    assert 0 <= down < 1, down
    opened = _open(data, limits)
    if isinstance(opened, Refused):
        return opened
    header = opened.header
    width, height = _resized(header.width, header.height, side)
    x0 = int(across * (width - side + 1))
    y0 = int(down * (height - side + 1))
    try:
        fraction = _decode_smaller(opened.file, (height, width) if opened.orientation >= 5 else (width, height))
        flat = _upright(_flatten(opened.file), opened.orientation)
        per_column, per_row = header.width / width * fraction, header.height / height * fraction
        box = (x0 * per_column, y0 * per_row, (x0 + side) * per_column, (y0 + side) * per_row)
        square, _ = _to_srgb(_resized_part(flat, side, box), opened.profile)
    except Exception as error:  # as in decode
        return _failure(error)
    return Crop(pixels_HWC=np.array(square), x0=x0, y0=y0, width=width, height=height)


def downsize(picture: Picture, short_side: int, format: Literal["JPEG", "WEBP"], quality: int = 92) -> Encoded:
    """Encode anew, without metadata, the short side at most `short_side` pixels; never enlarged. JPEG keeps colour at
    full resolution (4:4:4), which drawn lines need; `quality` is the encoder's, 0 to 100."""
    assert format in _LONGEST_SIDE, format
    width, height = picture.image.size
    scale = min(1.0, short_side / min(width, height), _LONGEST_SIDE[format] / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = picture.image.resize(size, _FILTER) if scale < 1 else picture.image
    buffer = io.BytesIO()
    image.save(buffer, format, quality=quality, **({"subsampling": 0} if format == "JPEG" else {}))
    return Encoded(buffer.getvalue(), format, *size)


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that re-encoding and resizing leave alone, but for a few: the signs of the 64 lowest frequencies of the
    brightness, averaged down to 32 x 32 (a DCT hash; bit 0 is the lowest). An unsigned 64-bit integer; FLAT for a
    picture with too little structure to tell it from another.

    Frequencies weaker than one grey level count as not positive, so that noise does not decide their bits: half of
    all frequencies of a symmetrical drawing are zero.
    """
    small = image.resize((_HASH_SIDE, _HASH_SIDE), Image.Resampling.HAMMING, reducing_gap=3.0).convert("L")
    grey_HW = np.asarray(small, np.float64)
    strengths = (_COSINES @ grey_HW @ _COSINES.T)[_LOWEST]
    if np.count_nonzero(np.abs(strengths) > _ONE_LEVEL) < _LEAST_STRUCTURE:
        return FLAT
    return sum(1 << bit for bit in np.flatnonzero(strengths > _ONE_LEVEL).tolist())


def pillow_build() -> str:
    """Which of the two builds of Pillow is running: both install the same package, the last one installed wins."""
    return f"{'pillow-simd' if _SIMD else 'pillow'} {PIL.__version__}"


@dataclass(frozen=True)
class _Opened:
    file: ImageFile  # header read, pixels not yet
    header: Header
    orientation: int  # EXIF, 1 to 8
    profile: bytes | None  # ICC


def _open(data: bytes, limits: Limits) -> _Opened | Refused:
    if not data:
        return Refused(Reason.EMPTY, "0 bytes")
    if len(data) > limits.max_bytes:
        return Refused(Reason.TOO_MANY_BYTES, f"{len(data)} bytes, limit {limits.max_bytes}")
    format = _format_of(data)
    if format not in _PLUGINS:
        reason = Reason.UNSUPPORTED_FORMAT if format else Reason.NOT_AN_IMAGE
        return Refused(reason, format or f"begins with {data[:8].hex(' ')}")
    try:
        first = FIRST_PICTURE[format](data)
        if format == "WEBP" and (refused := _check_webp(first.data, limits)):
            return refused
        file = _PLUGINS[format](io.BytesIO(first.data))
        # Handed to the decoder at once: in pieces of Pillow's 64 KB, JPEGs take up to 7% longer.
        file.decodermaxblock = len(first.data)
    except Unusable as unusable:
        return Refused(unusable.reason, str(unusable))
    except Exception as error:  # as in decode
        return _failure(error)
    if format in ("WEBP", "AVIF"):
        first = _with_metadata(first, file)
    notes = first.notes
    try:
        orientation = getattr(file, "orientation", 0) or _orientation(first.exif)
    except (ValueError, struct.error) as error:
        orientation, notes = 1, (*notes, f"EXIF ignored: {error}")
    width, height = file.size if orientation < 5 else (file.height, file.width)
    header = Header(format=format, width=width, height=height, frames=first.frames, notes=notes)
    return _check_size(width, height, limits) or _Opened(file, header, orientation, first.profile)


def _with_metadata(first: FirstPicture, file: ImageFile) -> FirstPicture:
    """With what Pillow found in a file that was left whole."""
    exif, profile = file.info.get("exif", b""), file.info.get("icc_profile")
    return replace(first, frames=getattr(file, "n_frames", 1), exif=exif, profile=profile)


def _format_of(data: bytes) -> str:
    """The format as its first bytes tell it, "" where they tell nothing."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brands = data[8 : max(16, int.from_bytes(data[:4], "big"))][:256]
        return "AVIF" if b"avif" in brands or b"avis" in brands else "MP4 or HEIC"
    signatures = _SIGNATURES | _OTHER_SIGNATURES
    return next((name for signature, name in signatures.items() if data.startswith(signature)), "")


def _check_size(width: int, height: int, limits: Limits) -> Refused | None:
    size = f"{width}x{height}"
    if width * height > limits.max_pixels:
        return Refused(Reason.TOO_MANY_PIXELS, f"{size}, limit {limits.max_pixels} pixels")
    if max(width, height) > limits.max_aspect * min(width, height):
        return Refused(Reason.TOO_ELONGATED, f"{size}, limit {limits.max_aspect:g} to 1")
    if min(width, height) < limits.min_side:
        return Refused(Reason.TOO_SMALL, f"{size}, limit {limits.min_side} pixels")
    return None


def _check_webp(data: bytes, limits: Limits) -> Refused | None:
    """Size and length from the first 30 bytes (RFC 9649), because Pillow's decoder takes the memory of the whole
    canvas, up to 4 gigapixels, as it opens the file. The length, because its message for a cut file does not say so."""
    (length,) = struct.unpack_from("<I", data, 4)
    if length + 8 > len(data) or len(data) < 30:
        return Refused(Reason.TRUNCATED, f"{len(data)} bytes of {length + 8}")
    if data[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", data, 26))
    return _check_size(width, height, limits)


def _orientation(exif: bytes) -> int:
    """How the stored picture must be turned, 1 to 8 (EXIF 2.32, section 4.6.4). ValueError or struct.error where the
    block is broken before it says so."""
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


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _decode_smaller(file: ImageFile, at_least: tuple[int, int]) -> float:
    """Have a JPEG decoded at the smallest fraction of its size, from 1/8, that leaves this width and height; return the
    fraction, 1 for other formats."""
    stored_width = file.width
    drafted = file.draft(None, at_least)
    return drafted[1][2] / stored_width if drafted else 1.0


def _flatten(file: ImageFile) -> Image.Image:
    """Decode; L, RGB, RGBX or CMYK of 8 bits without transparency."""
    if isinstance(file, _Webp) and (still := file.still()):
        return _opaque(still)
    window = file.tile[0].extents if isinstance(file, GifImageFile) else None
    file.load()
    flat = _opaque(file)
    if window in (None, (0, 0, *flat.size)):
        return flat
    # The first frame of a GIF may leave parts of the screen empty: they are transparent, not the first of its colours.
    screen = Image.new(flat.mode, flat.size, "white")
    screen.paste(flat.crop(window), window)
    return screen


def _opaque(file: Image.Image) -> Image.Image:
    if file.mode == "I;16":
        return _grey_of_16_bits(file)
    if file.has_transparency_data:
        mode = "L" if file.mode in ("1", "L", "LA") else "RGB"
        image = file if file.mode == f"{mode}A" else file.convert(f"{mode}A")
        opaque = Image.new(mode, image.size, "white")
        opaque.paste(image, mask=image.getchannel("A"))
        return opaque
    if file.mode == "CMYK" and "adobe" not in file.info:
        # Pillow takes ink for inverted, as Adobe writes it; without Adobe's mark it is not.
        return ImageChops.invert(file)
    if file.mode in ("L", "RGB", "RGBX", "CMYK"):
        return file
    return file.convert("L" if file.mode == "1" else "RGB")


def _grey_of_16_bits(file: Image.Image) -> Image.Image:
    """The upper 8 bits: Pillow's own conversion cuts everything above 255 to white."""
    values_HW = np.asarray(file)
    grey_HW = (values_HW >> 8).astype(np.uint8)
    grey_HW[values_HW == file.info.get("transparency", -1)] = 255
    return Image.fromarray(grey_HW)


def _to_srgb(flat: Image.Image, profile: bytes | None) -> tuple[Image.Image, tuple[str, ...]]:
    """RGB, and a note where the colour profile could not be used."""
    if flat.mode == "RGBX":
        flat = flat.convert("RGB")
    if profile:
        try:
            if len(profile) > MAX_PROFILE:
                raise ValueError(f"over {MAX_PROFILE} bytes")
            transform = _transform_to_srgb(profile, flat.mode)
            if transform is not None:
                return _apply(transform, flat), ()
        except Exception as error:  # littlecms, or its absence: the picture is still good
            return flat.convert("RGB"), (f"colour profile ignored: {error}",)
    return (flat if flat.mode == "RGB" else flat.convert("RGB")), ()


@lru_cache(maxsize=16)  # most profiled pictures share a few profiles, and building a transform takes milliseconds
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile's colours to sRGB, None where that changes nothing. ValueError for a profile of another mode."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space != _COLOUR_SPACES[mode]:
        raise ValueError(f"it describes {space}, the picture is {mode}")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return transform
    # Measured, because there are dozens of sRGB profiles and as many names for it.
    probe = Image.fromarray(_PROBE_HWC).convert(mode)
    difference = np.abs(np.asarray(_apply(transform, probe), np.int16) - np.asarray(probe.convert("RGB"), np.int16))
    return transform if difference.max() > _SAME_COLOUR else None


def _apply(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    changed = ImageCms.applyTransform(image, transform)
    assert changed is not None  # only None when asked to work in place
    return changed


def _resized_part(image: Image.Image, side: int, box: tuple[float, float, float, float]) -> Image.Image:
    """The box (left, top, right, bottom), resized to a square. A box of just these pixels is only cut out: the
    filter would leave them as they are, and take its time."""
    left, top = int(box[0]), int(box[1])
    if box == (left, top, left + side, top + side):
        return image.crop(box)
    return image.resize((side, side), _FILTER, box)


def _resized(width: int, height: int, side: int) -> tuple[int, int]:
    """The size whose short side is `side`, the other one rounded."""
    short = min(width, height)
    return max(side, round(width * side / short)), max(side, round(height * side / short))


def _failure(error: Exception) -> Refused:
    """The refusal for what Pillow raised."""
    detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return Refused(Reason.TRUNCATED if "truncated" in detail.lower() else Reason.DECODE_FAILED, detail)
