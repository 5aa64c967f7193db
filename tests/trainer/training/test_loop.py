"""The training step: independent of how a batch is split, robust to non-finite numbers, bit-exact when resumed.

Run as a script this file is several workers: test_loop.py WORKERS FOLDER.
"""

import functools
import itertools
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode

import trainer.training.loop
from trainer.diffusion.flow import TIMES, draw_times
from trainer.diffusion.keyed_random import sample_key
from trainer.diffusion.repa import RepaConfig
from trainer.model.config import XUTConfig
from trainer.model.float8 import use_float8
from trainer.model.xut import XUT, compiled
from trainer.optimization.optimizers import OptimizerConfig
from trainer.optimization.outliers import LEAST_HISTORY
from trainer.optimization.schedule import Schedule
from trainer.recipe.stages import STAGES
from trainer.training.loop import Loop, StepResult, TrainingInputs

BATCH = 12
TEXT_TOKENS = 6
IMAGE_TOKENS, FEATURES = 16, 8
# aligned: by AdamW, with tokens aligned with the features of a vision model.
KINDS = ["adamw", "muon", "aligned"]
# High enough that a step moves weights by far more than the tolerance.
RATES: dict[str, Any] = {"learning_rate": 1e-3, "muon_learning_rate": 1e-3, "warmup_steps": 0}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def new_loop(
    kind: str = "adamw", device: str = "cpu", batch_size: int = BATCH, repa_samples: int = 0, **changes: Any
) -> Loop:
    torch.manual_seed(0)
    blocks: dict[str, Any] = {"depth": 1, "dec_blocks": 1, "prev_blocks": 0, "post_blocks": 0}
    model = XUT(XUTConfig(dim=32, heads=2, mlp_dim=48, text_dim=16, patch_size=1, **blocks)).to(device)
    aligned = kind == "aligned"
    optimizer: Any = "adamw" if aligned else kind
    changes = ({"feature_width": FEATURES} if aligned else {}) | changes
    stage = replace(
        STAGES["demo"],
        repa=RepaConfig(features="any", width=24, samples=repa_samples) if aligned else RepaConfig(),
        resolution=32,
        batch_size=batch_size,
        selection_rate=0.5,
        ema_decay=0.9,
        clip_norm=1.0,
        timestep_shift=2.0,
        optimizer=OptimizerConfig(kind=optimizer, **RATES),
    )
    return Loop(
        model, stage, Schedule(stage.optimizer, 20), torch.tensor([1.5, 0.5, 1.0, 1.0], device=device), **changes
    )


def batch_of(step: int) -> TrainingInputs:
    """A global batch with texts of 1 to TEXT_TOKENS tokens."""
    generator = torch.Generator().manual_seed(step)
    lengths_B = torch.arange(BATCH) % TEXT_TOKENS + 1
    mask_BT = torch.arange(TEXT_TOKENS) < lengths_B[:, None]
    text_BTD = torch.randn(BATCH, TEXT_TOKENS, 16, generator=generator) * mask_BT[:, :, None]
    return TrainingInputs(
        latents_BCHW=torch.randn(BATCH, 4, 4, 4, generator=generator),
        text_BTD=text_BTD,
        text_mask_BT=mask_BT,
        frame_B4=torch.tensor([3.0, 5.0, 48.0, 40.0]).expand(BATCH, 4),
        keys_B=torch.tensor([sample_key(0, 0, step * BATCH + slot) for slot in range(BATCH)]),
        features_BNF=torch.randn(BATCH, IMAGE_TOKENS, FEATURES, generator=generator),
    )


def split(batch: TrainingInputs, sizes: Sequence[int], first: int = 0) -> Iterator[TrainingInputs]:
    """Micro batches from slot `first` on, each padded to its own longest text."""
    for size in sizes:
        rows = slice(first, first := first + size)
        longest = int(batch.text_mask_BT[rows].sum(1).max())
        yield TrainingInputs(
            batch.latents_BCHW[rows],
            batch.text_BTD[rows, :longest],
            batch.text_mask_BT[rows, :longest],
            batch.frame_B4[rows],
            batch.keys_B[rows],
            None if batch.features_BNF is None else batch.features_BNF[rows],
        )


def broken(batch: TrainingInputs, value: float = float("nan"), slot: int = 0) -> TrainingInputs:
    latents_BCHW = batch.latents_BCHW.clone()
    latents_BCHW[slot, 0, 0, 0] = value
    return replace(batch, latents_BCHW=latents_BCHW)


