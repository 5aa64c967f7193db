"""Counts and seconds -> the metrics of a run: speed, share of the GPU's peak, cost, time left.

A line holds averages since the previous line (loss, speed, shares) and totals of the run (cost, skipped steps).
METRICS describes each metric.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import NamedTuple

from trainer.model.config import XUTConfig
from trainer.model.flops import count_flops
from trainer.training.step_times import RankTimes

Line = dict[str, float | None]  # values by metric name; None if unknown


class Metric(NamedTuple):
    unit: str
    description: str


GAUGE_PREFIX = "hdm_train_"  # of the Prometheus gauges

METRICS = {
    "step": Metric("steps", "optimizer steps taken, including skipped ones"),
    "loss": Metric("", "mean weighted squared error of the velocity"),
    "loss_by_time": Metric("", "loss of the samples around a time between 0, the data, and 1, the noise"),
    "repa_loss": Metric("", "mean of 1 - cosine of image tokens and a vision model's features, while they are aligned"),
    "grad_norm": Metric("", "norm of the whole gradient before clipping"),
    "grad_norm_limit": Metric("", "gradient norm above which the last step was skipped as an outlier"),
    "learning_rate": Metric("", "AdamW's learning rate at the base width"),
    "images_per_second": Metric("1/s", "crops trained on, over all workers"),
    "tokens_per_second": Metric("1/s", "image and text tokens given to the model, including padding, over all workers"),
    "teraflops": Metric(
        "TFLOP/s",
        "matrix products of the model's forward and backward pass, over all workers; without the encoders, "
        "recomputation by checkpointing, norms, softmax and the optimizer",
    ),
    "share_of_peak": Metric("", "teraflops over the dense bfloat16 peak of all GPUs"),
    "step_seconds": Metric("s", "time of a step, with checkpoints and logs in between"),
    "data_wait_share": Metric("", "share of the time that workers, on GPUs the devices, wait for batches"),
    "encoder_share": Metric("", "share of the time spent in the image and text encoders"),
    "text_encoder_share": Metric("", "share of the time spent in the text encoder"),
    "vae_share": Metric("", "share of the time spent in the image encoder and, if there is one, the vision model"),
    "model_share": Metric("", "share of the time spent in forward and backward passes and the optimizer"),
    "sums_share": Metric(
        "", "share of the time spent adding the gradients of all workers, waiting for slower ones included"
    ),
    "rank_step_seconds": Metric(
        "s", "own work of a worker on a step, without waiting for data or other workers: median of its steps"
    ),
    "rank_data_wait_seconds": Metric("s", "time of a step that a worker waits for its batch: median of its steps"),
    "startup_seconds": Metric("s", "time of each phase of the start"),
    "gpu_memory_bytes": Metric("bytes", "peak memory of tensors on a GPU"),
    "gpu_clock_hertz": Metric("Hz", "clock of the multiprocessors, of the slowest GPU"),
    "gpu_memory_clock_hertz": Metric("Hz", "clock of the memory, of the slowest GPU"),
    "gpu_celsius": Metric("C", "temperature of the hottest GPU"),
    "gpu_watts": Metric("W", "power of all GPUs together"),
    "gpu_memory_used_bytes": Metric("bytes", "memory in use by all processes on the fullest GPU"),
    "gpu_corrected_errors": Metric("", "memory errors corrected by ECC, since the drivers were loaded, on all GPUs"),
    "gpu_uncorrected_errors": Metric("", "memory errors that ECC could not correct, likewise"),
    "seconds": Metric("s", "training time, over all starts of the run"),
    "dollars": Metric("$", "cost, over all starts of the run"),
    "hours_left": Metric("h", "time to the last step at the speed of this start"),
    "skipped_steps": Metric(
        "steps",
        "steps skipped because loss or gradient were not finite or the gradient norm an outlier, over all starts",
    ),
    "outlier_steps": Metric("steps", "steps skipped because the gradient norm was an outlier, over all starts"),
    "cut_text_share": Metric("", "share of the texts that were longer than the stage's text_tokens and were cut"),
    "replaced_samples": Metric("samples", "unreadable samples replaced by others, since this start"),
    "failed_saves": Metric("", "checkpoints that could not be saved, since this start"),
    "failed_writes": Metric("", "lines and pictures that could not be logged, since this start"),
    "validation_loss": Metric("", "mean loss of the averaged weights on held-out samples at eight fixed times"),
    "tag_agreement": Metric("", "share of the prompts' tags that the tagger finds in the pictures"),
}


# Metrics with one value per rank, phase or time -> the label that tells them apart. They are named "metric/value of the
# label" in a line, such as "rank_step_seconds/0".
LABELS = {
    "rank_step_seconds": "rank",
    "rank_data_wait_seconds": "rank",
    "startup_seconds": "phase",
    "loss_by_time": "t",
}

COMPILE, FIRST_STEP = "compile", "first step"  # the last phase of a start: with or without compiling


@dataclass(frozen=True)
class Counts:
    """Totals of a worker since it started. They can be added over workers and subtracted over time."""

    images: float = 0
    tokens: float = 0
    operations: float = 0  # floating-point operations
    waiting_seconds: float = 0  # for batches
    text_seconds: float = 0  # in the text encoder
    vae_seconds: float = 0  # in the image encoder
    model_seconds: float = 0  # forward and backward passes, optimizer
    sums_seconds: float = 0  # of gradients over the workers
    replaced: float = 0  # samples
    cut_texts: float = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(a + b for a, b in zip(self.numbers(), other.numbers(), strict=True)))

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts(*(a - b for a, b in zip(self.numbers(), other.numbers(), strict=True)))

    def numbers(self) -> list[float]:
        """The fields as a list, for one all-reduce; `Counts(*numbers)` is the inverse."""
        return list(astuple(self))


def batch_counts(
    model: XUTConfig,
    images: int,
    image_tokens: int,
    text_tokens: int,
    selection_rate: float,
    cut_texts: int = 0,
    frozen: bool = False,
) -> Counts:
    """Counts of one micro batch. `text_tokens` includes padding. frozen: only adapters are trained."""
    done = count_flops(model, image_tokens, text_tokens, selection_rate)
    return Counts(
        images=images,
        tokens=images * (image_tokens + text_tokens),
        operations=images * (done.frozen_step if frozen else done.step),
        cut_texts=cut_texts,
    )


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Progress of a job at a point in time. A log line covers the time between two snapshots."""

    step: int
    seconds: float = 0  # since this start of the run
    counts: Counts = Counts()  # summed over the workers, since this start
    ranks: tuple[RankTimes, ...] = ()  # of each worker, since the last log line


