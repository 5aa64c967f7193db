"""Times of a step's parts, and the worker that is slower than the others."""

import time

import pytest
import torch

from trainer.training.step_times import RankTimes, SlowWorkers, StepTimes, Stopwatch

CPU = torch.device("cpu")


def test_a_stopwatch_measures_its_blocks_one_by_one() -> None:
    watch = Stopwatch(CPU)
    for seconds in (0.02, 0.04):
        with watch.running():
            time.sleep(seconds)
        time.sleep(0.02)
    first, second = watch.laps()
    assert first >= 0.02
    assert second >= 0.04
    assert watch.laps() == []


class Laps(Stopwatch):
    """A stopwatch with given times."""

    def __init__(self, *seconds: float) -> None:
        super().__init__(CPU)
        self._laps = list(seconds)


def step_times(data: Laps, step: Laps, text: Laps, vae: Laps, sums: Laps) -> StepTimes:
    times = StepTimes(CPU)
    times.data, times.step, times.text, times.vae, times.sums = data, step, text, vae, sums
    return times


def test_the_model_takes_what_encoders_and_sums_leave_of_a_step() -> None:
    times = step_times(Laps(1, 3, 2), Laps(10, 12, 11), Laps(2, 3, 2), Laps(0.5), Laps(1, 1, 4))
    wanted = {"waiting_seconds": 6, "text_seconds": 7, "vae_seconds": 0.5, "sums_seconds": 6, "model_seconds": 19.5}
    assert times.totals() == wanted
    assert times.totals() == wanted, "totals since the start"
    assert times.of_steps() == RankTimes(step=9, data_wait=2), "medians of 9, 11 and 7, and of 1, 3 and 2"
    times.forget_steps()
    assert times.of_steps() == RankTimes(0, 0)


def test_a_single_worker_adds_no_gradients() -> None:
    times = step_times(Laps(0, 0), Laps(10, 12), Laps(), Laps(), Laps())
    assert times.totals()["model_seconds"] == 22
    assert times.of_steps().step == 11


def test_a_worker_that_stays_slower_than_the_others_is_named_once() -> None:
    slow = SlowWorkers(["card A", "card B", "card C", "card D"])
    for _ in range(4):
        assert slow.update([1.0, 1.1, 1.5, 1.0], 10) == []
    [message] = slow.update([1.0, 1.1, 1.5, 1.0], 10)
    assert message.startswith("worker 2 (card C) slows down all others: it takes 1.5 s per step, 1.5 times as long")
    assert "50 steps" in message
    assert slow.update([1.0, 1.1, 1.5, 1.0], 10) == []
    assert slow.update([1.0, 1.1, 1.2, 1.0], 10) == ["worker 2 (card C) is as fast as the others again"]


@pytest.mark.parametrize(
    "seconds",
    [
        pytest.param([[1.0, 1.29, 1.0, 1.0]] * 20, id="below the margin"),
        pytest.param([[1.0, 2.0, 1.0, 1.0], [2.0, 1.0, 1.0, 1.0]] * 10, id="in turn"),
        pytest.param([[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]] * 10, id="interrupted"),
        pytest.param([[3.0]] * 20, id="a single worker"),
        pytest.param([[0.0, 0.0]] * 20, id="without steps"),
    ],
)
def test_no_worker_is_named_without_a_lasting_difference(seconds: list[list[float]]) -> None:
    slow = SlowWorkers([f"card {rank}" for rank in range(len(seconds[0]))])
    assert [message for each in seconds for message in slow.update(each, 10)] == []


def test_of_two_workers_the_slower_one_is_named() -> None:
    slow = SlowWorkers(["card A", "card B"])
    assert [message.partition(" (")[0] for message in slow.update([1.4, 1.0], 50)] == ["worker 0"]
