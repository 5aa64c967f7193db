"""What a failed start of the workers leaves behind."""

from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.worker_group import worker_group as of_ray
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

from trainer.cluster.failed_start import FailedStart

FREED = ["actor", "actor", "placement group"]  # a worker, Ray's barrier of the workers, and their place


class Fails(WorkerGroupCallback):  # type: ignore[misc]
    """Stands for the callback that makes the process group."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def after_worker_group_start(self, worker_group: Any) -> None:
        raise self.error


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A start of Ray's WorkerGroup with actors that exist only by name; what was ended of them."""
    ended: list[str] = []
    placement = SimpleNamespace(
        wait=lambda seconds: True, placement_group=None, shutdown=lambda: ended.append("placement group")
    )
    launch = SimpleNamespace(remote=lambda _: "launched")
    barrier = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda **_: "barrier"))
    context = SimpleNamespace(world_rank=0, local_rank=0, node_rank=0)
    worker = SimpleNamespace(
        actor=SimpleNamespace(run_train_fn=launch, shutdown=SimpleNamespace(remote=lambda: None)),
        metadata=SimpleNamespace(node_ip="", pid=0), distributed_context=context,
    )  # fmt: skip
    monkeypatch.setattr(WorkerGroup, "_check_cluster_resources_and_raise_if_insufficient", lambda *_: None)
    monkeypatch.setattr(WorkerGroup, "_create_placement_group", lambda *_: placement)
    monkeypatch.setattr(WorkerGroup, "_create_workers", lambda *_, **__: [worker])
    monkeypatch.setattr(WorkerGroup, "_init_train_context", lambda *_: None)
    monkeypatch.setattr(of_ray, "SynchronizationActor", barrier)
    monkeypatch.setattr(of_ray.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setattr(of_ray.ray, "wait", lambda *_, **__: ([], []))
    monkeypatch.setattr(of_ray.ray, "kill", lambda actor: ended.append("actor"))
    return ended


def start(*callbacks: WorkerGroupCallback) -> FailedStart:
    run = SimpleNamespace(run_config=SimpleNamespace(storage_context=None), scaling_config=None, backend_config=None)
    group = SimpleNamespace(resources_per_worker={}, num_workers=1, train_fn_ref="function")
    callback = FailedStart()
    with suppress(ActorDiedError, RayTaskError, WorkerGroupStartupFailedError):
        WorkerGroup.create(run, group, [callback, *callbacks])
    callback.before_controller_execute_failure_decision(FailureDecision.RETRY)
    return callback


def test_a_worker_lost_at_the_launch_frees_the_others(ended: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def get(_: Any) -> None:
        raise ActorDiedError

    monkeypatch.setattr(of_ray.ray, "get", get)
    callback = start()
    assert ended == FREED
    callback.before_controller_execute_failure_decision(FailureDecision.RETRY)
    assert ended == FREED, "once"


@pytest.mark.parametrize(
    "error", [ActorDiedError(), RayTaskError("setup", "Traceback\nRuntimeError: reset", RuntimeError("reset"))]
)
def test_so_does_one_lost_while_the_process_group_is_made(error: Exception, ended: list[str]) -> None:
    start(Fails(error))
    assert ended == FREED


def test_workers_that_train_are_left_to_ray(ended: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_ray.ray, "get", lambda _: None)
    start()
    assert ended == []
