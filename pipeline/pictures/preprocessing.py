"""Picture -> input of a classifier, as its preprocessor_config.json (transformers' layout) specifies.

Reimplements the steps of transformers' Pillow backend. AutoImageProcessor needs torchvision (transformers 5.14) and
picks one of two backends that differ in the last digits; ONNX folders come with the same file and need no transformers.

Axes: N pictures, H rows, W columns, C the three channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, centre crop, then (value * scale - mean) / std."""

    resize: tuple[int, int] | int  # height and width, ignoring the aspect; or the short side, keeping the aspect
    crop: tuple[int, int] | None = None  # height and width
    resample: int  # Pillow's number
    scale: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    square: bool = False  # first pad with white to a square, with the picture in the centre
    bgr: bool = False  # channel order of the result

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every result."""
        size = self.crop or self.resize
        assert isinstance(size, tuple), self
        return size

    def resized(self, image: Image.Image) -> NDArray[np.uint8]:
        """RGB picture of any size -> RGB pixels (H, W, C)."""
        if self.square:
            image = _on_white_square(image)
        height, width = self.resize if isinstance(self.resize, tuple) else _short_side(image, self.resize)
        resized_HWC = np.asarray(image.resize((width, height), Image.Resampling(self.resample)))
        rows, columns = self.crop or (height, width)
        top, left = (height - rows) // 2, (width - columns) // 2
        return resized_HWC[top : top + rows, left : left + columns]

    def normalised(self, pixels_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        mean_C, std_C = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        values_NHWC = (pixels_NHWC.astype(np.float32) * np.float32(self.scale) - mean_C) / std_C
        return values_NHWC[..., ::-1] if self.bgr else values_NHWC


def wd_tagger(height: int, width: int) -> Preprocessing:
    """SmilingWolf's WD taggers (folders with selected_tags.csv): the whole picture on a white square, BGR, 0 to 255."""
    resample = int(Image.Resampling.BICUBIC)
    return Preprocessing(resize=(height, width), resample=resample, square=True, bgr=True)


# Processors that do nothing but the steps above. All others (tiles, pooling sizes, offsets) are refused. CLIP resizes
# the short side and crops; the others resize to a fixed height and width, also if `size` is a single number.
_PROCESSORS = ("Beit", "CLIP", "Siglip", "ViT")


def read_preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    """Raises ValueError, naming the key, if a value is missing or is not one of the supported steps."""
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "missing")
    name = kind.removesuffix("Fast").removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if name not in _PROCESSORS:
        raise ValueError(f"image_processor_type {kind} is none of {', '.join(_PROCESSORS)} (+ ImageProcessor)")
    if not config.get("do_resize", True) or config.get("do_pad"):
        raise ValueError("do_resize must be true and do_pad false: pictures of a dataset differ in size")
    crops = config.get("do_center_crop", name == "CLIP")
    resize = _resize(config.get("size"), int_is_short_side=name == "CLIP")
    crop = _height_width("crop_size", config.get("crop_size")) if crops else None
    if crop is None and isinstance(resize, int):
        raise ValueError("size gives the short side and nothing is cropped: pictures would differ in size")
    if crop and max(crop) > (min(resize) if isinstance(resize, tuple) else resize):
        raise ValueError(f"crop_size {crop} is larger than size {resize}")
    resample = config.get("resample")
    if resample not in [int(filter) for filter in Image.Resampling]:
        raise ValueError(f"resample is {resample}, not one of Pillow's numbers 0 to 5")
    values: dict[str, Any] = {}
    if config.get("do_rescale", True):
        values["scale"] = float(config.get("rescale_factor") or 1 / 255)
    if config.get("do_normalize", True):
        values |= {"mean": _three(config, "image_mean"), "std": _three(config, "image_std")}
    return Preprocessing(resize=resize, crop=crop, resample=int(resample), **values)


def _resize(size: Any, int_is_short_side: bool) -> tuple[int, int] | int:
    if isinstance(size, int) and int_is_short_side:
        return size
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return int(size["shortest_edge"])
    return _height_width("size", size)


def _height_width(key: str, size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        return int(size["height"]), int(size["width"])
    raise ValueError(f"{key} is {size}, neither a number nor height and width")


def _three(config: Mapping[str, Any], key: str) -> tuple[float, ...]:
    values = config.get(key)
    if not isinstance(values, list) or len(values) != 3:
        raise ValueError(f"{key} is {values}, not three numbers")
    return tuple(map(float, values))


def _short_side(image: Image.Image, side: int) -> tuple[int, int]:
    """Height and width with this short side; the long side is truncated to whole pixels, as transformers does."""
    width, height = image.size
    return (side, int(side * width / height)) if height <= width else (int(side * height / width), side)


def _on_white_square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
