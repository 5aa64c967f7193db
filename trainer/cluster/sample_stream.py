"""The samples of a training worker, streamed by Ray Data.

The order is ours: a Datasource lists read tasks over positions of the data order, and the blocks that they yield, in
whatever order these arrive, are put together by position. Therefore a stream can begin at any position, and one that
fails continues where it was.
"""

import hashlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from queue import Full, Queue
from typing import Any, Final

import ray
import ray.data
import torch
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.exceptions import RayError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from pipeline.core.errors import JobFailed, S3Refused, StorageUnavailable, UsageError
from trainer.recipe.training import Training
from trainer.samples.blocks import Assembly, Share, read_blocks
from trainer.samples.data import Batch, TrainingData, held_out_batch
from trainer.training.worker import SampleSource
from trainer.training.worker_group import WorkerGroup

_QUEUED: Final = 2  # complete micro batches waiting in the worker, or those of a step if these are more
_MAX_READERS: Final = 8  # per worker
_READER_CPUS: Final = 0.01  # reserved; a reader uses a whole CPU, but so it always finds a place
_SEGMENT_SAMPLES: Final = 1 << 16  # of a worker; the next segment is read by other tasks, perhaps in other processes
_SEGMENTS: Final = 16  # of a dataset; then another one follows
_LEAST_BLOCK: Final = 1 << 20  # bytes; parts of small micro batches share a block
_BLOCKS_AHEAD: Final = 6  # of each reader, in the object store
_FAILURES: Final = 3  # of the stream in a row, without a batch in between, before the job fails
_WAITS: Final = (5.0, 10.0, 30.0, 60.0)  # seconds before the dataset is tried again; the last is repeated
_POLL_SECONDS: Final = 1.0

Warn = Callable[[str], None]


def stream_source(data: TrainingData, training: Training, group: WorkerGroup, warn: Warn) -> SampleSource:
    """The samples of the selection. `warn` is told what interrupts the stream."""
    return SampleSource(
        data=data,
        batches=lambda training: ReadAhead(_batches(data, training, group, warn), max(_QUEUED, training.accumulation)),
        held_out=lambda numbers: _held_out(data, training, numbers, warn),
    )


def cpus_per_worker(workers: int) -> float:
    """CPUs that Ray reserves for a training worker. Below 1, so that readers, which need little, fit on a node that is
    full of workers after another node was lost."""
    return min(0.9, (float(ray.cluster_resources().get("CPU", 1)) - 1) / workers)


def _share(data: TrainingData, training: Training, group: WorkerGroup) -> Share:
    """With one reader per free CPU, at most one per stream.

    Without a GPU all CPUs count as free, because low-priority readers use the time in which the training waits.
    """
    cpus = float(ray.cluster_resources().get("CPU", 1))
    free = cpus - group.size * cpus_per_worker(group.size) if torch.cuda.is_available() else cpus
    order = data.order
    return Share(
        first_position=training.start_position,
        batch_size=order.batch_size,
        streams=order.streams,
        rank=group.rank,
        workers=group.size,
        micro_batch=training.micro_batch,
        most_readers=max(1, min(_MAX_READERS, int(free / group.size))),
    )


class SampleDatasource(Datasource):  # type: ignore[misc]
    """The micro batches of a share from number `start` on, in `_SEGMENTS` segments. One task for each segment and
    reader, so that a task keeps its row groups to itself for as long as it runs."""

    def __init__(self, load: Callable[[], TrainingData], share: Share, start: int, row_bytes: int) -> None:
        super().__init__()
        self._load, self._share, self._start, self._row_bytes = load, share, start, row_bytes

    def get_name(self) -> str:
        return "Samples"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        share, length = self._share, max(1, _SEGMENT_SAMPLES // self._share.micro_batch)
        rows = length * share.micro_batch // share.readers
        metadata = BlockMetadata(num_rows=rows, size_bytes=rows * self._row_bytes, input_files=None, exec_stats=None)
        # A training thread that waits for a decoder delays all others.
        read = partial(read_blocks, self._load, share, low_priority=not torch.cuda.is_available())
        return [
            ReadTask(partial(read, reader, range(start, start + length)), metadata)
            for start in range(self._start, self._start + _SEGMENTS * length, length)
            for reader in range(share.readers)
        ]


def _dataset(
    name: str, run: str, load: Callable[[], TrainingData], share: Share, start: int, side: int
) -> ray.data.Dataset:
    """`name` and `run` identify the worker."""
    row_bytes = 3 * side**2
    with warnings.catch_warnings():
        # Passing the number of retries is deprecated in 2.60, which has no other way to set it yet.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = ray.data.read_datasource(
            SampleDatasource(load, share, start, row_bytes),
            concurrency=share.readers,
            num_cpus=_READER_CPUS,
            override_num_blocks=_SEGMENTS * share.readers,
            # A task that is repeated would compute its whole segment again; a new dataset goes on where this one was.
            ray_remote_args={"max_retries": 0},
        )
    dataset.set_name(name)
    # Ray Data divides the CPUs among the executions by their id, and counts one for 3 minutes after its process was
    # killed. On a small cluster whole CPUs would not suffice, and the readers would start 10 to 60 s later. So the
    # stream of a restarted worker takes over the share of the lost one.
    dataset._set_uuid(hashlib.sha256(run.encode()).hexdigest()[:12])
    context = dataset.context
    # A task's output becomes a block when it is larger than this, and is sliced when it is 1.5 times as large.
    block = max(_LEAST_BLOCK, int(0.9 * share.least_part * row_bytes))
    context.target_max_block_size = block
    # Bounds what is read ahead. By default it would be half of the object store.
    limits = context.execution_options.resource_limits
    context.execution_options.resource_limits = limits.copy(object_store_memory=_BLOCKS_AHEAD * block * share.readers)
    context.execution_no_progress_timeout_s = -1  # an evaluation may take longer than any
    context.enable_progress_bars = False
    return dataset


