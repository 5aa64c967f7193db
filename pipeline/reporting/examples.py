"""Which rows the report shows as examples: the same ones on every run, from few shards, whatever their order.

A picture costs the reading of its row group, so examples come from the same few shards: shards are put in an order by
a hash of their names, and the first ones that have rows of a kind give three of them each.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.reporting.tallies import add_words, tally
from pipeline.storage.scan import in_order, read_batches
from pipeline.storage.shards import Store

_TOGETHER = 3  # rows of one shard before the next shard's turn
_REASONS = 200  # for which examples are remembered at all


@dataclass(frozen=True, order=True)
class Example:
    """A rejected row. The fields before `key` are its place in the order of preference."""

    turn: int  # 0 for the first three of its shard, 1 for the next three ...
    shard_hash: int
    draw: float
    key: str
    detail: str


@dataclass
class Rejections:
    """The rejected rows of one folder, counted, and a few examples of each reason."""

    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)


def survey_rejections(store: Store, folder: str, limits: Mapping[str, int], limit: int) -> Rejections:
    """Count the reasons in <folder>/*.parquet (REJECTED) and choose examples: up to limits[reason], or `limit`."""
    found = Rejections()
    for part in in_order(lambda shard: _survey_shard(store, folder, shard, limits, limit), store.shards(folder)):
        add_words(found.reasons, part.reasons)
        for reason, examples in part.examples.items():
            if reason in found.examples or len(found.examples) < _REASONS:
                several = sorted(found.examples.get(reason, []) + examples)
                found.examples[reason] = several[: limits.get(reason, limit)]
    return found


def _survey_shard(store: Store, folder: str, shard: str, limits: Mapping[str, int], limit: int) -> Rejections:
    found, draws = Rejections(), np.random.default_rng(_shard_hash(shard))
    drawn: dict[str, list[tuple[float, str, str]]] = {}
    for batch in read_batches(store, f"{folder}/{shard}.parquet", ["key", "reason", "detail"]):
        reasons = tally(batch["reason"])
        add_words(found.reasons, reasons)
        draw = draws.random(batch.num_rows)
        for reason, _ in reasons.most_common(_REASONS):
            rows = pc.indices_nonzero(pc.equal(batch["reason"], reason)).to_numpy()
            rows = rows[np.argsort(draw[rows])[: limits.get(reason, limit)]]
            several = [(draw[row], batch["key"][row].as_py(), batch["detail"][row].as_py()) for row in rows.tolist()]
            drawn[reason] = sorted(drawn.get(reason, []) + several)[: limits.get(reason, limit)]
    for reason, several in drawn.items():
        found.examples[reason] = [
            Example(rank // _TOGETHER, _shard_hash(shard), *row) for rank, row in enumerate(several)
        ]
    return found


def choose_ids(store: Store, folder: str, count: int) -> list[str]:
    """Ids of `count` rows of <folder>/*.parquet (or of all, if fewer), reading the ids of a few shards alone."""
    chosen: list[str] = []
    passed: list[str] = []  # more of the same shards, for where there are few shards
    for shard in sorted(store.shards(folder), key=_shard_hash):
        if len(chosen) >= count:
            break
        ids = [row for batch in read_batches(store, f"{folder}/{shard}.parquet", ["id"]) for row in _texts(batch)]
        order = np.random.default_rng(_shard_hash(shard)).permutation(len(ids))[:count]
        drawn = [ids[number] for number in order]
        chosen += drawn[:_TOGETHER]
        passed += drawn[_TOGETHER:]
    return (chosen + passed)[:count]


def keeper_of(detail: str) -> str | None:
    """The id of the picture that was kept instead, out of the detail of a duplicate."""
    found = re.fullmatch(r"of (\S+)", detail)
    return found[1] if found else None


def _texts(batch: pa.RecordBatch) -> Iterable[str]:
    texts: list[str] = batch.column(0).to_pylist()
    return texts


def _shard_hash(shard: str) -> int:
    """Not Python's own hash, which differs from process to process."""
    return zlib.crc32(shard.encode())
