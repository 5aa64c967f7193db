"""Batches -> latents and text embeddings, by the frozen encoders. Needs torch and transformers only.

Axes: B batch, H height, W width, 3 = red, green, blue, 4 = (x0, y0, width, height).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.encoders.latents import Codec
from trainer.encoders.text import TextEncoder
from trainer.encoders.vision import VisionModel
from trainer.recipe.stages import StageConfig
from trainer.training.loop import TrainingInputs
from trainer.training.step_times import Stopwatch

if TYPE_CHECKING:
    from trainer.samples.data import Batch


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The numbers of texts with these lengths, ascending by length, in parts of `size`. Equal ones keep their order."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


def encode(
    batch: "Batch",
    codec: Codec,
    encoder: TextEncoder,
    stage: StageConfig,
    device: torch.device,
    padding_is_text: bool = False,
    text_time: Stopwatch | None = None,
    vae_time: Stopwatch | None = None,
    vision: VisionModel | None = None,
) -> TrainingInputs:
    """Pixels -> latents and texts -> embeddings, by the frozen encoders; with `vision` also pixels -> features of the
    image tokens. `vae_time` counts both that is done with the pixels."""
    with text_time.running() if text_time else nullcontext():
        text_BTD, mask_BT = encoder.encode(batch.texts, stage.text_tokens, stage.text_multiple, padding_is_text)
    with vae_time.running() if vae_time else nullcontext():
        pixels_B3HW = _on_device(batch.pixels_BHW3, device).permute(0, 3, 1, 2)
        latents_BCHW = codec.encode(pixels_B3HW)
        rows, columns = (side // stage.patch_size for side in latents_BCHW.shape[-2:])
        features_BNF = vision.features(pixels_B3HW, rows, columns) if vision else None
    return TrainingInputs(
        latents_BCHW=latents_BCHW,
        text_BTD=text_BTD,
        text_mask_BT=mask_BT,
        frame_B4=_on_device(batch.frame_B4, device),
        keys_B=_on_device(batch.keys_B, device),
        features_BNF=features_BNF,
    )


def _on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copies without making the host wait for the GPU, which takes pinned memory."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
