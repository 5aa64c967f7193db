"""Chooses the fastest attention kernel for a run's shapes, on the GPU that it runs on.

RUN/STAGE/attention.json records the choice and the measured times, so that a resumed run computes as before. Removing
it makes the next start measure again.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, get_args

import torch
from torch import Tensor

from pipeline.storage.shards import Store
from trainer.model.attention import Kernel, attention, padding_of
from trainer.recipe.training import Training

_FILE: Final = "attention.json"
_KERNELS: Final[tuple[Kernel, ...]] = get_args(Kernel)
_SAMPLES: Final = 8
_ROUNDS: Final = 10
_TOLERANCE: Final = 0.02  # relative; bfloat16 rounds by up to 2^-9, attending to padding changes a tenth or more


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
    Store(training.folder).write(_FILE, json.dumps(content, indent=1).encode())
    return kernel, seconds


def measure(
    device: torch.device,
    heads: int,
    head_dim: int,
    image_tokens: int,
    text_tokens: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[Kernel, float]:
    """Seconds of a forward and a backward pass by each kernel that runs here and agrees with torch's default.

    Texts have from a quarter of `text_tokens` to all of them.
    """
    tokens = image_tokens + text_tokens
    generator = torch.Generator(device).manual_seed(0)
    shape = (4, _SAMPLES, tokens, heads, head_dim)
    *qkv, gradient_BSAE = torch.randn(shape, generator=generator, device=device, dtype=dtype).unbind(0)
    lengths_B = torch.linspace(image_tokens + text_tokens / 4, tokens, _SAMPLES, device=device).long()
    real_BS = torch.arange(tokens, device=device) < lengths_B[:, None]
    gradient_BSAE = gradient_BSAE * real_BS[:, :, None, None]

    def run(kernel: Kernel) -> list[Tensor]:
        inputs = q, k, v = [x_BSAE.detach().requires_grad_() for x_BSAE in qkv]
        out_BSAE = attention(q, k, v, padding_of(real_BS, kernel), kernel)
        torch.autograd.backward(out_BSAE, gradient_BSAE)
        return [x[real_BS].float() for x in (out_BSAE.detach(), *(x.grad for x in inputs if x.grad is not None))]

    expected = run("default")
    seconds: dict[Kernel, float] = {}
    for kernel in _KERNELS:
        try:
            found = run(kernel)
        except (RuntimeError, TypeError, NotImplementedError):  # not for this device, dtype or head size
            continue
        if all((a - b).norm() < _TOLERANCE * b.norm() for a, b in zip(found, expected, strict=True)):
            seconds[kernel] = min(_timed(partial(run, kernel), device) for _ in range(_ROUNDS))
    return seconds


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _measured_for(training: Training, name: str) -> dict[str, Any]:
    """What the fastest kernel depends on."""
    stage = training.stage
    shapes = {"resolution": stage.resolution, "text_tokens": stage.text_tokens, "heads": training.model.heads}
    return shapes | {"dim": training.model.dim, "device": name, "torch": torch.__version__}
