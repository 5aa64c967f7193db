"""What follows a failure, and how many workers train as nodes are lost and join.

Run as a script this file trains on one or two workers: test_policies.py DATASET RUN.
"""

import errno
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ScalingConfig
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from pipeline.core.errors import S3Unavailable, StorageUnavailable
from trainer.cluster import policies
from trainer.cluster.policies import DividingWorkers, FailuresWithoutProgress
from trainer.recipe.command import Command
from trainer.recipe.resolve import resolve
from trainer.recipe.training import Training
from trainer.samples.data import Batch, TrainingData
from trainer.training.worker import SampleSource
from trainer.training.worker_group import WorkerGroup

# Functions of tests/trainer/conftest.py, which cannot be imported. pytest finds its fixtures by itself.
_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))
ROOT, wait_until, losses, saved = (_SHARED[name] for name in ("ROOT", "wait_until", "losses", "saved"))

LOST = WorkerGroupError("lost", {1: RuntimeError("the worker died\nmore")})


class Answers:
    """An actor handle whose methods' results are given; `ray.get` returns them as they are."""

    def __init__(self, **results: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        for name, result in results.items():
            setattr(self, name, SimpleNamespace(remote=self._answer(name, result)))

    def _answer(self, name: str, result: Any) -> Callable[..., Any]:
        def remote(*arguments: Any) -> Any:
            self.calls.append((name, *arguments))
            return result

        return remote


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """`ray.get` returns its argument. The pauses are recorded instead of taken."""
    pauses: list[float] = []
    monkeypatch.setattr(policies, "ray", SimpleNamespace(get=lambda result: result))
    monkeypatch.setattr(policies, "time", SimpleNamespace(sleep=pauses.append))
    return pauses


def decide(monkeypatch: pytest.MonkeyPatch, error: Exception, newest: Callable[[str], Any], control: Answers) -> Any:
    monkeypatch.setattr(policies, "newest_checkpoint", newest)
    return FailuresWithoutProgress(control, "checkpoints", s3_wait=6).make_decision(error)


def test_a_lost_worker_is_followed_by_a_pause_and_another_start(
    monkeypatch: pytest.MonkeyPatch, without_ray: list[float]
) -> None:
    control = Answers(note_failure=20.0)
    assert decide(monkeypatch, LOST, lambda _: ("step-8", 1.0), control) == FailureDecision.RETRY
    assert control.calls == [("note_failure", ("step-8", 1.0), "worker 1: RuntimeError: the worker died more")]
    assert without_ray == [20.0]
    assert decide(monkeypatch, LOST, lambda _: None, Answers(note_failure=None)) == FailureDecision.RAISE


def test_the_cause_of_a_lost_worker_is_not_hidden_by_its_description() -> None:
    died = RuntimeError(
        "A worker health check failed.\nThe actor died unexpectedly before finishing this task.\n\tpid: 7\nThe actor "
        "is dead because its worker process has died. Worker exit type: SYSTEM_ERROR " + 200 * "detail "
    )
    line = policies.cause(WorkerGroupError("lost", {3: died}))
    assert line.startswith("worker 3: its worker process has died. Worker exit type: SYSTEM_ERROR detail")
    assert len(line) < 200


@pytest.mark.parametrize("error", [WorkerGroupStartupFailedError("launch"), ActorDiedError()])
def test_a_worker_lost_while_the_workers_start_counts_as_a_failure(
    error: Exception, monkeypatch: pytest.MonkeyPatch, without_ray: list[float]
) -> None:
    control = Answers(note_failure=10.0)
    assert decide(monkeypatch, ControllerError(error), lambda _: None, control) == FailureDecision.RETRY
    assert [call[0] for call in control.calls] == ["note_failure"]
    assert without_ray == [10.0]


def test_missing_nodes_and_s3_are_waited_for_and_errors_of_the_controller_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unavailable(checkpoints: str) -> Any:
        raise S3Unavailable("S3 does not answer")

    control = Answers(note_waiting=True)
    no_room = ControllerError(WorkerGroupStartupTimeoutError(2))
    assert decide(monkeypatch, no_room, lambda _: None, control) == FailureDecision.RETRY
    assert decide(monkeypatch, LOST, unavailable, control) == FailureDecision.RETRY
    assert [call[-1] for call in control.calls] == [6 * 3600, 6 * 3600]
    assert decide(monkeypatch, LOST, unavailable, Answers(note_waiting=False)) == FailureDecision.RAISE
    for error in (StorageUnavailable("no folder"), OSError(errno.ESTALE, "Stale file handle")):
        control = Answers(note_waiting=True)
        failures = {0: RuntimeError("reset by peer"), 1: UserExceptionWithTraceback(error, "")}
        assert decide(monkeypatch, WorkerGroupError("lost", failures), lambda _: None, control) == FailureDecision.RETRY
        assert control.calls == [("note_waiting", str(error), 6 * 3600)]
    assert decide(monkeypatch, ControllerError(ValueError("a bug")), lambda _: None, control) == FailureDecision.RAISE


@pytest.mark.parametrize(("nodes", "count"), [(0, 0), (1, 1), (3, 2), (5, 4), (9, 4)])
def test_as_many_workers_train_as_fit_and_divide_the_batch(nodes: int, count: int) -> None:
    scaling = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 0.9, "trainer": 0.01})
    policy = DividingWorkers(scaling, [1, 2, 4], Answers(), "checkpoints")
    assert policy._count_possible_workers({str(n): {"CPU": 0.9, "trainer": 0.01} for n in range(nodes)}) == count