def large(batch: TrainingInputs, slot: int = 0) -> TrainingInputs:
    """A finite sample whose gradient is hundreds of times as large as the others'."""
    return broken(batch, 1e5, slot)


def with_history(loop: Loop) -> Loop:
    """As after many steps of gradient norms between 1 and 4, near those of the first steps."""
    for number in range(LEAST_HISTORY):
        loop.norms.add(torch.tensor(1.0 + number % 4))
    return loop


def train(loop: Loop, steps: range, sizes: Sequence[int] = (BATCH,)) -> list[StepResult]:
    return [loop.step(split(batch_of(step), sizes)) for step in steps]


def copy_of(loop: Loop) -> dict[str, Tensor]:
    """All tensors of a loop except the counts of skipped steps."""
    named = {f"{part}/{name}": t.clone() for part, ts in loop.tensors().items() for name, t in ts.items()}
    del named["optimizer/skipped_steps"], named["optimizer/outlier_steps"]
    return named


def assert_bit_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


# --- Splitting a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_of_any_size_and_text_length_take_the_same_steps_as_one_batch(kind: str) -> None:
    whole, start = new_loop(kind), new_loop(kind)
    wanted = train(whole, range(3))
    for sizes in [(3, 3, 3, 3), (1, 6, 2, 3)]:
        split_up = new_loop(kind)
        found = train(split_up, range(3), sizes)
        torch.testing.assert_close([r.loss for r in found], [r.loss for r in wanted], rtol=1e-5, atol=0)
        torch.testing.assert_close([r.grad_norm for r in found], [r.grad_norm for r in wanted], rtol=1e-5, atol=0)
        for name, parameter in whole.model.named_parameters():
            torch.testing.assert_close(split_up.model.get_parameter(name), parameter, rtol=1e-5, atol=3e-5)
    moved = whole.model.patch_in.weight - start.model.patch_in.weight
    assert moved.abs().max() > 1e-4, "far more than the tolerance"


@pytest.fixture(scope="module")
def three_workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """The tensors of three processes after `_work_together`. With two, a sum would have no order."""
    folder = tmp_path_factory.mktemp("three workers")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": socket.if_indextoname(1)}  # loopback
    subprocess.run([sys.executable, __file__, "3", str(folder)], env=environment, timeout=300, check=True)
    return [load_file(folder / f"{rank}.safetensors") for rank in range(3)]


