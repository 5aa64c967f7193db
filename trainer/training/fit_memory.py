"""How many samples a worker computes at once: as many as fit, found once per run and lowered if memory runs out later.

RUN/STAGE/memory.json records the choice, so that a restarted worker neither probes again nor fails in the same way.
Removing it makes the next start probe again.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.core.errors import JobFailed
from pipeline.storage.shards import Store
from trainer.encoders.latents import Codec
from trainer.encoders.text import TextEncoder
from trainer.encoders.vision import VisionModel
from trainer.recipe import memory
from trainer.recipe.memory import Fit
from trainer.recipe.stages import StageConfig
from trainer.recipe.training import Training
from trainer.samples.data import Batch
from trainer.training.encoding import encode
from trainer.training.loop import Loop

_FILE = "memory.json"


def is_chosen_by_stage(training: Training) -> bool:
    return "auto" not in (training.stage.micro_batch, training.stage.checkpointing)


def remembered(training: Training, device: str) -> Training | None:
    """The job with the choice recorded in its folder; None without one for this device and these settings.

    What fits with another number of workers fits too, but it may not divide a worker's share of the batch.
    """
    try:
        record = json.loads((Path(training.folder) / _FILE).read_text())
        if record["chosen_for"] | {"workers": training.workers} != _chosen_for(training, device):
            return None
        sizes = memory.micro_batches(training.stage, training.workers)
        fit = Fit(next(size for size in sizes if size <= record["micro_batch"]), record["checkpointing"])
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None
    return with_fit(training, fit)


def record(training: Training, device: str, reason: str) -> None:
    """Writes the job's choice to its folder."""
    choice = {"micro_batch": training.micro_batch, "checkpointing": training.checkpointing, "reason": reason}
    content = choice | {"chosen_for": _chosen_for(training, device)}
    Store(training.folder).write(_FILE, json.dumps(content, indent=1).encode())


def with_fit(training: Training, fit: Fit) -> Training:
    return replace(training, micro_batch=fit.micro_batch, checkpointing=fit.checkpointing)


def estimated(training: Training, available: float) -> Fit:
    """The largest micro batch that the estimate expects to fit, for the first probe. JobFailed if none does."""
    arguments = training.model, training.stage, training.workers, training.codec_factor
    fit = memory.fitting(*arguments, available, training.lora is not None)
    if fit is None:
        raise JobFailed(
            f"not even one sample fits into the {available / 1e9:.0f} GB that are free on the GPU (an estimate): end "
            "other programs on it, or train a smaller model, as with --set model=small"
        )
    return fit


def lowered(training: Training, error: BaseException) -> Training:
    """The job with half of the micro batch after memory ran out, or with more recomputation if that is one sample.

    JobFailed if nothing is left to lower.
    """
    kinds = list(memory.RECOMPUTED)
    more = kinds.index(training.checkpointing) + 1
    if training.micro_batch > 1:
        sizes = memory.micro_batches(training.stage, training.workers)
        return replace(training, micro_batch=next(size for size in sizes if size <= training.micro_batch // 2))
    if more < len(kinds):
        return replace(training, checkpointing=kinds[more])
    raise JobFailed(f"memory is full with one sample at a time and all blocks recomputed ({first_line(error)})")


def is_out_of_memory(error: BaseException) -> bool:
    """True if a device or the host could not allocate. torch's allocator for CPUs raises a plain RuntimeError."""
    full = "can't allocate memory" in str(error) or "not enough memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and full)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def largest_fitting(sizes: Sequence[int], first: int, peak: Callable[[int], float], idle: float, limit: float) -> int:
    """The largest of `sizes` (descending) whose measured peak is within the limit; 0 if there is none.

    peak: bytes that a step of this size takes, inf if memory runs out; each call may take minutes, because it compiles.
    idle: bytes that are taken without a step. Peaks grow linearly with the size, so that a few calls suffice.
    """
    peaks: dict[int, float] = {}
    size = first
    while size and size not in peaks:
        peaks[size] = peak(size)
        fits = [s for s in sizes if peaks.get(s, math.inf) <= limit]
        known = {s: p for s, p in peaks.items() if math.isfinite(p)}
        if known:
            each = max((p - idle) / s for s, p in known.items())
            expected = [s for s in sizes if idle + s * each <= limit]
        else:
            expected = [s for s in sizes if s <= size // 2]
        too_large = min((s for s, p in peaks.items() if p > limit), default=math.inf)
        size = next((s for s in expected if s < too_large), 0)
        if fits and size <= fits[0]:
            break
    return max((s for s, p in peaks.items() if p <= limit), default=0)


def probe(
    training: Training,
    loop: Loop,
    codec: Codec,
    encoder: TextEncoder,
    pads_text: bool,
    vision: VisionModel | None = None,
) -> tuple[int, str]:
    """The largest micro batch whose real step fits on the GPU, and a line that says so.

    Rehearses steps with the longest texts: encoders, forward and backward pass, optimizer. 0 if none fits.
    """
    device, stage = loop.device, training.stage

    def rehearse(size: int) -> None:
        batch = synthetic_batch(stage, size)
        loop.rehearse(encode(batch, codec, encoder, stage, device, pads_text, vision=vision))

    def peak(size: int) -> float:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            rehearse(size)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            return math.inf
        return torch.cuda.max_memory_reserved(device)

    rehearse(1)  # allocates moments
    torch.cuda.empty_cache()
    idle = float(torch.cuda.memory_reserved(device))
    limit = (torch.cuda.mem_get_info(device)[0] + idle) * (1 - memory.MARGIN)
    peaks: dict[int, float] = {}

    def noted(size: int) -> float:
        peaks[size] = peak(size)
        return peaks[size]

    size = largest_fitting(memory.micro_batches(stage, training.workers), training.micro_batch, noted, idle, limit)
    torch.cuda.empty_cache()
    return size, f"a step takes {peaks.get(size, math.nan) / 1e9:.1f} of {limit / 1e9:.1f} GB"


def synthetic_batch(stage: StageConfig, size: int) -> Batch:
    """Noise with the longest texts."""
    side = stage.resolution
    return Batch(
        ids=[str(i) for i in range(size)],
        pixels_BHW3=np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8),
        frame_B4=np.tile(np.array([0, 0, 1.5 * side, side], np.float32), (size, 1)),
        texts=["one red ball " * stage.text_tokens] * size,
        keys_B=np.arange(size, dtype=np.int64),
        replaced=[],
    )


def _chosen_for(training: Training, device: str) -> dict[str, Any]:
    """What the memory of a step depends on."""
    stage = training.stage
    fields = (
        *("batch_size", "resolution", "text_tokens", "micro_batch", "checkpointing", "ema_snapshots", "precision"),
        "fp8",
    )
    found = {name: getattr(stage, name) for name in fields}
    found |= {"repa.features": stage.repa.features, "repa.width": stage.repa.width}
    return found | {"model": training.model.to_dict(), "workers": training.workers, "device": device}
