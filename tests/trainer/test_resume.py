"""A run that is killed, stopped or moved to other workers resumes as if nothing had happened."""

import itertools
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch

from trainer.recipe.command import Command
from trainer.recipe.resolve import resolve
from trainer.recipe.training import Training
from trainer.samples.data import Batch, TrainingData, held_out_batch, load_batch
from trainer.samples.order import micro_batches
from trainer.training.worker import SampleSource, Worker
from trainer.training.worker_group import WorkerGroup

ROOT = Path(__file__).parents[2]
# Functions of tests/trainer/conftest.py, which cannot be imported. pytest finds its fixtures by itself.
_SHARED = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
STEPS, SETTINGS, training = _SHARED["STEPS"], _SHARED["SETTINGS"], _SHARED["training"]


class Silent:
    """A Reporter that drops everything and never requests a stop."""

    def stop_requested(self) -> bool:
        return False

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


def losses(run: Path) -> dict[int, float]:
    file = run / "demo" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {line["step"]: line["loss"] for line in lines}


def saved(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "demo" / "checkpoints").glob("step-*"))


def wait_until(is_true: Callable[[], bool], job: "subprocess.Popen[str]", seconds: float = 480) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert job.poll() is None, f"the job ended with {job.returncode}"
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    """All processes started by this one, directly or not."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, size = {pid}, 0
    while size < len(found):
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return sorted(found - {pid})


def is_train_worker(pid: int) -> bool:
    try:
        return "RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


@contextmanager
def started(
    dataset: Path, run: Path, environment: dict[str, str], output: int | TextIO
) -> "Iterator[subprocess.Popen[str]]":
    """The job with two workers; killed at the end of the block."""
    command = [sys.executable, *map(str, training(dataset, run))]
    job = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=output, stderr=subprocess.DEVNULL)
    try:
        yield job
    finally:
        job.kill()
        job.wait(timeout=60)


@pytest.fixture(scope="module")
def killed(dataset: Path, undisturbed: Any, ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose driver and workers are killed between two checkpoints, while the undisturbed one trains."""
    run = tmp_path_factory.mktemp("killed")
    with started(dataset, run, os.environ | {"RAY_ADDRESS": ray_address}, subprocess.DEVNULL) as job:
        wait_until(lambda: max(losses(run), default=0) >= 5 and bool(saved(run)), job)
        others = descendants(undisturbed[1].pid)
        workers = [pid for pid in descendants(os.getpid()) if is_train_worker(pid) and pid not in others]
        assert len(workers) >= 2
        for pid in [job.pid, *descendants(job.pid), *workers]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    return run


@dataclass(frozen=True)
class Stopped:
    run: Path
    killed_at: int  # step of the newest checkpoint when it was killed
    exit_code: int
    printed: str


@pytest.fixture(scope="module")
def stopped(dataset: Path, killed: Path, ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """The killed run, resumed, and stopped by SIGTERM after its first new step."""
    folder = tmp_path_factory.mktemp("stopped")
    run = shutil.copytree(killed, folder / "run")
    began, taken = saved(run)[-1], (run / "audit").stat().st_size
    with (
        (folder / "printed").open("w") as output,
        started(dataset, run, os.environ | {"RAY_ADDRESS": ray_address}, output) as job,
    ):
        wait_until(lambda: (run / "audit").stat().st_size > taken, job)
        job.send_signal(signal.SIGTERM)
        return Stopped(run, began, job.wait(timeout=180), (folder / "printed").read_text())


def test_a_killed_run_resumes_bit_equal_to_an_uninterrupted_one(whole: Path, stopped: Stopped) -> None:
    assert 4 <= stopped.killed_at < STEPS
    assert f"going on from step {stopped.killed_at}" in stopped.printed
    last = saved(stopped.run)[-1]
    assert last > stopped.killed_at
    taken, wanted = ids(stopped.run), ids(whole)
    assert {step: taken[step] for step in range(1, last + 1)} == {step: wanted[step] for step in range(1, last + 1)}
    assert losses(stopped.run) == {step: loss for step, loss in losses(whole).items() if step <= last}


def test_sigterm_saves_a_checkpoint_and_exits_with_0(stopped: Stopped) -> None:
    assert stopped.exit_code == 0
    assert saved(stopped.run)[-1] == max(losses(stopped.run)) < STEPS


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
    dataset: Path, whole: Path, stopped: Stopped, tmp_path: Path, one_thread: None
) -> None:
    """One worker in this process continues the run of two."""
    run = shutil.copytree(stopped.run, tmp_path / "run")
    (run / "audit").unlink()
    began = saved(run)[-1]
    settings = [value for flag, value in itertools.pairwise(SETTINGS) if flag == "--set"]
    command = Command(
        stage="demo", dataset=str(dataset), run=str(run), steps=STEPS, audit=str(run / "audit"),
        settings=(*settings, "evaluate_every=1000"), workers=1,
    )  # fmt: skip
    training = resolve(command)
    assert f"going on from step {began}" in "".join(training.notes)
    stage, workers = training.stage, WorkerGroup.from_process_group()
    data = TrainingData.load(
        training.selection, training.crop(), batch_size=stage.batch_size, streams=stage.streams, window=stage.window,
        hold_out=stage.hold_out,
    )  # fmt: skip

    def batches(training: Training) -> Iterator[Batch]:
        for step in range(training.start_step, STEPS):
            for positions in micro_batches(step, stage.batch_size, 0, 1, training.micro_batch):
                yield load_batch(data, positions)

    source = SampleSource(data, batches, lambda numbers: held_out_batch(data, numbers))
    assert Worker(training, workers, torch.device("cpu"), source, Silent()).run() == STEPS
    assert ids(run) == {step: batch for step, batch in ids(whole).items() if step > began}
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


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
    dataset: Path, two_nodes: Any, undisturbed: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    cluster, nodes = two_nodes
    raylets = {node: node.all_processes["raylet"][0].process.pid for node in nodes}

    def workers(node: Any) -> list[int]:
        return [pid for pid in descendants(raylets[node]) if is_train_worker(pid)]

    with started(dataset, tmp_path, os.environ | {"RAY_ADDRESS": cluster.address}, subprocess.DEVNULL) as job:
        wait_until(lambda: max(losses(tmp_path), default=0) >= 5 and bool(saved(tmp_path)), job)
        os.kill(next(pid for node in nodes for pid in workers(node)), signal.SIGKILL)
        wait_until(lambda: max(losses(tmp_path)) >= 9 and 8 in saved(tmp_path), job)
        cluster.remove_node(next(node for node in nodes if workers(node)), allow_graceful=False)
        assert job.wait(timeout=480) == 0
    whole = request.getfixturevalue("whole")  # meanwhile it has finished too
    assert ids(tmp_path) == ids(whole)
    assert losses(tmp_path) == losses(whole)
    taken = [json.loads(line)["step"] for line in (tmp_path / "audit").read_text().splitlines()]
    assert len(taken) > 2 * STEPS, "some steps were repeated"