def _work_together(rank: int, workers: int, folder: str) -> None:
    """With each optimizer: three steps, one with a NaN on the last worker, then two, which are repeated resumed."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers)
    saved: dict[str, Tensor] = {}

    def share(batch: TrainingInputs) -> Iterator[TrainingInputs]:
        return split(batch, (4,) if rank == 0 else (1, 2, 1), first=4 * rank)

    def keep(moment: str, loop: Loop) -> None:
        saved.update({f"{moment}/{name}": tensor for name, tensor in copy_of(loop).items()})

    for kind in KINDS:
        loop = new_loop(kind)
        for step in range(3):
            result = loop.step(share(batch_of(step)))
            saved |= {f"{kind}/loss/{step}": result.loss, f"{kind}/norm/{step}": result.grad_norm}
        keep(f"{kind}/good", loop)
        saved[f"{kind}/skipped"] = loop.step(share(broken(batch_of(3), slot=BATCH - 1))).skipped
        keep(f"{kind}/bad", loop)
        resumed = new_loop(kind)
        resumed.load(loop.tensors(), loop.steps_taken)
        for moment, each in (("whole", loop), ("resumed", resumed)):
            for step in range(4, 6):
                each.step(share(batch_of(step)))
            keep(f"{kind}/{moment}", each)
        with_history(loop).step(share(large(batch_of(6), slot=BATCH - 1)))
        keep(f"{kind}/outlier", loop)
        saved[f"{kind}/outliers"] = loop.tensors()["optimizer"]["outlier_steps"].clone()
    with pytest.raises(ValueError, match="13 does not divide into equal shares of 3 workers"):
        new_loop(batch_size=13)
    save_file(saved, f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


def kept(worker: dict[str, Tensor], moment: str) -> dict[str, Tensor]:
    return {name.removeprefix(moment): t for name, t in worker.items() if name.startswith(f"{moment}/")}


@pytest.mark.parametrize("kind", KINDS)
def test_three_workers_take_the_same_steps_as_one(kind: str, three_workers: list[dict[str, Tensor]]) -> None:
    loop = new_loop(kind)
    wanted = train(loop, range(3))
    for worker in three_workers:
        for step, result in enumerate(wanted):
            torch.testing.assert_close(worker[f"{kind}/loss/{step}"], result.loss, rtol=1e-5, atol=0)
            torch.testing.assert_close(worker[f"{kind}/norm/{step}"], result.grad_norm, rtol=1e-5, atol=0)
        for name, tensor in copy_of(loop).items():
            torch.testing.assert_close(worker[f"{kind}/good/{name}"], tensor, rtol=1e-5, atol=1e-5)


def test_all_workers_have_the_same_bits(three_workers: list[dict[str, Tensor]]) -> None:
    assert_bit_equal(three_workers[0], three_workers[1])
    assert_bit_equal(three_workers[0], three_workers[2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_on_one_worker_skips_the_step_on_all(kind: str, three_workers: list[dict[str, Tensor]]) -> None:
    for worker in three_workers:
        assert worker[f"{kind}/skipped"] == 1
        assert_bit_equal(kept(worker, f"{kind}/bad"), kept(worker, f"{kind}/good"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_outlier_on_one_worker_skips_the_step_on_all(kind: str, three_workers: list[dict[str, Tensor]]) -> None:
    for worker in three_workers:
        assert worker[f"{kind}/outliers"] == 1
        weights = kept(worker, f"{kind}/whole/model")
        assert weights
        assert_bit_equal(kept(worker, f"{kind}/outlier/model"), weights)


@pytest.mark.parametrize("kind", KINDS)
def test_three_resumed_workers_are_bit_equal_to_uninterrupted_ones(
    kind: str, three_workers: list[dict[str, Tensor]]
) -> None:
    """The order of a sum over three must not depend on how long the processes have run."""
    for worker in three_workers:
        assert kept(worker, f"{kind}/whole").keys() == kept(worker, f"{kind}/good").keys()
        assert_bit_equal(kept(worker, f"{kind}/resumed"), kept(worker, f"{kind}/whole"))


def test_micro_batches_that_do_not_add_up_to_the_share_are_refused() -> None:
    with pytest.raises(ValueError, match=r"have 11 samples, but its share of a batch of 12 on 1 workers is 12"):
        new_loop().step(split(batch_of(0), (5, 6)))


# --- Non-finite numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("good_steps", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(kind: str, value: float, good_steps: int) -> None:
    loop = new_loop(kind)
    train(loop, range(good_steps))
    before = copy_of(loop)
    result = loop.step(split(broken(batch_of(2), value, slot=7), (4, 4, 4)))
    after = copy_of(loop)
    if good_steps == 0:
        # Before the first good step there are no moments. Those that appear must be zero.
        assert not any(tensor.any() for name, tensor in after.items() if name not in before)
        after = {name: tensor for name, tensor in after.items() if name in before}
    assert_bit_equal(after, before)
    assert result.skipped == 1
    assert loop.steps_taken == good_steps + 1, "data order and schedule go on"
    (good,) = train(loop, range(3, 4))
    assert torch.isfinite(good.loss)
    weight = "model/patch_out.weight"
    assert not torch.equal(copy_of(loop)[weight], before[weight])


def test_skipped_steps_are_counted_in_total_and_in_a_row_since_the_last_reading() -> None:
    loop = new_loop()

    def steps(pattern: str) -> StepResult:
        results = [loop.step([broken(batch_of(0)) if mark == "x" else batch_of(0)]) for mark in pattern]
        return results[-1]

    result = steps("..x.xx.")
    assert (result.skipped, result.worst_run) == (3, 2)
    reading = loop.read()
    assert (reading.skipped, reading.worst_run) == (3, 2)
    steps(".x")
    assert loop.read().worst_run == 1
    assert steps("xx.").worst_run == 3, "a series continues over a reading"
    assert (result.skipped, result.worst_run) == (3, 2), "earlier results do not change"
    reading = loop.read()
    assert (reading.skipped, reading.worst_run) == (6, 3)
    steps(".")
    assert loop.read().worst_run == 0


def test_losses_by_time_are_the_means_of_the_samples_around_each_time_and_agree_with_the_loss() -> None:
    loop = new_loop()
    train(loop, range(2))
    loop.step([broken(batch_of(2))])
    reading = loop.read()
    keys_B = torch.cat([batch_of(step).keys_B for step in range(2)])
    part_B = (draw_times(keys_B, loop.stage.timestep_shift) * 8).long()
    samples = {t: int((part_B == i).sum()) for i, t in enumerate(TIMES)}
    assert {t for t, loss in reading.loss_by_time.items() if loss != loss} == {t for t, n in samples.items() if not n}
    total = sum(reading.loss_by_time[t] * count for t, count in samples.items() if count)
    assert total / (2 * BATCH) == pytest.approx(reading.loss, rel=1e-5)
    assert all(loss != loss for loss in loop.read().loss_by_time.values()), "since the last reading"


def test_a_reading_is_the_mean_over_the_steps_not_skipped() -> None:
    loop = new_loop()
    results = train(loop, range(2))
    loop.step([broken(batch_of(2))])
    reading = loop.read()
    assert reading.loss == pytest.approx(sum(float(r.loss) for r in results) / 2, rel=1e-6)
    assert reading.grad_norm == pytest.approx(sum(float(r.grad_norm) for r in results) / 2, rel=1e-6)
    rates = {group["role"]: group["lr"] for group in loop.optimizer.param_groups}
    assert reading.learning_rate == pytest.approx(rates["input"]), "not scaled by fan-in"
    (last,) = train(loop, range(3, 4))
    assert loop.read().loss == pytest.approx(float(last.loss), rel=1e-6)
    loop.step([broken(batch_of(4))])
    assert torch.isnan(torch.tensor(loop.read().loss))


def test_an_outlier_is_skipped_and_counted_unless_the_threshold_is_0() -> None:
    loop = with_history(new_loop())
    before = copy_of(loop)
    result = loop.step([large(batch_of(0))])
    assert torch.isfinite(result.grad_norm)
    assert result.grad_norm > result.grad_norm_limit
    after = copy_of(loop)
    for part in ("model", "ema"):
        assert_bit_equal(kept(after, part), kept(before, part))
    loop.step([broken(batch_of(1))])
    train(loop, range(2, 3))
    reading = loop.read()
    assert (reading.skipped, reading.outliers, reading.worst_run) == (2, 1, 2)
    assert reading.grad_norm_limit < float(result.grad_norm)

    off = with_history(new_loop())
    off.stage = replace(off.stage, outlier_threshold=0.0)
    assert off.step([large(batch_of(0))]).skipped == 0
    assert off.read().grad_norm_limit == float("inf")


def test_recent_norms_are_resumed_but_forgotten_by_a_rollback() -> None:
    """Otherwise a level of the norm that has changed for good would end the run after three rollbacks."""
    first, second = with_history(new_loop()), new_loop()
    train(first, range(2))
    second.load(first.tensors(), first.steps_taken)
    assert torch.equal(second.norms.logs_W, first.norms.logs_W)
    assert second.step([large(batch_of(2))]).outliers == 1
    second.roll_back(first.tensors(), first.steps_taken)
    result = second.step([large(batch_of(2))])
    assert (result.outliers, result.run) == (1, 0)


class _Waits(TorchDispatchMode):
    """Records operators that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select"):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_host_never_waits_for_a_step(kind: str) -> None:
    loop = new_loop(kind)
    batches = [list(split(batch_of(step), (6, 6))) for step in range(2)] + [[broken(batch_of(2))]]
    with _Waits() as waits:
        for micro_batches in batches:
            loop.step(micro_batches)
    assert waits.seen == []
    with _Waits() as waits:
        float(loop.ema.updates)
    assert len(waits.seen) == 1, "a waiting operator is recorded"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_a_gpu_is_queued_without_waiting(kind: str, precision: str) -> None:
    """torch raises for anything that waits, including copies between host and device."""
    loop = new_loop(kind, "cuda", precision=precision)
    batches = [
        TrainingInputs(**{name: tensor.cuda() for name, tensor in vars(batch).items()})
        for batch in (batch_of(0), broken(batch_of(1)), batch_of(2))
    ]
    loop.step([batches[0]])
    before = copy_of(loop)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.step([batches[1]])
        after = copy_of(loop)
        loop.step([batches[2]])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_bit_equal(after, before)
    assert loop.read().skipped == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsed_step_changes_nothing(kind: str) -> None:
    loop, other = new_loop(kind), new_loop(kind)
    loop.rehearse(batch_of(5))
    for each in (loop, other):
        train(each, range(2))
    loop.rehearse(batch_of(6))
    assert_bit_equal(copy_of(loop), copy_of(other))
    assert (loop.steps_taken, loop.read().skipped) == (2, 0)