def _batches(data: TrainingData, training: Training, group: WorkerGroup, warn: Warn) -> Iterator[Batch]:
    """The micro batches of this worker from training.start_position on, endless, because a training that rolls back
    needs more batches than it has steps. Continues after failures of the stream."""
    share, side = _share(data, training, group), training.stage.resolution
    kept = ray.put(replace(data, cached_row_groups=share.streams_per_reader * (training.stage.window + 1)))
    name = f"{training.stage_name} rank {group.rank}"
    assembly, failures = Assembly(share, side), _Failures(3600 * training.s3_wait, warn)
    while True:
        dataset = _dataset(name, training.folder, partial(ray.get, kept), share, assembly.number, side)
        try:
            # Not through streaming_split: its actor is another process, whose start costs seconds of a core.
            for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
                for batch in assembly.add(block):
                    failures.forget()
                    yield batch
        except (RayError, StorageUnavailable) as error:
            failures.wait(error)


def _held_out(data: TrainingData, training: Training, numbers: Sequence[int], warn: Warn) -> Batch:
    """`held_out_batch`, which waits for a dataset that cannot be reached like the stream."""
    failures = _Failures(3600 * training.s3_wait, warn)
    while True:
        try:
            return held_out_batch(data, numbers)
        except StorageUnavailable as error:
            failures.wait(error)


class _Failures:
    """Decides what follows a failure of the stream: another attempt, now or later, or the end of the job."""

    def __init__(self, longest: float, warn: Warn) -> None:
        """`longest`: seconds to wait for a dataset that cannot be reached."""
        self._longest, self._warn = longest, warn
        self.forget()

    def forget(self) -> None:
        """A batch has arrived."""
        self._count, self._since = 0, float("inf")

    def wait(self, error: Exception) -> None:
        """Returns when the stream should be tried again. Raises JobFailed after the last attempt, and what a read task
        raised for the user."""
        cause: BaseException = error
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        line = str(cause).strip().partition("\n")[0]  # Ray appends lines of its own
        self._count += 1
        for kind in (JobFailed, UsageError, ValueError):
            if isinstance(cause, kind):
                raise kind(line) from error
        if isinstance(cause, StorageUnavailable):
            self._wait_for_dataset(line)
        elif isinstance(cause, S3Refused):
            raise JobFailed(line) from error
        elif not isinstance(cause, RayError):
            raise error
        elif self._count > _FAILURES:
            raise JobFailed(
                f"reading samples failed {self._count} times in a row ({type(cause).__name__}: {line}), perhaps out of "
                "memory; run the same command again, with more memory"
            ) from error
        else:
            self._warn(f"a process that reads samples was lost ({type(cause).__name__}); reading goes on in another")

    def _wait_for_dataset(self, line: str) -> None:
        now = time.monotonic()
        self._since = min(self._since, now)
        if now - self._since > self._longest:
            raise JobFailed(f"{line}; given up after {self._longest / 3600:g} h; run the same command again")
        seconds = _WAITS[min(self._count, len(_WAITS)) - 1]
        self._warn(
            f"{line}; training waits for samples, up to {self._longest / 3600:g} h: trying again in {seconds:.0f} s"
        )
        time.sleep(seconds)


class ReadAhead(Iterator[Batch]):
    """Iterates in a thread, from its creation on, `ahead` batches ahead of the worker."""

    def __init__(self, batches: Iterator[Batch], ahead: int = _QUEUED) -> None:
        self._ready: Queue[Batch | BaseException] = Queue(ahead)
        self._closed = threading.Event()
        threading.Thread(target=self._run, args=(batches,), daemon=True, name="samples").start()

    def __next__(self) -> Batch:
        """Raises what the iterator raised."""
        batch = self._ready.get()
        if isinstance(batch, BaseException):
            self._ready.put(batch)
            raise batch
        return batch

    def close(self) -> None:
        """Ends the thread and with it the read tasks."""
        self._closed.set()

    def _run(self, batches: Iterator[Batch]) -> None:
        try:
            for batch in batches:
                if not self._put(batch):
                    return
        except BaseException as error:  # raised again in the thread that waits for the batch
            self._put(error)

    def _put(self, batch: Batch | BaseException) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(batch, timeout=_POLL_SECONDS)
                return True
            except Full:
                continue
        return False
