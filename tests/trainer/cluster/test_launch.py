"""What a training worker requests, by what the nodes offer."""

from dataclasses import dataclass

import pytest
import ray

from pipeline.core.errors import UsageError
from trainer.cluster import launch


@dataclass
class TwoWorkers:
    workers: int = 2


Nodes = list[dict[str, float]]
CAPTIONER = {"CPU": 8.0, "GPU": 4.0, "captioner": 1.0}


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """scaling(nodes) -> what Ray Train is asked for by a training with two workers on a cluster of these nodes."""

    def ask(nodes: Nodes) -> ray.train.ScalingConfig:
        monkeypatch.setattr("pipeline.core.cluster.nodes", lambda: nodes)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": sum(node["CPU"] for node in nodes)})
        monkeypatch.setattr(launch, "check_device", lambda training, gpus: None)
        return launch._scaling(TwoWorkers())  # type: ignore[arg-type]

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