# --- Resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    whole = new_loop(kind)
    wanted = train(whole, range(6))
    first = new_loop(kind)
    train(first, range(3))
    for name, tensors in first.tensors().items():
        save_file(tensors, tmp_path / name)

    second = new_loop(kind)
    second.load({name: load_file(tmp_path / name) for name in second.tensors()}, first.steps_taken)
    found = train(second, range(3, 6))
    assert [float(r.loss) for r in found] == [float(r.loss) for r in wanted[3:]]
    assert_bit_equal(copy_of(second), copy_of(whole))


def test_the_alignment_ends_after_its_samples_and_the_steps_are_then_those_of_a_run_without_it(tmp_path: Path) -> None:
    """Two of five steps are aligned. The others need no features, and only gradients of the model."""
    ended, plain = new_loop("aligned", repa_samples=2 * BATCH), new_loop("adamw")
    train(ended, range(2))
    assert ended.read().repa_loss == pytest.approx(1, abs=0.3), "features are random"
    assert not ended.aligns
    state = {part: {name: t.clone() for name, t in ts.items()} for part, ts in ended.tensors().items()}
    assert state.keys() == plain.tensors().keys(), "no projector is saved"
    plain.load(state, ended.steps_taken)
    for step in range(2, 5):
        found = ended.step([replace(batch_of(step), features_BNF=None)])
        wanted = plain.step([replace(batch_of(step), features_BNF=None)])
        assert ended.alignment is None
        assert (float(found.loss), float(found.grad_norm)) == (float(wanted.loss), float(wanted.grad_norm))
    assert_bit_equal(copy_of(ended), copy_of(plain))
    assert math.isnan(ended.read().repa_loss)


