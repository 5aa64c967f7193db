"""The samples of a training worker, read ahead of it by Ray actors.

Actors and not Ray Data: its order is not reproducible, its iterators hold no position (ray issues 37633, 48224), and
its executor, a Python loop in the worker's process, made a training step on two cores three times as long.
"""

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from queue import Queue
from typing import Any, Final

import ray
import torch
from ray.exceptions import RayTaskError

from pipeline.core.errors import JobFailed, UsageError
from trainer.recipe.training import Training
from trainer.samples.data import Batch, TrainingData, concatenate
from trainer.samples.loader import Loader
from trainer.samples.order import effective_streams, micro_batches
from trainer.training.worker import SampleSource
from trainer.training.worker_group import WorkerGroup

_AHEAD: Final = 3  # micro batches requested per loader; bounds memory however fast the loaders are
_QUEUED: Final = 2  # complete micro batches waiting in the worker
_MAX_LOADERS: Final = 8  # per worker
_LOADER_RETRIES: Final = 3  # of a call whose process died, so that a picture that kills it does not do so forever
# A loader uses a whole CPU and is counted so, but Ray reserves little, so that it always finds a place.
_LOADER_CPUS: Final = 0.01


def loader_source(data: TrainingData, training: Training, group: WorkerGroup) -> SampleSource:
    """The samples of the selection, read by loader actors that this function starts."""
    loaders = _start_loaders(data, training, group)
    return SampleSource(
        data=data,
        batches=lambda training: _fetch(_request_batches(loaders, training, group)),
        held_out=lambda numbers: _get(loaders[0].held_out.remote(numbers)),
    )


def cpus_per_worker(workers: int) -> float:
    """CPUs that Ray reserves for a training worker. Below 1, so that loaders, which need little, fit on a node that is
    full of workers after another node was lost."""
    return min(0.9, (float(ray.cluster_resources().get("CPU", 1)) - 1) / workers)


def _start_loaders(data: TrainingData, training: Training, group: WorkerGroup) -> list[Any]:
    """One loader per free CPU, at most one per stream of this worker. Each reads some of the worker's streams.

    Without a GPU all CPUs count as free, because low-priority loaders use the time in which the training waits.
    """
    low_priority = not torch.cuda.is_available()
    cpus = float(ray.cluster_resources().get("CPU", 1))
    free = cpus if low_priority else cpus - group.size * cpus_per_worker(group.size)
    streams = data.order.streams // group.size
    count = max(1, min(streams, _MAX_LOADERS, int(free / group.size)))
    kept = replace(data, cached_row_groups=-(-streams // count) * (training.stage.window + 1))
    remote = ray.remote(
        num_cpus=_LOADER_CPUS,
        scheduling_strategy="SPREAD",
        max_restarts=-1,
        max_task_retries=_LOADER_RETRIES,
    )(Loader)
    shared = ray.put(kept)
    return [remote.remote(shared, low_priority) for _ in range(count)]


def _request_batches(loaders: list[Any], training: Training, group: WorkerGroup) -> Iterator[list[Any]]:
    """References to the parts of each micro batch of this worker, in order from start_step on, some requested ahead.

    Endless, because a training that rolls back needs more batches than it has steps.
    """
    stage = training.stage
    streams = effective_streams(stage.batch_size, stage.streams)
    per_stream = stage.batch_size // streams
    first, own = group.rank * streams // group.size, streams // group.size

    def loader_of(position: int) -> int:
        """Adjacent streams share a loader, so that a micro batch has few parts."""
        return (position % stage.batch_size // per_stream - first) * len(loaders) // own

    ahead: deque[list[Any]] = deque()
    for step in itertools.count(training.start_step):
        batch = training.position(step) // stage.batch_size
        for positions in micro_batches(batch, stage.batch_size, group.rank, group.size, training.micro_batch):
            ahead.append([loaders[loader_of(part.start)].load.remote(part) for part in _parts(positions, loader_of)])
            if len(ahead) > _AHEAD * len(loaders):
                yield ahead.popleft()


def _parts(positions: range, key: Any) -> Iterator[range]:
    """The positions, split where `key` changes."""
    start = positions.start
    for position in positions:
        if key(position) != key(start):
            yield range(start, position)
            start = position
    yield range(start, positions.stop)


def _fetch(requested: Iterator[list[Any]]) -> Iterator[Batch]:
    """Complete batches, assembled by a thread while the worker trains on earlier ones."""
    ready: Queue[Batch | BaseException] = Queue(_QUEUED)

    def fetch() -> None:
        try:
            for parts in requested:
                ready.put(concatenate(_get(parts)))
        except BaseException as error:  # raised again in the thread that waits for the batch
            ready.put(error)

    threading.Thread(target=fetch, daemon=True, name="batches").start()
    while True:
        batch = ready.get()
        if isinstance(batch, BaseException):
            raise batch
        yield batch


def _get(references: Any) -> Any:
    """ray.get that raises a loader's error for the user itself, without Ray's traceback in the message."""
    try:
        return ray.get(references)
    except RayTaskError as error:
        if isinstance(error.cause, JobFailed | UsageError | ValueError):
            raise error.cause from error
        raise
