"""The row pipeline of the score job: images -> pixels -> scores -> partial files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.core.cluster import at_most_a_node
from pipeline.core.cluster import nodes as living_nodes
from pipeline.core.errors import UsageError
from pipeline.core.row_pipeline import Actors, Step, stream_rows
from pipeline.core.shard_progress import Pending
from pipeline.pictures.preprocessing import Preprocessing
from pipeline.scores.commit import commit_shard, partial_shard, write_rows
from pipeline.scores.scoring import (
    ScoreShard,
    loading,
    prepare_limit,
    prepare_memory,
    prepare_rows,
    read_images,
    read_memory,
)
from pipeline.storage.shards import Store

# On two cores, one task that prepares, one that writes and one that reads run beside one classifier.
_CLASSIFY_CPUS = 1
_PREPARE_CPUS = 0.8
_WRITE_CPUS = 0.1
_WRITTEN_ROWS = 256  # gathered for partial files
_LEAST_READS = 4  # shards at a time


@dataclass(frozen=True, kw_only=True)
class ClassifierModel:
    """A classifier's folder, and what its steps have to know without loading it."""

    folder: str  # absolute path
    digest: str
    labels: Sequence[str]
    preprocessing: Preprocessing
    batch_size: int  # images per forward pass


@dataclass(frozen=True, kw_only=True)
class Classifiers:
    """The actors that classify."""

    most: int
    gpus: int  # of each

    def __str__(self) -> str:
        each = "a GPU and a CPU" if self.gpus else "a CPU"
        return f"up to {self.most} actor{'s' if self.most > 1 else ''}, each with {each}"


def plan_classifiers(asked: int | None, rows: int, batch_size: int, use_gpus: bool) -> Classifiers:
    """One actor per GPU or, without GPUs, one for three of four CPUs: the others decode. At most one per batch.

    `asked` is the number to have instead. Raises UsageError if these do not fit beside a CPU that decodes: Ray would
    wait for them for ever.
    """
    nodes = living_nodes()
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    gpus = int(use_gpus and any(node.get("GPU") for node in nodes))
    fit = sum(cpus)
    if gpus:
        fit = sum(int(min(count, node.get("GPU", 0))) for count, node in zip(cpus, nodes, strict=True))
    fit = min(fit, sum(cpus) - 1)
    if (asked or 1) > fit:
        raise UsageError(
            f"{asked or 1} actors do not fit, each of which takes a {'GPU and a CPU' if gpus else 'CPU'} beside a CPU "
            f"that decodes: Ray has room for {max(0, fit)}; give a smaller --actors, or RAY_ADDRESS of a larger cluster"
        )
    most = fit if gpus else min(fit, max(1, sum(cpus) * 3 // 4))
    return Classifiers(most=min(asked or most, max(1, math.ceil(rows / batch_size))), gpus=gpus)


def score_shards(
    shards: Mapping[str, ScoreShard], dataset: Store, folder: str, model: ClassifierModel, classifiers: Classifiers
) -> dict[str, str]:
    """Writes FOLDER/<shard> and FOLDER/rejected/<shard> of these shards, by name. Returns the reason for each that
    failed."""
    started = set(dataset.folders(f"{folder}/partial"))
    todo = {}
    for name, planned in shards.items():
        rows = np.arange(planned.rows, dtype=np.int32)
        if name in started:
            rows = np.setdiff1d(rows, partial_shard(planned, dataset.root, folder).rows("scores"))
        todo[name] = Pending(shard=planned, rows=rows)
    prepare = partial(prepare_rows, preprocessing=model.preprocessing, most=at_most_a_node(prepare_limit()))
    load = partial(loading, model.folder, model.digest, model.batch_size, device="cuda" if classifiers.gpus else "cpu")
    actors = Actors(make=load, most=classifiers.most, gpus=classifiers.gpus)
    write = partial(write_rows, dataset=dataset.root, folder=folder)
    return stream_rows(
        "score",
        todo,
        partial(read_images, dataset=dataset.root),
        [
            Step(name="prepare", work=prepare, cpus=_PREPARE_CPUS, memory=prepare_memory()),
            Step(name="classify", work=actors, cpus=_CLASSIFY_CPUS, rows=model.batch_size),
            Step(name="write", work=write, cpus=_WRITE_CPUS, rows=_WRITTEN_ROWS),
        ],
        partial(commit_shard, dataset=dataset.root, folder=folder, labels=model.labels),
        read_memory=max(map(read_memory, shards.values())),
        most_reads=max(_LEAST_READS, 2 * classifiers.most),
    )
