"""A run that is killed, or moved to other workers or nodes, resumes as if nothing had happened."""

import itertools
import json
import os
import pickle
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.recipe.command import Command
from trainer.recipe.resolve import resolve
from trainer.recipe.training import Training
from trainer.samples.data import Batch, TrainingData, held_out_batch, load_batch
from trainer.samples.order import micro_batches
from trainer.training.worker import SampleSource, Worker
from trainer.training.worker_group import WorkerGroup

# Functions of tests/trainer/conftest.py, which cannot be imported. pytest finds its fixtures by itself.
_SHARED = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
STEPS, SETTINGS = _SHARED["STEPS"], _SHARED["SETTINGS"]
started, wait_until, losses, saved = (_SHARED[name] for name in ("started", "wait_until", "losses", "saved"))
descendants, is_train_worker, prompts_beside = (
    _SHARED[name] for name in ("descendants", "is_train_worker", "prompts_beside")
)


class Silent:
    """A Reporter that drops everything and requests a stop after some steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def stop_requested(self) -> bool:
        self.left -= 1
        return self.left <= 0

    def report(self, line: Any) -> None:
        pass

    warn = report


def ids(run: Path) -> dict[int, list[str]]:
    """The sample ids of each step's global batch, in order; the last ones if a step was repeated."""
    batches: dict[int, dict[int, list[str]]] = {}
    for text in (run / "audit").read_text().splitlines():
        line = json.loads(text)
        batches.setdefault(line["step"], {})[line["rank"]] = line["ids"]
    return {step: [id for rank in sorted(ranks) for id in ranks[rank]] for step, ranks in batches.items()}


def resolved(dataset: Path, run: Path, workers: int) -> Training:
    """What the job trains, without its evaluation."""
    settings = [value for flag, value in itertools.pairwise(SETTINGS) if flag == "--set"]
    return resolve(
        Command(
            stage="demo", dataset=str(dataset), run=str(run), steps=STEPS, audit=str(run / "audit"),
            settings=(*settings, "evaluate_every=1000"), workers=workers, prompts=str(prompts_beside(dataset)),
        )
    )  # fmt: skip


def train(training: Training, most: int = 1000) -> int:
    """Trains at most so many steps without Ray: this process, with the others of its process group. Returns the steps
    taken in total."""
    stage, workers = training.stage, WorkerGroup.from_process_group()
    data = TrainingData.load(
        training.selection, training.crop(), batch_size=stage.batch_size, streams=stage.streams, window=stage.window,
        hold_out=stage.hold_out,
    )  # fmt: skip

    def batches(training: Training) -> Iterator[Batch]:
        for step in itertools.count(training.start_step):
            for positions in micro_batches(step, stage.batch_size, workers.rank, workers.size, training.micro_batch):
                yield load_batch(data, positions)

    source = SampleSource(data, batches, lambda numbers: held_out_batch(data, numbers))
    return Worker(training, workers, torch.device("cpu"), source, Silent(most)).run()


@pytest.fixture(scope="session")
def uninterrupted(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """Waits for a run of two processes without Ray, which starts with the fixture, and returns its folder."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "training").write_bytes(pickle.dumps(resolved(dataset, folder / "run", workers=2)))
    environment = os.environ | {"GLOO_SOCKET_IFNAME": socket.if_indextoname(1)}  # loopback
    workers = subprocess.Popen([sys.executable, __file__, str(folder)], env=environment, start_new_session=True)

    def finished() -> Path:
        assert workers.wait(timeout=300) == 0
        return folder / "run"

    yield finished
    if workers.poll() is None:
        os.killpg(workers.pid, signal.SIGKILL)
        workers.wait(timeout=60)


def test_a_killed_run_resumes_bit_equal_to_an_uninterrupted_one(
    uninterrupted: Callable[[], Path], killed: Path, resumed: tuple[Path, str]
) -> None:
    run, printed = resumed
    began = saved(killed)[-1]
    assert 4 <= began < max(losses(killed)) < STEPS, "killed between two checkpoints"
    assert f"going on from step {began}" in printed
    wanted = uninterrupted()
    assert ids(run) == ids(wanted)
    assert losses(run) == losses(wanted)


def test_an_epoch_has_every_sample_once_and_no_held_out_one(dataset: Path, whole: Path) -> None:
    rows = json.loads((dataset / "selections/demo/selection.json").read_text())["shards"]
    seen = [id for _, batch in sorted(ids(whole).items()) for id in batch]
    assert len(seen) == STEPS * 32
    epoch = len(set(seen))
    assert 32 < epoch <= sum(rows.values())
    assert len(seen) > 2 * epoch, "the run has complete epochs"
    for start in range(0, len(seen) - epoch + 1, epoch):
        assert len(set(seen[start : start + epoch])) == epoch


def test_another_number_of_workers_sees_the_same_batches(
    dataset: Path, killed: Path, uninterrupted: Callable[[], Path], tmp_path: Path, one_thread: None
) -> None:
    """One worker in this process continues the run of two."""
    run = shutil.copytree(killed, tmp_path / "run")
    (run / "audit").unlink()
    began = saved(run)[-1]
    training = resolved(dataset, run, workers=1)
    assert f"going on from step {began}" in "".join(training.notes)
    assert train(training) == STEPS
    wanted = uninterrupted()
    assert ids(run) == {step: batch for step, batch in ids(wanted).items() if step > began}
    assert losses(run) == pytest.approx(losses(wanted), rel=1e-5)


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    """A Ray cluster of a head without CPUs and two nodes, all on this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    yield cluster, nodes
    cluster.shutdown()


@pytest.mark.cluster
def test_a_lost_worker_and_a_lost_node_lose_no_step(
    dataset: Path, two_nodes: Any, uninterrupted: Callable[[], Path], tmp_path: Path
) -> None:
    cluster, nodes = two_nodes
    raylets = {node: node.all_processes["raylet"][0].process.pid for node in nodes}

    def workers(node: Any) -> list[int]:
        return [pid for pid in descendants(raylets[node]) if is_train_worker(pid)]

    with started(dataset, tmp_path, cluster.address, subprocess.DEVNULL) as job:
        wait_until(lambda: max(losses(tmp_path), default=0) >= 5 and bool(saved(tmp_path)), job)
        os.kill(next(pid for node in nodes for pid in workers(node)), signal.SIGKILL)
        wait_until(lambda: max(losses(tmp_path)) >= 9 and 8 in saved(tmp_path), job)
        cluster.remove_node(next(node for node in nodes if workers(node)), allow_graceful=False)
        assert job.wait(timeout=480) == 0
    wanted = uninterrupted()
    assert ids(tmp_path) == ids(wanted)
    assert losses(tmp_path) == losses(wanted)
    taken = [json.loads(line)["step"] for line in (tmp_path / "audit").read_text().splitlines()]
    assert len(taken) > 2 * STEPS, "some steps were repeated"


def _train_in_group(rank: int, folder: Path) -> None:
    torch.set_num_threads(max(1, torch.multiprocessing.cpu_count() // 2))  # as in the job
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    train(pickle.loads((folder / "training").read_bytes()))


if __name__ == "__main__":
    # By fork, because each process that imports torch and the encoders needs seconds for that.
    torch.multiprocessing.start_processes(_train_in_group, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
