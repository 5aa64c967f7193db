"""Failures and times of waiting, as the actor beside the driver counts them."""

import pytest

from trainer.cluster import control_actor
from trainer.cluster.control_actor import ControlActor


def test_failures_in_a_row_end_the_job_and_a_new_checkpoint_counts_from_the_beginning() -> None:
    control = ControlActor(most_failures=3)
    assert [control.note_failure("step 4", "lost") for _ in range(2)] == [10, 20]
    assert [control.note_failure("step 8", "lost") for _ in range(2)] == [10, 20]
    assert "failure 2 without a new checkpoint, of at most 3 (lost)" in str(control.messages[-1])
    assert not control.failure
    assert control.note_failure("step 8", "killed") is None
    assert control.failure.startswith("training stopped: 3 failures in a row without a new checkpoint (killed);")
    assert control.note_failure("step 12", "lost") is None, "failed for good"


def test_failures_count_before_the_first_checkpoint_too_and_pauses_are_bounded() -> None:
    control = ControlActor(most_failures=6)
    assert [control.note_failure(None, "lost") for _ in range(6)] == [10, 20, 40, 60, 60, None]
    assert ControlActor(most_failures=0).note_failure(None, "lost") is None


def test_a_halved_micro_batch_uses_up_no_failure_and_needs_no_pause() -> None:
    control = ControlActor(most_failures=2)
    assert control.note_failure(None, "lost") == 10
    for _ in range(4):
        control.note_smaller_batch()
        assert control.note_failure(None, "out of memory") == 0
    assert control.note_failure(None, "lost") is None


def test_waiting_is_reported_and_ends_after_the_limit_and_is_forgotten_when_workers_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(control_actor.time, "monotonic", lambda: now)
    control = ControlActor(workers=2)
    for seconds in range(0, 3600, 2):
        now = seconds
        assert control.note_waiting("no room for 2 workers", 3600)
    assert control.messages[0] == "no room for 2 workers: waiting for 30 s, up to 1 h"
    assert len(control.messages) < 10, "at growing intervals"
    control.begin(2)
    now = 4000
    assert control.note_waiting("no room for 2 workers", 3600), "counted from the beginning"
    now = 8000
    assert not control.note_waiting("no room for 2 workers", 3600)
    assert "given up after 1 h; run the same command" in control.failure


def test_workers_hang_while_none_of_them_steps_or_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(control_actor.time, "monotonic", lambda: now)
    control = ControlActor(workers=2)

    def after(seconds: float, first: tuple[int, bool], second: tuple[int, bool]) -> float:
        """What the second worker is told, which reports after the first."""
        nonlocal now
        now += seconds
        control.note_activity(0, *first)
        return control.note_activity(1, *second)

    assert control.note_activity(0, 5, False) == 0
    now = 3600
    assert control.note_activity(0, 5, False) == 0, "the other worker still starts"
    assert after(10, (5, False), (5, False)) == 0
    assert after(1000, (5, False), (5, False)) == 1000
    assert after(1000, (6, False), (5, False)) == 0, "a step"
    assert after(1000, (6, False), (6, True)) == 0, "waits for samples"
    assert after(5000, (6, False), (6, True)) == 0
    assert after(10, (6, False), (6, False)) == 0
    assert after(2000, (6, False), (6, False)) == 2000
    control.begin(2)
    assert after(10, (0, False), (0, False)) == 0, "new workers"


def test_a_stop_without_a_worker_that_could_save_ends_the_job() -> None:
    control = ControlActor()
    control.request_stop()
    assert not control.note_waiting("no room", 3600)
    assert control.note_failure(None, "lost") is None
    assert "asked to stop" in control.failure


def test_another_number_of_workers_is_reported() -> None:
    control = ControlActor(workers=2)
    control.begin(2)
    assert not control.messages
    control.begin(1)
    assert control.messages == ["training on 1 worker, with the same global batches"]


def test_workers_that_are_about_to_end_are_not_resized() -> None:
    control = ControlActor(last_step=8)
    control.add_message({"step": 4})
    control.add_message({"startup_seconds/model": None})
    control.add_message("a warning")
    assert control.may_resize()
    control.add_message({"step": 8})
    assert not control.may_resize(), "the last step is taken: its evaluation comes next"
    stopped = ControlActor(last_step=8)
    stopped.request_stop()
    assert not stopped.may_resize()