@dataclass(frozen=True, kw_only=True)
class EarlierCost:
    """Totals of the run's earlier starts."""

    seconds: float = 0
    dollars: float = 0


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """Constants of a job that its metrics are computed with."""

    start_step: int
    stop_step: int
    workers: int
    peak_teraflops: float | None  # of one worker's GPU, see `peak_teraflops`
    price_per_hour: float | None  # dollars, for all machines together
    before: EarlierCost = EarlierCost()
    startup_seconds: float = 0  # of this start until its first step has ended, which may have compiled for minutes


def log_line(
    job: JobContext,
    last: Snapshot,
    now: Snapshot,
    *,
    loss: float,
    grad_norm: float,
    learning_rate: float,
    grad_norm_limit: float = math.inf,
    loss_by_time: Mapping[float, float] | None = None,
    repa_loss: float = math.nan,
    gpu_memory_bytes: float | None = None,
    skipped_steps: int = 0,
    outlier_steps: int = 0,
    failed_saves: int = 0,
    failed_writes: int = 0,
) -> Line:
    """The metrics between two snapshots. ValueError unless both time and steps lie between them.

    loss_by_time, repa_loss: nan if unknown.

    Checkpoints and evaluations in between count as training time; take `last` after them to exclude it.
    """
    seconds = now.seconds - last.seconds
    if seconds <= 0 or now.step <= last.step:
        raise ValueError(f"no window: {seconds} s and {now.step - last.step} steps since the last line")
    done = now.counts - last.counts
    teraflops = done.operations / seconds / 1e12
    peak = None if job.peak_teraflops is None else job.workers * job.peak_teraflops
    total = job.workers * seconds
    ranks = {f"rank_step_seconds/{rank}": times.step for rank, times in enumerate(now.ranks)}
    ranks |= {f"rank_data_wait_seconds/{rank}": times.data_wait for rank, times in enumerate(now.ranks)}
    dollars = None if job.price_per_hour is None else job.before.dollars + job.price_per_hour * now.seconds / 3600
    return {
        "step": now.step,
        "loss": loss,
        **{f"loss_by_time/{t}": None if math.isnan(at) else at for t, at in (loss_by_time or {}).items()},
        "repa_loss": None if math.isnan(repa_loss) else repa_loss,
        "grad_norm": grad_norm,
        "grad_norm_limit": grad_norm_limit if math.isfinite(grad_norm_limit) else None,
        "learning_rate": learning_rate,
        "images_per_second": done.images / seconds,
        "tokens_per_second": done.tokens / seconds,
        "teraflops": teraflops,
        "share_of_peak": None if peak is None else teraflops / peak,
        "step_seconds": seconds / (now.step - last.step),
        "data_wait_share": done.waiting_seconds / total,
        "encoder_share": (done.text_seconds + done.vae_seconds) / total,
        "text_encoder_share": done.text_seconds / total,
        "vae_share": done.vae_seconds / total,
        "model_share": done.model_seconds / total,
        "sums_share": done.sums_seconds / total,
        **ranks,
        "gpu_memory_bytes": gpu_memory_bytes,
        "seconds": job.before.seconds + now.seconds,
        "dollars": dollars,
        "hours_left": _hours_left(job, now),
        "skipped_steps": skipped_steps,
        "outlier_steps": outlier_steps,
        "cut_text_share": done.cut_texts / max(1.0, done.images),
        "replaced_samples": now.counts.replaced,
        "failed_saves": failed_saves,
        "failed_writes": failed_writes,
    }