def test_a_rollback_into_the_aligned_part_brings_the_projector_back() -> None:
    whole, loop = new_loop("aligned", repa_samples=2 * BATCH), new_loop("aligned", repa_samples=2 * BATCH)
    train(loop, range(1))
    saved = {part: {name: t.clone() for name, t in ts.items()} for part, ts in loop.tensors().items()}
    train(loop, range(1, 4))
    assert loop.alignment is None
    loop.roll_back(saved, 1)
    train(loop, range(1, 4))
    train(whole, range(4))
    assert_bit_equal(
        {name: t for name, t in copy_of(loop).items() if "recent" not in name},
        {name: t for name, t in copy_of(whole).items() if "recent" not in name},
    )


def test_a_projector_of_other_shapes_or_none_is_replaced_by_a_new_one() -> None:
    first, other = new_loop("aligned"), new_loop("aligned")
    other.feature_width = FEATURES + 1
    new = copy_of(new_loop("aligned"))
    train(first, range(2))
    other.load(first.tensors(), 2)
    assert other.alignment is not None
    assert other.alignment.projector.third.out_features == FEATURES + 1
    first.load({part: ts for part, ts in first.tensors().items() if part != "repa"}, 2)
    found = copy_of(first)
    assert {name: t for name, t in found.items() if name.startswith("repa/")}.keys() == {
        name for name in new if name.startswith("repa/")
    }
    assert all(torch.equal(t, new[name]) for name, t in found.items() if name.startswith("repa/"))


