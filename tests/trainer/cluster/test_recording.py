"""What a failed start of the workers leaves behind."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from trainer.cluster.recording import RecordingTorchConfig


@pytest.mark.parametrize(
    "error", [RayActorError(), RayTaskError("setup", "Traceback\nRuntimeError: reset by peer", RuntimeError("reset"))]
)
def test_a_start_that_fails_while_the_process_group_is_made_frees_its_workers_and_may_be_repeated(
    error: Exception,
) -> None:
    ended: list[bool] = []

    def execute(*_: Any) -> None:
        raise error

    state = SimpleNamespace(shutdown=lambda: ended.append(True))
    workers = SimpleNamespace(execute=execute, get_worker_group_state=lambda: state)
    config = RecordingTorchConfig()
    with pytest.raises(WorkerGroupStartupFailedError, match="the process group could not be made"):
        config.backend_cls().on_start(workers, config)
    assert ended == [True]
