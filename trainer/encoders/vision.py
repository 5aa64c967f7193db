"""Vision transformers: pixels -> features of patches, which a training may align a block's tokens with (REPA).

Any plain vision transformer of transformers: DINOv2 and DINOv3, with registers or not, ViT, and the vision parts of
CLIP and SigLIP.

Axes: B batch, H W pixel rows and columns, N = rows * columns patches in row order, F features, 3 = red, green, blue.
"""

import inspect
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from trainer.encoders.pretrained import cached_folder, first_line, frozen_dtype, pretrained_folder, quiet

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_KIND = ("vision model", f"{_CONFIG}, {_PREPROCESSOR} and *.safetensors", "facebook/dinov2-base")
_PIXELS_AT_ONCE = 1 << 22  # pixels per call: 83 pictures of 16 x 16 patches of 14 pixels
_MOST_OTHER_TOKENS = 16  # before the patches: class token and registers
_TYPICAL_PARAMETERS = 304_000_000  # ViT-L


@dataclass(frozen=True)
class VisionShape:
    width: int  # features of a patch
    patch: int  # pixels along the side of a patch
    mean: tuple[float, ...]  # of red, green and blue in [0, 1], from the preprocessor's config
    std: tuple[float, ...]


class VisionModel:
    """A frozen vision transformer with the normalisation of its pixels."""

    def __init__(self, name: str, model: Any, shape: VisionShape) -> None:
        self.name, self.shape = name, shape
        self.model = model.eval().requires_grad_(False)
        # ViT, CLIP and SigLIP stretch their position embeddings to other sizes only if asked to; DINO always does.
        stretches = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if stretches else {}
        self._mean_311, self._std_311 = (
            torch.tensor(values, device=model.device)[:, None, None] for values in (shape.mean, shape.std)
        )

    @torch.no_grad()
    def features(self, pixels_B3HW: Tensor, rows: int, columns: int) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, rows * columns, F), the last hidden states of the patches.

        The pictures are resized so that the model has rows x columns patches. Class token and registers are left out.
        ValueError if the model gives another number of patches.
        """
        size = (rows * self.shape.patch, columns * self.shape.patch)
        slices = max(1, math.ceil(len(pixels_B3HW) * math.prod(size) / _PIXELS_AT_ONCE))
        parts = pixels_B3HW.tensor_split(min(len(pixels_B3HW), slices))
        return torch.cat([self._features(part_B3HW, size, rows * columns) for part_B3HW in parts])

    def _features(self, pixels_B3HW: Tensor, size: tuple[int, int], patches: int) -> Tensor:
        x_B3HW = pixels_B3HW.float()
        if x_B3HW.shape[2:] != size:
            x_B3HW = F.interpolate(x_B3HW, size, mode="bicubic", antialias=True).clamp(0, 255)
        x_B3HW = (x_B3HW / 255 - self._mean_311) / self._std_311
        states_BSF: Tensor = self.model(pixel_values=x_B3HW.to(self.model.dtype), **self._options).last_hidden_state
        others = states_BSF.shape[1] - patches if states_BSF.dim() == 3 else -1
        if not 0 <= others <= _MOST_OTHER_TOKENS:
            raise ValueError(
                f"the vision model {self.name!r} gives states of shape {tuple(states_BSF.shape[1:])} for {patches} "
                "patches; it must be a plain vision transformer, such as facebook/dinov2-base"
            )
        return states_BSF[:, others:].float()


def load_vision_model(name: str, device: torch.device | str = "cpu") -> VisionModel:
    """Loads a vision transformer from a folder, without network access, or from a hub name, downloaded once.

    It computes in bfloat16 on a GPU and in float32 elsewhere. Only complete weights in safetensors are accepted, and
    code that comes with a model never runs. Raises ValueError if it cannot be loaded.
    """
    shape = vision_shape(name)
    folder = pretrained_folder(name, (_CONFIG, _PREPROCESSOR, "*.safetensors"), *_KIND)
    from transformers import AutoModel  # lazy: takes seconds

    try:
        with quiet("transformers"), torch.random.fork_rng(devices=[]):
            model, report = AutoModel.from_pretrained(
                folder,
                dtype=frozen_dtype(device),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(_not_loaded(name, first_line(error))) from error
    # The pooler is not used, and many checkpoints lack it. transformers would initialise the others randomly.
    if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):
        raise ValueError(_not_loaded(name, f"{len(missing)} weights are missing, such as {missing[0]}"))
    return VisionModel(name, getattr(model, "vision_model", model).to(device), shape)


def vision_shape(name: str) -> VisionShape:
    """The shape of `load_vision_model(name)`, from its configs alone. ValueError if they are not of a vision model."""
    folder = pretrained_folder(name, (_CONFIG, _PREPROCESSOR), *_KIND)
    config, processor = (_read(name, folder / file) for file in (_CONFIG, _PREPROCESSOR))
    part = config.get("vision_config", config)
    width, patch = (part.get(field) for field in ("hidden_size", "patch_size"))
    if not (isinstance(width, int) and isinstance(patch, int)) or part.get("num_channels", 3) != 3:
        raise ValueError(
            _not_loaded(name, f"its {_CONFIG} has no hidden_size and patch_size, or is not for pictures of 3 channels")
        )
    if abs(processor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3 or not processor.get("do_rescale", True):
        raise ValueError(_not_loaded(name, f"its {_PREPROCESSOR} does not scale pixels to [0, 1]"))
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if not (_three_numbers(mean) and _three_numbers(std) and min(std) > 0):
        raise ValueError(_not_loaded(name, f"its {_PREPROCESSOR} has no image_mean and image_std of three numbers"))
    return VisionShape(width, patch, tuple(mean), tuple(std))


@lru_cache
def vision_parameters(name: str) -> int:
    """Parameters of the vision model, counted without allocating them; those of ViT-L if it is not on this machine."""
    folder = cached_folder(name)
    if folder is None or not (folder / _CONFIG).is_file():
        return _TYPICAL_PARAMETERS
    from transformers import AutoConfig, AutoModel

    with quiet("transformers"), torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModel.from_config(getattr(config, "vision_config", config), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(_not_loaded(name, first_line(error))) from error
    return sum(parameter.numel() for parameter in model.parameters())


def _read(name: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(_not_loaded(name, first_line(error))) from error
    if not isinstance(content, dict):
        raise ValueError(_not_loaded(name, f"its {file.name} is not a JSON object"))
    return content


def _three_numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and len(values) == 3 and all(isinstance(v, int | float) for v in values)


def _not_loaded(name: str, reason: str) -> str:
    return (
        f"the vision model {name!r} cannot be used ({reason}). It needs {_KIND[1]}, of a plain vision transformer that "
        f"transformers supports without remote code, such as {_KIND[2]}"
    )