def test_all_workers_of_a_node_are_counted() -> None:
    """Of 0.03 of a resource, Ray's own division leaves two times 0.01."""
    scaling = ScalingConfig(num_workers=(1, 3), resources_per_worker={"trainer": 0.01})
    reserved = {"node": {"trainer": 0.01 + 0.01 + 0.01}}
    assert ElasticScalingPolicy(scaling)._count_possible_workers(reserved) == 2
    assert DividingWorkers(scaling, [1, 2, 3], Answers(), "checkpoints")._count_possible_workers(reserved) == 3


def test_a_healthy_run_grows_right_after_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = DividingWorkers(
        ScalingConfig(num_workers=(1, 2), elastic_resize_monitor_interval_s=0), [1, 2],
        Answers(may_resize=True), "checkpoints",
    )  # fmt: skip
    newest: Any = S3Unavailable("S3 does not answer")

    def found(_: str) -> Any:
        if isinstance(newest, Exception):
            raise newest
        return newest

    monkeypatch.setattr(policies, "newest_checkpoint", found)
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: {"a": {"CPU": 1.0}, "b": {"CPU": 1.0}})
    running = SimpleNamespace(start_time=0.0, num_workers=1)

    def decision() -> Any:
        return policy.make_decision_for_running_worker_group(worker_group_state=running, worker_group_status=None)

    assert decision() == NoopDecision()
    newest = ("step-4", 1.0)
    assert [decision(), decision()] == [NoopDecision(), NoopDecision()], "saved before more workers were wanted"
    newest = ("step-8", 2.0)
    grown = decision()
    assert isinstance(grown, ResizeDecision)
    assert grown.num_workers == 2


# --- On local nodes ---------------------------------------------------------------------------------------------------


def resolved(dataset: Path, run: Path, workers: str) -> Training:
    settings = ("log_every=1", "checkpoint_every=4", "evaluate_every=100000")
    return resolve(
        Command(
            stage="demo", dataset=str(dataset), run=str(run), steps=100_000, audit=str(run / "audit"),
            settings=settings, workers=workers,
        )
    )  # fmt: skip


def slow_source(data: TrainingData, training: Training, group: WorkerGroup, warn: Callable[[str], None]) -> Any:
    """The stream of samples. A worker that is alone takes its time, so that few steps are taken until a node joins."""
    from trainer.cluster.sample_stream import stream_source

    source = stream_source(data, training, group, warn)

    def batches(training: Training) -> Iterator[Batch]:
        for batch in source.batches(training):
            time.sleep(1.0 if group.size == 1 else 0.1)
            yield batch

    return SampleSource(source.data, batches, source.held_out)


def last_ids(run: Path, batch_size: int) -> dict[int, list[str]]:
    """The sample ids of each step's global batch, of the last time that it was taken."""
    taken: dict[int, list[tuple[int, list[str]]]] = {}
    for text in reversed((run / "audit").read_text().splitlines()):
        line = json.loads(text)
        parts = taken.setdefault(line["step"], [])
        if sum(len(ids) for _, ids in parts) < batch_size:
            parts.append((line["rank"], line["ids"]))
    return {step: [id for _, ids in sorted(parts) for id in ids] for step, parts in taken.items()}


def ranks(run: Path) -> list[tuple[int, int, int]]:
    """Step, rank and samples of each line of the audit."""
    file = run / "audit"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(line["step"], line["rank"], len(line["ids"])) for line in lines]


@pytest.mark.cluster
def test_a_run_shrinks_when_a_node_is_lost_and_grows_when_one_joins(
    dataset: Path, tmp_path: Path, one_thread: None
) -> None:
    from ray.cluster_utils import Cluster

    shared = runpy.run_path(str(Path(__file__).parents[1] / "test_resume.py"))
    one_worker = {"num_cpus": 1, "resources": {"trainer": 1}}  # a worker takes 0.9
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    printed, run = tmp_path / "printed", tmp_path / "run"
    try:
        nodes = [cluster.add_node(**one_worker) for _ in range(2)]
        with printed.open("w") as output:
            job = subprocess.Popen(
                [sys.executable, __file__, str(dataset), str(run)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                env=os.environ | {"RAY_ADDRESS": cluster.address},
            )  # fmt: skip
        try:
            wait_until(lambda: max(losses(run), default=0) >= 6, job)
            assert {samples for _, _, samples in ranks(run)} == {16}, "two workers"
            cluster.remove_node(nodes[0], allow_graceful=False)
            wait_until(lambda: any(samples == 32 for _, _, samples in ranks(run)), job)
            cluster.add_node(**one_worker)
            alone = len(ranks(run))
            wait_until(lambda: any(samples == 16 for _, _, samples in ranks(run)[alone:]), job)
            grown, _, _ = next(line for line in ranks(run)[alone:] if line[2] == 16)
            assert grown - 1 in saved(run), "grows at a checkpoint"
            wait_until(lambda: max(losses(run)) > grown, job)
            job.send_signal(signal.SIGTERM)
            assert job.wait(timeout=120) == 0, printed.read_text()[-2000:]
        finally:
            job.kill()
            job.wait(timeout=60)
    finally:
        cluster.shutdown()
    text = printed.read_text()
    assert "training on 1 worker," in text
    assert "training on 2 workers," in text
    reference, steps = resolved(dataset, tmp_path / "reference", "1"), max(losses(run))
    shared["train"](reference, steps)
    assert last_ids(run, 32) == last_ids(tmp_path / "reference", 32)
    assert losses(run) == pytest.approx(losses(tmp_path / "reference"), rel=1e-3)


if __name__ == "__main__":
    from pipeline.core.cluster import cluster as ray_cluster
    from trainer.cluster.launch import train

    with ray_cluster("run"):
        train(resolved(Path(sys.argv[1]), Path(sys.argv[2]), "1-2"), make_source=slow_source)
