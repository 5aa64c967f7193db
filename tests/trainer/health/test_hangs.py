"""A worker that hangs with its group is ended, but not while it may wait."""

import threading

import pytest

from trainer.health import hangs
from trainer.health.hangs import Activity, HangWatch


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangs, "_POLL_SECONDS", 0.01)


def reason(activity: Activity, *quiet: float) -> str | None:
    """Why the process was ended, if it was, with these answers to its reports."""
    answers, reported, ended = iter(quiet), threading.Event(), list[str]()

    def report(steps: int, waits: bool) -> float:
        assert (steps, waits) == (activity.steps, activity.waits)
        answer = next(answers, None)
        if answer is None:
            reported.set()
        return answer or 0.0

    def end(why: str) -> None:
        ended.append(why)
        reported.set()

    with HangWatch(activity, report, end):
        assert reported.wait(60)
    return ended[0] if ended else None


def test_half_an_hour_without_a_step_ends_the_process() -> None:
    assert reason(Activity(), 0, 900, 1799) is None
    assert str(reason(Activity(), 0, 900, 1860)).startswith("no worker has finished a step for 31 min")


def test_long_steps_are_given_ten_times_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(hangs.time, "monotonic", lambda: now)
    activity = Activity()
    assert activity.waits, "the start may take any time"
    for seconds in (5000, 300):  # the first step compiles
        with activity.waiting():
            now += 7000
        now += seconds
        activity.finish_step()
    assert (activity.steps, activity.waits, activity.longest_step) == (2, False, 300)
    assert activity.limit == 3000
    with activity.waiting():
        assert activity.waits
    assert not activity.waits
