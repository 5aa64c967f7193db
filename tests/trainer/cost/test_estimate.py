"""Scaling of speeds, and what hours are converted to."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from trainer.cost import machines
from trainer.cost.estimate import EFFICIENCY, HOST_WATTS, checkpoint_bytes, computed_speed, stage_row, training_speed
from trainer.cost.machines import Machine
from trainer.cost.stage_setup import StageSetup, stage_setup
from trainer.optimization.schedule import Schedule
from trainer.recipe.stages import STAGES

MACHINE = Machine(name="some GPU", count=2, teraflops=100, watts=400, gigabytes=48, price=0.5)


def test_energy_money_and_reads_are_proportional_to_the_hours() -> None:
    setup = stage_setup("256", {"samples": "720000"}, 4)
    speed = {"images_per_second": 100, "source": "given", "remark": ""}
    row = stage_row(setup, {"folder": "images", "images": 1000, "bytes": 5e7}, speed, MACHINE)
    assert row["hours"] == 2
    assert row["dollars"] == 2 * 2 * 0.5
    assert row["kwh"] == 2 * (2 * 400 + HOST_WATTS) / 1000
    assert row["read_bytes"] == 720_000 * 5e4
    assert row["bytes_per_second"] == 100 * 5e4
    assert row["epochs"] == 720


def test_a_checkpoint_has_the_bytes_of_weights_averages_and_moments() -> None:
    from trainer.encoders.load_codec import load_codec
    from trainer.model.config import XUTConfig
    from trainer.model.xut import XUT
    from trainer.optimization.optimizers import OptimizerConfig
    from trainer.training.loop_setup import new_loop

    stage = replace(
        STAGES["demo"], optimizer=OptimizerConfig(), samples=32, checkpoint_every=1, keep_last=1, keep_every=0
    )
    codec = load_codec("dct")
    model = XUT(XUTConfig.tiny(in_channels=codec.channels, patch_size=1, dim=64, mlp_dim=128, depth=1))
    loop = new_loop(stage, model, Schedule(stage.optimizer, 1), codec, torch.device("cpu"))
    for parameter in loop.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    loop.optimizer.step()
    saved = sum(t.numel() * t.element_size() for tensors in loop.tensors().values() for t in tensors.values())
    count = sum(p.numel() for p in loop.model.parameters())
    # One checkpoint is kept while another is written; a snapshot has two averages in half precision.
    snapshots = stage.ema_snapshots * 2 * 2 * count
    assert checkpoint_bytes(stage, count) == pytest.approx(2 * saved + snapshots, rel=1e-2)


def measured(setup: StageSetup) -> dict[str, Any]:
    figures = {"images_per_second": 10.0, "device": "H100", "peak": 100, "operations": setup.total_operations}
    return {"stage": setup.name} | figures


def test_a_measurement_with_other_settings_keeps_its_operations_per_second() -> None:
    probe = measured(stage_setup("512", {"text_tokens": "32"}, 4))
    setup = stage_setup("768", {}, 4)
    speed = training_speed(setup, MACHINE, {}, [probe])
    assert speed["source"] == "scaled"
    assert speed["images_per_second"] * setup.total_operations == pytest.approx(2 * 10 * probe["operations"])


def test_the_measurement_of_the_stage_itself_has_precedence() -> None:
    setups = [stage_setup(name, {}, 4) for name in ("256", "512")]
    speed = training_speed(setups[0], replace(MACHINE, count=1), {}, [measured(setup) for setup in setups])
    assert (speed["source"], speed["images_per_second"]) == ("measured", 10)


def test_every_gpu_has_a_peak_and_is_found_by_the_name_that_torch_reports() -> None:
    for kind, (device, *_) in machines.GPUS.items():
        assert machines.gpu_peak(kind)
        assert machines.find_gpu(f"NVIDIA {device}") == kind
        assert machines.find_gpu(kind.lower().replace(" ", "-")) == kind


def test_the_computed_speed_is_the_peak_at_the_assumed_shares_without_needless_recomputation() -> None:
    setup = stage_setup("512", {}, 4)
    card = Machine("card", 4, teraflops=100, watts=None, gigabytes=1000, price=None)
    assert setup.checkpointing == "all"
    seconds = sum(each / EFFICIENCY[part] for part, each in setup.operations("none").items()) / 100e12
    assert computed_speed(setup, card) == pytest.approx(4 / seconds)
    assert computed_speed(setup, replace(card, teraflops=None)) is None
