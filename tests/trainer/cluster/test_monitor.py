"""The driver's side of a training job, with a control actor and no workers."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from trainer.cluster.control_actor import ControlActor
from trainer.cluster.monitor import JobMonitor


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
