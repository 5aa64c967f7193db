"""Chooses the fastest attention kernel for a run's shapes, on the GPU that it runs on.

RUN/STAGE/attention.json records the choice and the measured times, so that a resumed run computes as before. Removing
it makes the next start measure again.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, get_args

import torch

from pipeline.storage.shards import Store
from trainer.model.attention import Kernel, measure
from trainer.recipe.training import Training

_FILE: Final = "attention.json"
_KERNELS: Final[tuple[Kernel, ...]] = get_args(Kernel)


def choose(training: Training, device: torch.device, name: str) -> tuple[Kernel, dict[Kernel, float]]:
    """The kernel of the run's record, or the fastest one and the seconds that each took, which are then recorded.

    On a CPU and in float32, torch's choice. `name`: of the device.
    """
    if device.type != "cuda" or training.stage.precision != "bf16":
        return "default", {}
    settings = _measured_for(training, name)
    try:
        record = json.loads((Path(training.folder) / _FILE).read_text())
        if record["measured_for"] == settings and record["kernel"] in _KERNELS:
            return record["kernel"], {}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    model, stage = training.model, training.stage
    image_tokens = (stage.resolution // training.codec_factor // model.patch_size) ** 2
    seconds = measure(device, model.heads, model.dim // model.heads, image_tokens, stage.text_tokens)
    kernel = min(seconds, key=lambda kernel: seconds[kernel])
    content = {"kernel": kernel, "seconds": seconds, "measured_for": settings}
    with suppress(OSError):  # a full disk does not end the training; the next start measures again
        Store(training.folder).write(_FILE, json.dumps(content, indent=1).encode())
    return kernel, seconds


def _measured_for(training: Training, name: str) -> dict[str, Any]:
    """What the fastest kernel depends on."""
    stage = training.stage
    shapes = {"resolution": stage.resolution, "text_tokens": stage.text_tokens, "heads": training.model.heads}
    return shapes | {"dim": training.model.dim, "device": name, "torch": torch.__version__}
