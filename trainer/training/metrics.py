"""Counts and seconds -> the figures of a run: speed, share of the GPU's peak, money, time. Pure, but for `Stopwatch`.

A line holds what happened since the line before it (loss, speed, shares) and what adds up over the run (money, steps
that were skipped). METRICS says what each figure is.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from typing import NamedTuple

import torch

from trainer.model.flops import products
from trainer.model.xut import XUTConfig

Line = dict[str, float | None]  # by name; None where there is nothing to say


class Metric(NamedTuple):
    unit: str
    description: str


# Of the gauges that Ray hands to Prometheus and its dashboard, before the names below.
GAUGE_PREFIX = "hdm_train_"

METRICS = {
    "step": Metric("steps", "optimizer steps, those included that were skipped"),
    "loss": Metric("", "mean of the weighted squared error of the velocity"),
    "grad_norm": Metric("", "norm of the whole gradient before it is clipped"),
    "learning_rate": Metric("", "of AdamW at the base width"),
    "images_per_second": Metric("1/s", "crops trained on, over all workers"),
    "tokens_per_second": Metric("1/s", "image and text tokens given to the model, padding included, over all workers"),
    "teraflops": Metric(
        "TFLOP/s",
        "matrix products of the model's forward and backward pass, over all workers; left out are the encoders, what "
        "checkpointing recomputes, norms, softmax and the optimizer",
    ),
    "share_of_peak": Metric("", "teraflops over the dense bfloat16 peak of all GPUs"),
    "data_wait_share": Metric("", "share of the time in which a worker waits for its batch"),
    "encoder_share": Metric("", "share of the time that goes into the image and the text encoder"),
    "gpu_memory_bytes": Metric("bytes", "most memory that tensors took on a GPU"),
    "seconds": Metric("s", "trained so far, over all starts of the run"),
    "dollars": Metric("$", "spent so far, over all starts of the run"),
    "hours_left": Metric("h", "until the last step, at the pace since this start"),
    "skipped_steps": Metric("steps", "skipped because loss or gradient was not finite, over all starts of the run"),
    "replaced_samples": Metric("samples", "since this start, unreadable ones that another sample stands in for"),
    "failed_saves": Metric("", "checkpoints since this start that could not be saved"),
    "failed_writes": Metric("", "lines and pictures since this start that could not be logged"),
    "validation_loss": Metric("", "mean loss on held-out samples at eight fixed times, averaged weights"),
    "tag_agreement": Metric("", "share of the prompts' tags that the tagger finds in the pictures"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a worker has done since it started. Sums over workers and differences over time are counts again."""

    images: float = 0
    tokens: float = 0
    operations: float = 0  # floating-point operations
    waiting_seconds: float = 0  # for batches
    encoding_seconds: float = 0
    replaced: float = 0  # samples

    def __add__(self, other: "Counts") -> "Counts":
        return Counts.of([a + b for a, b in zip(self.numbers(), other.numbers(), strict=True)])

    def __sub__(self, other: "Counts") -> "Counts":
        return Counts.of([a - b for a, b in zip(self.numbers(), other.numbers(), strict=True)])

    def numbers(self) -> list[float]:
        """For one all-reduce, as float64: its sum over workers is what `of` takes."""
        return list(astuple(self))

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Counts":
        return cls(**{field.name: number for field, number in zip(fields(cls), numbers, strict=True)})


def batch_counts(
    model: XUTConfig,
    images: int,
    image_tokens: int,
    text_tokens: int,
    selection_rate: float,
    waiting_seconds: float = 0,
    replaced: int = 0,
    frozen: bool = False,
) -> Counts:
    """Of one (micro-)batch: tokens are those of one image and its padded text. frozen: only adapters learn."""
    done = products(model, image_tokens, text_tokens, selection_rate)
    return Counts(
        images=images,
        tokens=images * (image_tokens + text_tokens),
        operations=images * (done.frozen_step if frozen else done.step),
        waiting_seconds=waiting_seconds,
        replaced=replaced,
    )


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Where a job stands. What lies between two marks is a window."""

    step: int
    seconds: float = 0  # since this start of the run
    counts: Counts = Counts()  # summed over the workers, since this start


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What the starts of a run before this one took."""

    seconds: float = 0
    dollars: float = 0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What a job's figures are reckoned with."""

    start_step: int
    stop_step: int
    workers: int
    peak_teraflops: float | None  # of one worker's GPU, see `peak_teraflops`
    price_per_hour: float | None  # dollars, of all machines together
    before: Spent = Spent()