def test_the_alignment_pulls_tokens_towards_the_features_without_touching_what_is_averaged() -> None:
    """On the same batch again and again the cosine rises. Averages and weights have no tensor of the projector."""
    loop = new_loop("aligned")
    losses = []
    for _ in range(6):
        train(loop, range(1))
        losses.append(loop.read().repa_loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.02
    names = {name for name, _ in loop.model.named_parameters()}
    assert loop.ema.weights.keys() == names
    assert set(loop.tensors()["model"]) == set(loop.model.state_dict())
    with pytest.raises(ValueError, match="has no features"):
        loop.step([replace(batch_of(0), features_BNF=None)])


def test_a_checkpoint_with_float8_products_is_continued_without_them_and_the_reverse() -> None:
    converted, plain = new_loop(), new_loop()
    use_float8(converted.model, emulate=True)
    train(converted, range(2))
    train(plain, range(2))
    assert float(copy_of(converted)["model/patch_in.weight"].sub(copy_of(plain)["model/patch_in.weight"]).norm()) > 0
    saved, other = (
        {part: {name: t.clone() for name, t in tensors.items()} for part, tensors in loop.tensors().items()}
        for loop in (converted, plain)
    )
    for part, tensors in saved.items():
        assert {name: t.dtype for name, t in tensors.items()} == {name: t.dtype for name, t in other[part].items()}
    plain.load(saved, 2)
    converted.load(other, 2)
    for loop, wanted in ((plain, saved), (converted, other)):
        assert_bit_equal(dict(loop.model.state_dict()), wanted["model"])
        assert torch.isfinite(train(loop, range(2, 3))[0].loss)


def test_loading_keeps_the_count_of_skipped_steps_and_ends_a_series_of_them() -> None:
    first, second = new_loop(), new_loop()
    first.step([broken(batch_of(0))])
    train(first, range(1, 2))
    second.step([broken(batch_of(0))])
    second.load(first.tensors(), first.steps_taken)
    assert second.steps_taken == 2
    result = second.step([broken(batch_of(2))])
    assert (result.skipped, result.worst_run) == (2, 1)
    train(first, range(2, 3))
    assert second.ema.updates == 1, "loaded tensors are copies"


def test_a_stage_can_start_from_the_weights_of_another() -> None:
    first, second = new_loop("adamw"), new_loop("muon")
    train(first, range(2))
    second.load({"model": first.tensors()["model"]}, 0)
    for name, parameter in first.model.named_parameters():
        assert torch.equal(second.ema.weights[name], parameter)
    assert second.ema.updates == 0
    assert not any("." in name for name in second.tensors()["optimizer"]), "only counts and recent norms"
    train(second, range(1))


def test_the_state_of_another_optimizer_is_refused() -> None:
    first, second = new_loop("adamw"), new_loop("muon")
    train(first, range(1))
    with pytest.raises(ValueError, match=r"another model or kind of optimizer: \d+ of its tensors"):
        second.load(first.tensors(), 1)


# --- Precision, compilation, evaluation -------------------------------------------------------------------------------


def test_bf16_multiplies_in_bfloat16_and_keeps_the_rest_in_float32() -> None:
    exact, rounded = new_loop(), new_loop(precision="bf16")
    of_layer: list[torch.dtype] = []
    rounded.model.patch_in.register_forward_hook(lambda module, args, out: of_layer.append(out.dtype))
    for a, b in itertools.zip_longest(train(exact, range(3)), train(rounded, range(3))):
        assert b.loss.dtype == torch.float32
        torch.testing.assert_close(b.loss, a.loss, rtol=0.02, atol=0)
    assert a.loss != b.loss
    assert set(of_layer) == {torch.bfloat16}
    assert {t.dtype for t in copy_of(rounded).values()} == {torch.float32, torch.int64}


def test_bfloat16_inputs_work_in_both_precisions() -> None:
    batch = batch_of(0)
    narrow = replace(batch, latents_BCHW=batch.latents_BCHW.bfloat16(), text_BTD=batch.text_BTD.bfloat16())
    for precision in ("fp32", "bf16"):
        assert torch.isfinite(new_loop(precision=precision).step([narrow]).loss)


def test_the_compiled_loop_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces the graph without compiling kernels, which takes a minute (tests/trainer/model does that)."""
    monkeypatch.setattr(trainer.training.loop, "compiled", functools.partial(compiled, backend="aot_eager"))
    torch._dynamo.reset()
    eager, traced = new_loop(), new_loop(compile=True)
    for a, b in itertools.zip_longest(train(eager, range(2)), train(traced, range(2))):
        torch.testing.assert_close(b.loss, a.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(copy_of(traced), copy_of(eager), rtol=1e-5, atol=1e-5)


def test_the_evaluation_model_has_the_averaged_weights_and_no_gradients() -> None:
    loop = new_loop()
    train(loop, range(3))
    batch = batch_of(9)
    inputs: dict[str, Any] = {"text": batch.text_BTD, "position_map": torch.zeros(BATCH, 16, 2)}
    averaged = XUT(loop.model.config)
    averaged.load_state_dict(loop.model.state_dict() | loop.ema.weights)
    before = copy_of(loop)
    with loop.evaluation_model() as velocity:
        found = velocity(batch.latents_BCHW, torch.full((BATCH,), 0.5), **inputs)
    assert not found.requires_grad
    assert torch.equal(found, averaged(batch.latents_BCHW, torch.full((BATCH,), 0.5), **inputs))
    assert_bit_equal(copy_of(loop), before)
    train(loop, range(3, 4))


if __name__ == "__main__":
    # torch is imported once: importing it takes longer than the steps.
    start_processes(_work_together, (int(sys.argv[1]), sys.argv[2]), int(sys.argv[1]), start_method="fork")
