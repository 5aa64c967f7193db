"""An opened image file -> opaque, upright RGB in sRGB.

Axes: H rows and W columns of pixels, C colour channels.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageCms
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile

from pipeline.pictures.containers import MAX_PROFILE

# EXIF orientation -> the operation that makes the stored image upright.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_COLOUR_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # Pillow's mode -> the ICC name
_SAME_COLOUR = 2  # levels of 255
_ONE_COLOUR = 2
_PROBE_HWC = np.stack(np.meshgrid(*[np.linspace(0, 255, 9).round()] * 3), axis=-1).reshape(27, 27, 3).astype(np.uint8)


def flatten(file: ImageFile) -> Image.Image:
    """Decodes the first frame and composites it on white: 8 bits of L, RGB or CMYK."""
    window = file.tile[0].extents if isinstance(file, GifImageFile) else None
    file.load()
    flat = _opaque(file)
    if window in (None, (0, 0, *flat.size)):
        return flat
    # The first frame of a GIF may cover a part of the screen. The rest is transparent, although Pillow fills it with
    # the first colour of the palette.
    screen = Image.new(flat.mode, flat.size, "white")
    screen.paste(flat.crop(window), window)
    return screen


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Applies an EXIF orientation, 1 to 8."""
    return image.transpose(_TRANSPOSES[orientation]) if orientation in _TRANSPOSES else image


def to_srgb(flat: Image.Image, profile: bytes | None) -> tuple[Image.Image, tuple[str, ...]]:
    """Converts to RGB in sRGB; also returns a note if the ICC profile could not be used."""
    if profile:
        try:
            if len(profile) > MAX_PROFILE:
                raise ValueError(f"over {MAX_PROFILE} bytes")
            transform = _transform_to_srgb(profile, flat.mode)
            if transform is not None:
                return _apply(transform, flat), ()
        except Exception as error:  # from littlecms, or because it is missing: the picture is still good
            return flat.convert("RGB"), (f"colour profile ignored: {error}",)
    return (flat if flat.mode == "RGB" else flat.convert("RGB")), ()


def is_blank(image: Image.Image) -> bool:
    """True if all pixels of an RGB picture have the same colour, give or take what JPEG makes of one."""
    extrema = np.array(image.getextrema())  # of each channel: lowest, highest
    return bool((np.ptp(extrema, axis=1) <= _ONE_COLOUR).all())


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
        # Pillow assumes Adobe's inverted ink values, which only files with Adobe's marker have.
        return ImageChops.invert(file)
    if file.mode in ("L", "RGB", "CMYK"):
        return file
    return file.convert("L" if file.mode == "1" else "RGB")


def _grey_of_16_bits(file: Image.Image) -> Image.Image:
    """The upper 8 bits. Pillow's own conversion clips every value above 255 to white."""
    values_HW = np.asarray(file)
    grey_HW = (values_HW >> 8).astype(np.uint8)
    grey_HW[values_HW == file.info.get("transparency", -1)] = 255
    return Image.fromarray(grey_HW)


@lru_cache(maxsize=16)  # most pictures share a few profiles, and building a transform takes milliseconds
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """A transform to sRGB, None if it would change nothing. Raises ValueError if the profile is of another mode."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space != _COLOUR_SPACES[mode]:
        raise ValueError(f"it describes {space}, the picture is {mode}")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return transform
    # Compare pixels rather than names: there are dozens of sRGB profiles under as many names.
    probe = Image.fromarray(_PROBE_HWC).convert(mode)
    difference = np.abs(np.asarray(_apply(transform, probe), np.int16) - np.asarray(probe.convert("RGB"), np.int16))
    return transform if difference.max() > _SAME_COLOUR else None


def _apply(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    changed = ImageCms.applyTransform(image, transform)
    assert changed is not None  # None only if asked to work in place
    return changed