def log_line(
    pace: Pace,
    last: Mark,
    now: Mark,
    *,
    loss: float,
    grad_norm: float,
    learning_rate: float,
    gpu_memory_bytes: float | None = None,
    skipped_steps: int = 0,
    failed_saves: int = 0,
    failed_writes: int = 0,
) -> Line:
    """The figures between two marks; ValueError unless time and steps have passed between them.

    A checkpoint or an evaluation between them counts as training time: make `last` a mark of after it to leave it out.
    """
    seconds = now.seconds - last.seconds
    if seconds <= 0 or now.step <= last.step:
        raise ValueError(f"no window: {seconds} s and {now.step - last.step} steps since the last line")
    done = now.counts - last.counts
    teraflops = done.operations / seconds / 1e12
    peak = None if pace.peak_teraflops is None else pace.workers * pace.peak_teraflops
    dollars = None if pace.price_per_hour is None else pace.before.dollars + pace.price_per_hour * now.seconds / 3600
    return {
        "step": now.step,
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "images_per_second": done.images / seconds,
        "tokens_per_second": done.tokens / seconds,
        "teraflops": teraflops,
        "share_of_peak": None if peak is None else teraflops / peak,
        "data_wait_share": done.waiting_seconds / (pace.workers * seconds),
        "encoder_share": done.encoding_seconds / (pace.workers * seconds),
        "gpu_memory_bytes": gpu_memory_bytes,
        "seconds": pace.before.seconds + now.seconds,
        "dollars": dollars,
        "hours_left": (pace.stop_step - now.step) * now.seconds / (now.step - pace.start_step) / 3600,
        "skipped_steps": skipped_steps,
        "replaced_samples": now.counts.replaced,
        "failed_saves": failed_saves,
        "failed_writes": failed_writes,
    }


def progress_text(line: Mapping[str, float | None]) -> str:
    """A line for the end of a progress bar; what goes wrong is named only where something does."""

    def said(name: str, form: str) -> list[str]:
        value = line.get(name)
        return [] if value is None else [form.format(value)]

    parts = said("loss", "loss {:.3f}") + said("images_per_second", "{:.0f} images/s")
    parts += [" ".join(said("teraflops", "{:.3g} TFLOP/s") + said("share_of_peak", "({:.0%} of peak)"))]
    parts += said("data_wait_share", "waiting for data {:.0%}") + said("dollars", "${:.2f}")
    parts += said("hours_left", "{:.1f} h left")
    for name in ("skipped_steps", "replaced_samples", "failed_saves", "failed_writes"):
        parts += said(name, "{:.0f} " + name.replace("_", " ")) if line.get(name) else []
    return ", ".join(part for part in parts if part)


# Dense bfloat16 with fp32 accumulation, TFLOP/s, by what torch calls the device without "NVIDIA": figures of NVIDIA's
# data sheets, halved where a sheet counts sparse matrices. Laptop and MIG devices are others, and unknown.
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
    """Of `torch.cuda.get_device_name()`; None for one that is not in the table, as "cpu"."""
    name = device_name.removeprefix("NVIDIA ").strip()
    return next((peak for pattern, peak in _PEAKS if re.fullmatch(pattern, name)), None)


class Stopwatch:
    """Adds up the time that a device spends within `running`; on a GPU without making the host wait for it."""

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
        begin, end = _event(), _event()
        begin.record()
        yield
        end.record()
        self._open.append((begin, end))

    def seconds(self) -> float:
        """So far; waits for what the GPU has not finished yet."""
        for begin, end in self._open:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._open.clear()
        return self._seconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
