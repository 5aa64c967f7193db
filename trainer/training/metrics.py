"""Counts and seconds -> the metrics of a run: speed, share of the GPU's peak, cost, time left.

A line holds averages since the previous line (loss, speed, shares) and totals of the run (cost, skipped steps).
METRICS describes each metric.
"""

import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch

from trainer.model.config import XUTConfig
from trainer.model.flops import count_flops

Line = dict[str, float | None]  # values by metric name; None if unknown


class Metric(NamedTuple):
    unit: str
    description: str


GAUGE_PREFIX = "hdm_train_"  # of the Prometheus gauges

METRICS = {
    "step": Metric("steps", "optimizer steps taken, including skipped ones"),
    "loss": Metric("", "mean weighted squared error of the velocity"),
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
    "data_wait_share": Metric("", "share of the time that workers wait for batches"),
    "encoder_share": Metric("", "share of the time spent in the image and text encoders"),
    "gpu_memory_bytes": Metric("bytes", "peak memory of tensors on a GPU"),
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


@dataclass(frozen=True)
class Counts:
    """Totals of a worker since it started. They can be added over workers and subtracted over time."""

    images: float = 0
    tokens: float = 0
    operations: float = 0  # floating-point operations
    waiting_seconds: float = 0  # for batches
    encoding_seconds: float = 0
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


def log_line(
    job: JobContext,
    last: Snapshot,
    now: Snapshot,
    *,
    loss: float,
    grad_norm: float,
    learning_rate: float,
    grad_norm_limit: float = math.inf,
    gpu_memory_bytes: float | None = None,
    skipped_steps: int = 0,
    outlier_steps: int = 0,
    failed_saves: int = 0,
    failed_writes: int = 0,
) -> Line:
    """The metrics between two snapshots. ValueError unless both time and steps lie between them.

    Checkpoints and evaluations in between count as training time; take `last` after them to exclude it.
    """
    seconds = now.seconds - last.seconds
    if seconds <= 0 or now.step <= last.step:
        raise ValueError(f"no window: {seconds} s and {now.step - last.step} steps since the last line")
    done = now.counts - last.counts
    teraflops = done.operations / seconds / 1e12
    peak = None if job.peak_teraflops is None else job.workers * job.peak_teraflops
    dollars = None if job.price_per_hour is None else job.before.dollars + job.price_per_hour * now.seconds / 3600
    return {
        "step": now.step,
        "loss": loss,
        "grad_norm": grad_norm,
        "grad_norm_limit": grad_norm_limit if math.isfinite(grad_norm_limit) else None,
        "learning_rate": learning_rate,
        "images_per_second": done.images / seconds,
        "tokens_per_second": done.tokens / seconds,
        "teraflops": teraflops,
        "share_of_peak": None if peak is None else teraflops / peak,
        "data_wait_share": done.waiting_seconds / (job.workers * seconds),
        "encoder_share": done.encoding_seconds / (job.workers * seconds),
        "gpu_memory_bytes": gpu_memory_bytes,
        "seconds": job.before.seconds + now.seconds,
        "dollars": dollars,
        "hours_left": (job.stop_step - now.step) * now.seconds / (now.step - job.start_step) / 3600,
        "skipped_steps": skipped_steps,
        "outlier_steps": outlier_steps,
        "cut_text_share": done.cut_texts / max(1.0, done.images),
        "replaced_samples": now.counts.replaced,
        "failed_saves": failed_saves,
        "failed_writes": failed_writes,
    }


def progress_text(line: Mapping[str, float | None]) -> str:
    """A line's metrics for the end of a progress bar. Failures are listed only if there are any."""

    def known(name: str, form: str) -> list[str]:
        value = line.get(name)
        return [] if value is None else [form.format(value)]

    parts = known("loss", "loss {:.3f}") + known("images_per_second", "{:.0f} images/s")
    parts += [" ".join(known("teraflops", "{:.3g} TFLOP/s") + known("share_of_peak", "({:.0%} of peak)"))]
    parts += known("data_wait_share", "waiting for data {:.0%}") + known("dollars", "${:.2f}")
    parts += known("hours_left", "{:.1f} h left")
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


class Stopwatch:
    """Sums the time a device spends inside `running`. On a GPU the host does not wait until `seconds` is called."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if not self._on_gpu:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        self._open.append((begin, end))

    def seconds(self) -> float:
        """The sum so far; waits for unfinished work on the GPU."""
        for begin, end in self._open:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._open.clear()
        return self._seconds