def _hours_left(job: JobContext, now: Snapshot) -> float:
    """At the speed of this start after its first step."""
    steps, seconds = now.step - job.start_step, now.seconds
    if steps > 1:
        steps, seconds = steps - 1, seconds - job.startup_seconds
    return (job.stop_step - now.step) * seconds / steps / 3600


# In the progress line: parts of a step by metric.
_PARTS = {
    "data_wait_share": "data", "text_encoder_share": "text encoder", "vae_share": "VAE", "model_share": "model",
    "sums_share": "adding gradients",
}  # fmt: skip


def progress_text(line: Mapping[str, float | None]) -> str:
    """A line's metrics for the end of a progress bar. Failures are listed only if there are any."""

    def known(name: str, form: str) -> list[str]:
        value = line.get(name)
        return [] if value is None else [form.format(value)]

    parts = known("loss", "loss {:.3f}") + known("images_per_second", "{:.0f} images/s")
    parts += [" ".join(known("teraflops", "{:.3g} TFLOP/s") + known("share_of_peak", "({:.0%} of peak)"))]
    shares = ", ".join(f"{part} {line[name]:.0%}" for name, part in _PARTS.items() if (line.get(name) or 0) >= 0.005)
    parts += [" ".join(known("step_seconds", "{:.3g} s/step") + ([f"({shares})"] if shares else []))]
    parts += known("dollars", "${:.2f}")
    if (hours := line.get("hours_left")) is not None:
        minutes = f"{60 * hours:.0f} min left" if 60 * hours >= 1 else f"{3600 * hours:.0f} s left"
        parts += [f"{hours:.1f} h left" if hours >= 1 else minutes]
    for name in ("skipped_steps", "outlier_steps", "replaced_samples", "failed_saves", "failed_writes"):
        parts += known(name, "{:.0f} " + name.replace("_", " ")) if line.get(name) else []
    return ", ".join(part for part in parts if part)


# Dense bfloat16 TFLOP/s with fp32 accumulation, by torch's device name without "NVIDIA". From NVIDIA's data sheets,
# halved if a sheet counts sparse matrices. Laptop and MIG devices differ and are not listed.
_PEAKS = (
    (r"GeForce RTX 3090", 71.0),  # GA102 white paper, appendix A
    (r"RTX A6000", 154.8),  # GA102 white paper, appendix B
    (r"GeForce RTX 4090", 165.2),  # Ada white paper, appendix A
    (r"RTX 6000 Ada Generation", 364.2),  # RTX 6000 Ada data sheet: 1,457 in FP8 with sparsity
    (r"GeForce RTX 5090", 209.5),  # RTX Blackwell white paper, appendix A: half of its rate with fp16 accumulation
    (r"RTX PRO 6000 Blackwell (Workstation|Server) Edition", 503.8),  # RTX PRO Blackwell white paper
    (r"A100-(SXM4|SXM|PCIE)-(40|80)GB|A100 80GB PCIe", 312.0),  # A100 data sheet
    (r"L40S", 362.0),  # L40S data sheet: 362.05 | 733 with sparsity
    (r"H100 PCIe", 756.0),  # H100 data sheet of the PCIe card: 1,513 with sparsity
    (r"H100 NVL", 835.5),  # H100 data sheet: 1,671 with sparsity
    (r"H100 80GB HBM3|H200|GH200 480GB", 989.4),  # H100 and H200 data sheets: 1,979 with sparsity
)


def peak_teraflops(device_name: str) -> float | None:
    """Peak of the device that `torch.cuda.get_device_name()` names; None if it is unknown, as for "cpu"."""
    name = device_name.removeprefix("NVIDIA ").strip()
    return next((peak for pattern, peak in _PEAKS if re.fullmatch(pattern, name)), None)
