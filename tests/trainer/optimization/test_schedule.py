import itertools
import math

import pytest
import torch
from torch import nn

from trainer.optimization.optimizers import OptimizerConfig
from trainer.optimization.schedule import Anneal, Schedule, change_of_length, set_learning_rate

WSD = OptimizerConfig(schedule="wsd", warmup_steps=100, learning_rate=1e-3, final_ratio=0.01)
COSINE = OptimizerConfig(warmup_steps=100, learning_rate=1e-3, final_ratio=0.01)


def test_cosine_warms_up_linearly_and_ends_at_the_final_ratio() -> None:
    schedule = Schedule(COSINE, 2001)
    factors = [schedule.factor(step) for step in range(2001)]
    assert factors[:100] == pytest.approx([(step + 1) / 101 for step in range(100)])
    assert factors[100] == max(factors) == 1.0
    assert factors[1050] == pytest.approx((1 + 0.01) / 2)
    assert factors[2000] == pytest.approx(0.01)
    assert all(a > b for a, b in itertools.pairwise(factors[100:]))
    assert schedule.factor(5000) == pytest.approx(0.01)


def test_warm_up_takes_at_most_a_tenth_of_a_short_run() -> None:
    assert Schedule(OptimizerConfig(warmup_steps=1000), 100).factor(10) == 1.0
    assert Schedule(OptimizerConfig(), 1).factor(0) == 1.0


def test_wsd_stays_at_its_peak_and_decays_over_the_last_fifth() -> None:
    schedule = Schedule(WSD, 2000)
    factors = [schedule.factor(step) for step in range(2000)]
    assert factors[:100] == pytest.approx([(step + 1) / 101 for step in range(100)])
    assert set(factors[100:1600]) == {1.0}
    assert all(a > b for a, b in itertools.pairwise(factors[1599:]))
    assert factors[1699] == pytest.approx(1 - 0.99 * math.sqrt(100 / 400)), "1 - sqrt"
    assert factors[1999] == pytest.approx(0.01)


def test_until_the_decay_the_rate_of_wsd_does_not_depend_on_the_length() -> None:
    short, long = Schedule(WSD, 2000), Schedule(WSD, 9000)
    assert [short.factor(step) for step in range(1600)] == [long.factor(step) for step in range(1600)]


@pytest.mark.parametrize("config", [COSINE, WSD])
def test_an_anneal_decays_from_the_rate_of_its_checkpoint_to_the_final_ratio(config: OptimizerConfig) -> None:
    whole = Schedule(config, 2000)
    anneal = Schedule(config, 1100, Anneal(1000, whole.factor(1000)))
    factors = [anneal.factor(step) for step in range(1000, 1100)]
    assert whole.factor(1000) > factors[0] > 0.8 * whole.factor(1000)
    assert all(a > b for a, b in itertools.pairwise(factors))
    assert factors[-1] == pytest.approx(0.01)


def test_an_anneal_never_raises_the_rate() -> None:
    ended = Schedule(COSINE, 3000, Anneal(2000, 0.005))
    assert {ended.factor(step) for step in range(2000, 3000)} == {0.005}


def test_a_record_gives_back_its_schedule_also_one_without_the_newer_fields() -> None:
    record = {"steps": 50, "stage": {"optimizer": {"learning_rate": 2e-3, "warmup_steps": 4, "betas": [0.9, 0.95]}}}
    assert Schedule.of(record).rate(4) == 2e-3
    assert Schedule.of(record | {"anneal": {"start": 40, "factor": 0.5}}).rate(39) == 1e-3


def test_another_length_of_a_cosine_moves_the_rate_at_once() -> None:
    line = change_of_length(Schedule(COSINE, 2001), Schedule(COSINE, 4001), 1050)
    then, now = Schedule(COSINE, 2001).rate(1050), Schedule(COSINE, 4001).rate(1050)
    assert f"jumps from {then:.3g} to {now:.3g} at step 1050" in line
    assert "cosine now ends with 1e-05 at step 4001, not at step 2001" in line


def test_another_length_of_wsd_moves_only_the_decay() -> None:
    line = change_of_length(Schedule(WSD, 2000), Schedule(WSD, 4000), 1000)
    assert line.startswith("the learning rate stays at 0.001 at step 1000")
    assert "until step 3200, then falls to 1e-05 at step 4000" in line
    assert "jumps from 0.0005" in change_of_length(Schedule(WSD, 2000), Schedule(WSD, 4000), 1699)


def test_every_group_is_set_to_the_same_share_of_its_own_peak() -> None:
    layers = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [
        {"params": layer.parameters(), "initial_lr": rate} for layer, rate in zip(layers, (1.0, 3.0), strict=True)
    ]
    optimizer = torch.optim.SGD(groups, lr=9.0)
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.75]


@pytest.mark.parametrize(("field", "value"), [("schedule", "linear"), ("decay_share", 1.5)])
def test_an_invalid_schedule_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"optimizer {field} must be .*got"):
        OptimizerConfig(**{field: value})  # type: ignore[arg-type]
