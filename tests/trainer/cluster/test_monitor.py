"""The driver's side of a training job, with a control actor and no workers."""

import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray

from trainer.cluster.control_actor import ControlActor
from trainer.cluster.monitor import JobMonitor
from trainer.health import stacks
from trainer.health.notify import Notice


@dataclass(frozen=True)
class Training:
    folder: str
    stage_name: str = "demo"
    start_step: int = 4
    stop_step: int = 12


@pytest.fixture
def control(ray_address: str) -> Iterator[Any]:
    actor = ray.remote(num_cpus=0)(ControlActor).remote()
    yield actor
    ray.kill(actor)


def test_sigterm_asks_the_workers_to_stop_and_a_second_one_interrupts(control: Any, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with JobMonitor(control, Training(str(tmp_path))) as monitor:  # type: ignore[arg-type]
        assert not monitor.was_stopped
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 60
        while not ray.get(control.stop_requested.remote()):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert monitor.was_stopped
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_progress_line_names_the_phases_of_the_start_and_counts_only_steps_of_this_start(
    control: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    training = Training(str(tmp_path), start_step=4_000_000, stop_step=4_000_100)
    line = {"step": 4_000_010, "loss": 0.5, "step_seconds": 2.0, "text_encoder_share": 0.75, "hours_left": 0.05}
    messages: list[dict[str, float | None]] = [
        {"startup_seconds/encoders": None}, {"startup_seconds/encoders": 3.0},
        {"startup_seconds/compile": None}, {"startup_seconds/compile": 40.0},
        line,
        {"startup_seconds/encoders": None}, {"startup_seconds/encoders": 4.0},  # the workers start again
        {"startup_seconds/first step": None}, {"startup_seconds/first step": 5.0},
        line,
    ]  # fmt: skip
    for message in messages:
        ray.get(control.add_message.remote(message))
    with JobMonitor(control, training, {"Ray": 2.0, "index": 1.0}) as monitor:  # type: ignore[arg-type]
        pass  # its end waits for all messages
    shown = capfd.readouterr().err
    assert "start: workers" in shown
    assert "start: encoders" in shown
    times = r"Ray 2\.0 s, index 1\.0 s, workers \d+\.\d s, encoders 3\.0 s, compile 40\.0 s"
    assert re.search(rf"run: started in \d+ s: {times}\n", shown)
    assert "run: started in 9 s: encoders 4.0 s, first step 5.0 s\n" in shown
    assert "2 s/step (text encoder 75%), 3 min left" in shown
    assert set(re.findall(r"[\d.]+ ?\w*/s\w*", shown)) == {"2 s/step"}, "no rate of tqdm's"
    assert monitor.lines == [line] * 2


@dataclass
class Sender:
    """A Notifier that records what would be sent."""

    step: int = 4
    sent: list[tuple[str, int, str]] = field(default_factory=list)

    def send(self, event: str, reason: str) -> None:
        self.sent.append((event, self.step, reason))


def test_a_stall_is_told_once_and_asks_the_workers_for_their_stacks(
    control: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.cluster.monitor._POLL_SECONDS", 0.02)
    monkeypatch.setattr(stacks, "_LEAST_IDLE", 0.5)
    monkeypatch.setattr(stacks, "_TIMES_LONGEST", 0.0)
    monkeypatch.setattr(stacks, "_POLL_SECONDS", 0.02)
    workers = [stacks.StackWriter(str(tmp_path), rank) for rank in range(2)]
    sender = Sender()
    ray.get(control.add_message.remote({"step": 6, "loss": 0.5}))
    with JobMonitor(control, Training(str(tmp_path)), notifier=sender):  # type: ignore[arg-type]
        until = time.monotonic() + 120
        while len(list(tmp_path.glob("stalls/*/rank-*.txt"))) < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.2)  # ten more polls
        assert len(sender.sent) == 1
    for worker in workers:
        worker.close()
    [folder] = (tmp_path / "stalls").iterdir()
    [(event, step, reason)] = sender.sent
    assert (event, step) == ("stalled", 6)
    assert re.fullmatch(
        rf"no step was logged for \d+ min after step 6: the workers write their stacks to {folder}", reason
    )
    assert f"run: {reason}" in capfd.readouterr().err


def test_events_of_workers_are_sent_and_shown(control: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sender = Sender()
    ray.get(control.add_message.remote(Notice("rolled back", "back to step 4")))
    with JobMonitor(control, Training(str(tmp_path)), notifier=sender):  # type: ignore[arg-type]
        pass  # its end waits for all messages
    assert sender.sent == [("rolled back", 4, "back to step 4")]
    assert "run: back to step 4" in capfd.readouterr().err
