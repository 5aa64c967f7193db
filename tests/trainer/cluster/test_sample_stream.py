"""The stream of Ray Data yields what a plain reading of the same positions does, whatever happens to its tasks."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from ray.exceptions import RayTaskError, WorkerCrashedError

from pipeline.core.errors import JobFailed, S3Unavailable, StorageUnavailable
from trainer.cluster import sample_stream
from trainer.cluster.sample_stream import ReadAhead, _Failures, stream_source
from trainer.recipe.command import Command
from trainer.recipe.resolve import resolve
from trainer.recipe.training import Training
from trainer.samples.data import Batch, TrainingData, concatenate, load_batch
from trainer.training.worker_group import WorkerGroup

BATCH = 24  # 8 streams of 3 samples, which 3 workers share unevenly


@pytest.fixture(scope="module")
def training(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    settings = (f"batch_size={BATCH}", "micro_batch=4", "resolution=64", "hold_out=0.1")
    run = tmp_path_factory.mktemp("run")
    return resolve(Command(stage="demo", dataset=str(dataset), run=str(run), steps=10**6, settings=settings))


@pytest.fixture(scope="module")
def data(training: Training) -> TrainingData:
    stage = training.stage
    return TrainingData.load(
        training.selection, training.crop(), batch_size=BATCH, streams=stage.streams, window=stage.window,
        hold_out=stage.hold_out,
    )  # fmt: skip


@contextmanager
def streamed(
    training: Training, data: TrainingData, rank: int, workers: int, warnings: list[str]
) -> Iterator[ReadAhead]:
    source = stream_source(data, training, WorkerGroup(rank, workers, None), warnings.append)
    batches = source.batches(replace(training, workers=workers))
    assert isinstance(batches, ReadAhead)
    try:
        yield batches
    finally:
        batches.close()


def same(one: Batch, two: Batch) -> bool:
    return all(np.array_equal(getattr(one, field.name), getattr(two, field.name)) for field in fields(Batch))


@pytest.mark.parametrize(("workers", "start"), [(1, 0), (2, 5), (3, 3)])
def test_the_global_batches_are_those_of_a_plain_reading(
    workers: int, start: int, training: Training, data: TrainingData, ray_address: str
) -> None:
    training, steps = replace(training, start_position=start * BATCH), 3
    shares, count = [], BATCH // workers // training.micro_batch
    for rank in range(workers):
        with streamed(training, data, rank, workers, []) as batches:
            shares.append([concatenate([next(batches) for _ in range(count)]) for _ in range(steps)])
    for step in range(steps):
        found = concatenate([share[step] for share in shares])
        assert same(found, load_batch(data, range((start + step) * BATCH, (start + step + 1) * BATCH)))


def readers() -> list[int]:
    """Processes on this machine that run a read task of this Ray session."""
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ReadSamples" in cmdline.read_bytes():
                found.append(int(cmdline.parent.name))
        except OSError:
            continue
    return found


def test_a_killed_read_task_loses_no_sample(training: Training, data: TrainingData, ray_address: str) -> None:
    warnings: list[str] = []
    before = set(readers())
    with streamed(training, data, 0, 1, warnings) as batches:
        found = [next(batches)]
        for pid in set(readers()) - before:
            os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + 120
        while not warnings and time.monotonic() < until:
            found.append(next(batches))
        found.extend(next(batches) for _ in range(10))
    assert warnings, "a task was killed"
    assert "lost" in warnings[0]
    count = sum(len(batch.ids) for batch in found)
    assert same(concatenate(found), load_batch(data, range(count)))


def test_an_error_for_the_user_is_raised_in_one_line_and_again(
    training: Training, data: TrainingData, ray_address: str
) -> None:
    """Ray adds lines about retries to it."""
    index = data.row_index
    gone = replace(data, row_index=replace(index, selection=replace(index.selection, images="nowhere")))
    with streamed(training, gone, 0, 1, []) as batches:
        for _ in range(2):
            with pytest.raises(JobFailed, match="cannot be read") as error:
                next(batches)
            assert "\n" not in str(error.value)


def test_the_dashboard_names_stage_and_rank(training: Training, data: TrainingData, ray_address: str) -> None:
    share = sample_stream._share(data, training, WorkerGroup(0, 1, None))
    assert sample_stream._dataset("demo rank 0", "run", lambda: data, share, 0, 64).name == "demo rank 0"


def test_a_restarted_worker_takes_over_the_share_of_cpus_of_its_lost_stream(
    training: Training, data: TrainingData, ray_address: str
) -> None:
    """Ray Data keeps a share for each id for minutes after its process was killed."""
    share = sample_stream._share(data, training, WorkerGroup(0, 1, None))

    def requester(rank: int, run: str) -> str:
        dataset = sample_stream._dataset(f"demo rank {rank}", run, lambda: data, share, 0, 64)
        return dataset._create_executor()._dataset_id  # type: ignore[no-any-return]

    assert requester(0, "/run") == requester(0, "/run")
    assert len({requester(0, "/run"), requester(1, "/run"), requester(0, "/other")}) == 3


def test_an_evaluation_waits_for_its_dataset_too(
    training: Training, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings, read = list[str](), sample_stream.held_out_batch

    def away_once(data: TrainingData, numbers: Sequence[int]) -> Batch:
        if not warnings:
            raise StorageUnavailable("the dataset cannot be read")
        return read(data, numbers)

    monkeypatch.setattr(sample_stream, "held_out_batch", away_once)
    monkeypatch.setattr(sample_stream.time, "sleep", lambda _: None)
    source = stream_source(data, training, WorkerGroup(0, 1, None), warnings.append)
    assert len(source.held_out([0, 1]).ids) == 2
    assert "training waits for samples" in warnings[0]


# --- What follows a failure -------------------------------------------------------------------------------------------


def failed_task(cause: Exception) -> Exception:
    return RayTaskError("read", "traceback", cause).as_instanceof_cause()


@pytest.mark.parametrize("kind", [S3Unavailable, StorageUnavailable])
def test_the_stream_waits_for_its_dataset_up_to_the_limit(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, warnings = [0.0], list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    failures = _Failures(3600, warnings.append)
    error = failed_task(kind("s3://hdm does not answer\nFailed to apply"))
    while clock[0] <= 3600:
        failures.wait(error)
    with pytest.raises(JobFailed, match="s3://hdm does not answer; given up after 1 h"):
        failures.wait(error)
    assert "up to 1 h" in warnings[0]


def test_lost_processes_end_the_job_only_if_no_batch_comes_between(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings = list[str]()
    failures = _Failures(3600, warnings.append)
    for _ in range(10):
        failures.wait(WorkerCrashedError())
        failures.forget()
    for _ in range(3):
        failures.wait(failed_task(WorkerCrashedError()))  # type: ignore[arg-type]
    with pytest.raises(JobFailed, match="4 times in a row"):
        failures.wait(WorkerCrashedError())
    assert len(warnings) == 13
