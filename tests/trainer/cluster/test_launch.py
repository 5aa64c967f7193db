"""What training workers request, by what the nodes offer."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train.torch
import torch

from pipeline.core.errors import JobFailed, UsageError
from trainer.cluster import launch
from trainer.health.hangs import Activity


@dataclass
class Workers:
    """A training as far as its workers are concerned."""

    counts: tuple[int, ...]

    def worker_counts(self) -> list[int]:
        return list(self.counts)


Nodes = list[dict[str, float]]
CAPTIONER = {"CPU": 8.0, "GPU": 4.0, "captioner": 1.0}


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """scaling(nodes) -> what Ray Train is asked for by a training with two workers, or other numbers of them, on a
    cluster of these nodes."""

    def ask(nodes: Nodes, *counts: int) -> ray.train.ScalingConfig:
        monkeypatch.setattr("pipeline.core.cluster.nodes", lambda: nodes)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": sum(node["CPU"] for node in nodes)})
        monkeypatch.setattr(launch, "check_device", lambda training, gpus: None)
        return launch._scaling(Workers(counts or (2,)))  # type: ignore[arg-type]

    return ask


def test_workers_run_on_trainer_nodes_and_do_not_count_the_gpus_of_captioners(scaling) -> None:  # type: ignore[no-untyped-def]
    trainer = {"CPU": 8.0, "GPU": 2.0, "trainer": 1.0}
    asked = scaling([{"CPU": 0.0}, CAPTIONER, trainer])
    assert asked.use_gpu
    assert asked.resources_per_worker == {"CPU": 0.9, "trainer": 0.01}
    with pytest.raises(UsageError, match="--workers 2 but the cluster has 1 GPUs"):
        scaling([CAPTIONER, trainer | {"GPU": 1.0}])


def test_without_trainer_nodes_any_node_will_do(scaling) -> None:  # type: ignore[no-untyped-def]
    asked = scaling([{"CPU": 2.0}])
    assert not asked.use_gpu
    assert asked.resources_per_worker == {"CPU": 0.5}


@pytest.mark.parametrize(
    ("error", "called"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), ["note_smaller_batch"]),
        (JobFailed("diverged"), ["fail"]),
        (RuntimeError("Connection reset by peer"), []),
    ],
)
def test_the_control_actor_learns_why_a_worker_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, called: list[str]
) -> None:
    def raise_it() -> int:
        raise error

    calls: list[str] = []

    class Control:
        def __getattr__(self, name: str) -> Any:
            return SimpleNamespace(remote=lambda *_: calls.append(name))

    training = SimpleNamespace(folder=str(tmp_path), with_workers=lambda count: training)
    monkeypatch.setattr(launch.ray, "get", lambda value: value)
    monkeypatch.setattr(launch.ray.train, "get_context", lambda: SimpleNamespace(get_local_world_size=lambda: 1))
    monkeypatch.setattr(launch.ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(launch.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(launch, "ActorReporter", lambda control: SimpleNamespace(warn=print))
    monkeypatch.setattr(launch, "Worker", lambda *_: SimpleNamespace(run=raise_it, activity=Activity()))
    config = {"training": training, "control": Control(), "data": None, "source": lambda *_: None}
    with pytest.raises(type(error)):
        launch._train_worker(config)
    assert calls == ["begin", *called]


def test_a_worker_that_cannot_be_set_up_is_a_failure_even_if_memory_is_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise it would be started again for ever: no smaller batch was recorded. Nor has waiting for S3 ended."""

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    calls: list[str] = []

    class Control:
        def __getattr__(self, name: str) -> Any:
            return SimpleNamespace(remote=lambda *_: calls.append(name))

    training = SimpleNamespace(folder=str(tmp_path), with_workers=lambda count: training)
    monkeypatch.setattr(launch.ray, "get", lambda value: value)
    monkeypatch.setattr(launch.ray.train, "get_context", lambda: SimpleNamespace(get_local_world_size=lambda: 1))
    monkeypatch.setattr(launch.ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(launch.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(launch, "ActorReporter", lambda control: SimpleNamespace(warn=print))
    monkeypatch.setattr(launch, "Worker", full)
    config = {"training": training, "control": Control(), "data": None, "source": lambda *_: None}
    with pytest.raises(torch.OutOfMemoryError):
        launch._train_worker(config)
    assert calls == []
