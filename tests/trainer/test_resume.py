"""Killed, stopped, moved to other workers: a run goes on as if nothing had happened."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, TextIO

import pytest

ROOT = Path(__file__).parents[2]
# Shared with tests/trainer/conftest.py, whose fixtures pytest finds by itself.
_SHARED = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
STEPS, training = _SHARED["STEPS"], _SHARED["training"]

RunJob = Callable[..., CompletedProcess[str]]
StartJob = Callable[..., "subprocess.Popen[str]"]


def ids(run: Path) -> dict[int, list[str]]:
    """Of each step's global batch, in its order: what was trained last, where a step was taken twice."""
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


def wait_until(is_true: Callable[[], bool], job: "subprocess.Popen[str]", seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert job.poll() is None, f"the job ended with {job.returncode}"
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    """Processes that this one has started, and theirs."""
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
    """The job with two workers, which does not outlive the block."""
    command = [sys.executable, *map(str, training(dataset, run))]
    job = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=output, stderr=subprocess.DEVNULL)
    try:
        yield job
    finally:
        job.kill()
        job.wait(timeout=60)


@pytest.fixture(scope="module")
def killed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with a Ray of its own: driver, workers and Ray are killed between two checkpoints."""
    run = tmp_path_factory.mktemp("killed")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with started(dataset, run, environment, subprocess.DEVNULL) as job:
        wait_until(lambda: max(losses(run), default=0) >= 6 and bool(saved(run)), job)
        for pid in [job.pid, *descendants(job.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        assert job.wait() == -signal.SIGKILL
    return run


@dataclass(frozen=True)
class Stopped:
    run: Path
    killed_at: int  # the newest checkpoint's step, as of the kill
    exit_code: int
    printed: str


@pytest.fixture(scope="module")
def stopped(dataset: Path, killed: Path, ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """The killed run, run again, and asked to stop after its first new steps."""
    folder = tmp_path_factory.mktemp("stopped")
    run = shutil.copytree(killed, folder / "run")
    began, taken = saved(run)[-1], (run / "audit").stat().st_size
    with (
        (folder / "printed").open("w") as output,
        started(dataset, run, os.environ | {"RAY_ADDRESS": ray_address}, output) as job,
    ):
        wait_until(lambda: (run / "audit").stat().st_size > taken, job)
        job.send_signal(signal.SIGTERM)
        return Stopped(run, began, job.wait(timeout=60), (folder / "printed").read_text())


def test_an_epoch_has_every_sample_once_and_none_that_is_held_out(dataset: Path, whole: Path) -> None:
    rows = json.loads((dataset / "selections/demo/selection.json").read_text())["shards"]
    seen = [id for _, batch in sorted(ids(whole).items()) for id in batch]
    assert len(seen) == STEPS * 32
    epoch = len(set(seen))
    assert 32 < epoch <= sum(rows.values())
    assert len(seen) > 2 * epoch, "the run has whole epochs"
    for start in range(0, len(seen) - epoch + 1, epoch):
        assert len(set(seen[start : start + epoch])) == epoch


def test_killed_and_run_again_it_takes_the_same_steps_to_the_last_bit(whole: Path, stopped: Stopped) -> None:
    assert 4 <= stopped.killed_at < STEPS
    assert f"going on from step {stopped.killed_at}" in stopped.printed
    last = saved(stopped.run)[-1]
    assert last > stopped.killed_at
    taken, wanted = ids(stopped.run), ids(whole)
    assert {step: taken[step] for step in range(1, last + 1)} == {step: wanted[step] for step in range(1, last + 1)}
    assert losses(stopped.run) == {step: loss for step, loss in losses(whole).items() if step <= last}


def test_asked_to_stop_it_saves_and_ends_well(stopped: Stopped) -> None:
    assert stopped.exit_code == 0
    assert saved(stopped.run)[-1] == max(losses(stopped.run)) < STEPS


def test_with_another_number_of_workers_it_sees_the_same_batches(
    run_job: RunJob, dataset: Path, whole: Path, stopped: Stopped, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped.run, tmp_path / "run")
    (run / "audit").unlink()
    began = saved(run)[-1]
    again = run_job(*training(dataset, run, "--workers", 1, "--set", "evaluate_every=1000"))
    assert again.returncode == 0, again.stderr[-2000:]
    assert f"going on from step {began}" in again.stdout
    assert ids(run) == {step: batch for step, batch in ids(whole).items() if step > began}
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    """A Ray of a head without CPUs and two nodes beside it, on this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    yield cluster, nodes
    cluster.shutdown()


@pytest.mark.cluster
def test_a_worker_that_dies_and_a_node_that_goes_take_no_step_along(
    two_nodes: Any, start_job: StartJob, dataset: Path, whole: Path, tmp_path: Path
) -> None:
    cluster, nodes = two_nodes
    raylets = {node: node.all_processes["raylet"][0].process.pid for node in nodes}

    def workers(node: Any) -> list[int]:
        return [pid for pid in descendants(raylets[node]) if is_train_worker(pid)]

    job = start_job(*training(dataset, tmp_path), environment={"RAY_ADDRESS": cluster.address})
    wait_until(lambda: max(losses(tmp_path), default=0) >= 5 and bool(saved(tmp_path)), job, 180)
    os.kill(next(pid for node in nodes for pid in workers(node)), signal.SIGKILL)
    wait_until(lambda: max(losses(tmp_path)) >= 9 and 8 in saved(tmp_path), job, 180)
    cluster.remove_node(next(node for node in nodes if workers(node)), allow_graceful=False)
    assert job.wait(timeout=180) == 0
    assert ids(tmp_path) == ids(whole)
    assert losses(tmp_path) == losses(whole)
    taken = [json.loads(line)["step"] for line in (tmp_path / "audit").read_text().splitlines()]
    assert len(taken) > 2 * STEPS, "some steps were taken again"
