"""The metrics of a run against values computed by hand."""

import pytest
import torch

from trainer.model.config import XUTConfig
from trainer.model.flops import count_flops
from trainer.training.metrics import (
    LABELS,
    METRICS,
    Counts,
    EarlierCost,
    JobContext,
    Snapshot,
    batch_counts,
    log_line,
    peak_teraflops,
    progress_text,
)
from trainer.training.step_times import RankTimes

# Two workers from step 100 to 300 on GPUs of 10 TFLOP/s at 7.20 $/h. An earlier start took 1,000 s and 2 $.
JOB = JobContext(
    start_step=100,
    stop_step=300,
    workers=2,
    peak_teraflops=10.0,
    price_per_hour=7.2,
    before=EarlierCost(seconds=1000, dollars=2.0),
    startup_seconds=92.0,  # the first step, which compiled
)
# 50 steps of 8 images in 200 s, then 10 in 10 s. In these the two workers together waited 2 s and encoded 5 s.
LAST = Snapshot(step=150, seconds=200.0, counts=Counts(images=400, tokens=4000, operations=4e15, replaced=1))
NOW = Snapshot(
    step=160,
    seconds=210.0,
    counts=Counts(
        images=480, tokens=4800, operations=4.05e15, waiting_seconds=2.0, text_seconds=4.0, vae_seconds=1.0,
        model_seconds=11.0, sums_seconds=1.5, replaced=3, cut_texts=4,
    ),
    ranks=(RankTimes(0.8, 0.0625), RankTimes(0.9, 0.125)),
)  # fmt: skip


def test_a_line_has_averages_since_the_last_one_and_totals_since_the_start() -> None:
    line = log_line(
        JOB, LAST, NOW, loss=0.5, grad_norm=1.5, learning_rate=2e-3, gpu_memory_bytes=3e9, skipped_steps=4,
        grad_norm_limit=2.5, repa_loss=0.75, outlier_steps=1, failed_saves=5, failed_writes=6,
    )  # fmt: skip
    assert line == {
        "step": 160,
        "loss": 0.5,
        "repa_loss": 0.75,
        "grad_norm": 1.5,
        "grad_norm_limit": 2.5,
        "learning_rate": 2e-3,
        "images_per_second": 8.0,  # 80 / 10 s
        "tokens_per_second": 80.0,
        "teraflops": 5.0,  # 5e13 / 10 s
        "share_of_peak": 0.25,  # of 2 x 10
        "step_seconds": 1.0,
        "data_wait_share": 0.1,  # 2 of 2 x 10 s
        "encoder_share": 0.25,
        "text_encoder_share": 0.2,
        "vae_share": 0.05,
        "model_share": 0.55,
        "sums_share": 0.075,
        "rank_step_seconds/0": 0.8,
        "rank_step_seconds/1": 0.9,
        "rank_data_wait_seconds/0": 0.0625,
        "rank_data_wait_seconds/1": 0.125,
        "gpu_memory_bytes": 3e9,
        "seconds": 1210.0,
        "dollars": pytest.approx(2.42),  # 2 + 7.2 x 210 / 3600
        "hours_left": pytest.approx(140 * 2 / 3600),  # 140 steps at the (210 - 92) s / 59 of this start
        "skipped_steps": 4,
        "outlier_steps": 1,
        "cut_text_share": 0.05,  # 4 of 80
        "replaced_samples": 3,
        "failed_saves": 5,
        "failed_writes": 6,
    }
    assert {name.partition("/")[0] for name in line} <= METRICS.keys()
    assert {name.partition("/")[0] for name in line if "/" in name} <= LABELS.keys()


def test_a_time_without_samples_has_no_loss() -> None:
    line = log_line(
        JOB, LAST, NOW, loss=1.0, grad_norm=1.0, learning_rate=1.0, loss_by_time={0.25: 0.5, 0.75: float("nan")}
    )
    assert (line["loss_by_time/0.25"], line["loss_by_time/0.75"]) == (0.5, None)


def test_unknown_metrics_are_none() -> None:
    job = JobContext(start_step=0, stop_step=10, workers=1, peak_teraflops=None, price_per_hour=None)
    line = log_line(job, Snapshot(step=0), Snapshot(step=1, seconds=1.0), loss=1.0, grad_norm=1.0, learning_rate=1.0)
    unknown = [name for name, value in line.items() if value is None]
    assert unknown == ["repa_loss", "grad_norm_limit", "share_of_peak", "gpu_memory_bytes", "dollars"]
    assert line["hours_left"] == pytest.approx(9 / 3600)


@pytest.mark.parametrize("now", [Snapshot(step=150, seconds=201), Snapshot(step=151, seconds=200)])
def test_a_window_without_steps_or_time_is_refused(now: Snapshot) -> None:
    with pytest.raises(ValueError, match="no window"):
        log_line(JOB, LAST, now, loss=1.0, grad_norm=1.0, learning_rate=1.0)


def test_counts_can_be_summed_over_workers_as_plain_numbers() -> None:
    one, two = Counts(images=1, waiting_seconds=0.5), Counts(images=2, tokens=7, replaced=1)
    summed = torch.tensor(one.numbers(), dtype=torch.float64) + torch.tensor(two.numbers(), dtype=torch.float64)
    assert Counts(*summed.tolist()) == one + two == Counts(images=3, tokens=7, waiting_seconds=0.5, replaced=1)
    assert one + two - two == one


def test_a_batch_counts_the_arithmetic_of_its_images() -> None:
    model = XUTConfig.tiny(in_channels=4, text_dim=16)
    counts = batch_counts(model, images=3, image_tokens=64, text_tokens=8, selection_rate=0.5, cut_texts=1)
    step = count_flops(model, 64, 8, 0.5).step
    assert counts == Counts(images=3, tokens=3 * 72, operations=3 * step, cut_texts=1)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_a_peak_is_known_for_exact_device_names_only(name: str, peak: float | None) -> None:
    assert peak_teraflops(name) == peak


def test_the_progress_text_lists_only_failures_that_happened() -> None:
    line = log_line(JOB, LAST, NOW, loss=0.5, grad_norm=1.5, learning_rate=2e-3, skipped_steps=2)
    assert progress_text(line) == (
        "loss 0.500, 8 images/s, 5 TFLOP/s (25% of peak), 1 s/step (data 10%, text encoder 20%, VAE 5%, model 55%, "
        "adding gradients 8%), $2.42, 5 min left, 2 skipped steps, 3 replaced samples"
    )
    assert progress_text({"hours_left": 12.34, "text_encoder_share": 0.001}) == "12.3 h left"
    assert progress_text({"hours_left": 0.01}) == "36 s left"
    assert progress_text({"step": 1, "loss": 0.25, "dollars": None, "teraflops": 0.01}) == "loss 0.250, 0.01 TFLOP/s"
