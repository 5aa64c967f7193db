"""Frees the workers of a start that failed."""

from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback


class FailedStart(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Must come before the callback that makes the process group.

    If a worker or its node is lost after the workers exist, while the process group is made or the training function is
    launched, Ray 2.60 keeps the other workers and their GPUs, for which the next start would wait.
    """

    def __init__(self) -> None:
        self._starting: Any = None  # workers that exist but do not train yet

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._starting = worker_group

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._starting = None

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        if self._starting is not None:
            self._starting.get_worker_group_state().shutdown()
            self._starting = None
