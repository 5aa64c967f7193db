"""Chooses the rows that the report shows as examples: the same ones in every run.

Showing a picture costs reading its row group, so all examples come from the same few shards: shards are ordered by a
hash of their names, and each contributes three rows of a kind before the next one.
"""

import re
import zlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.reporting.counts import add_words, count_words
from pipeline.storage.scan import map_in_order, read_batches
from pipeline.storage.shards import Store

PAIRS = 12  # examples of the reason "duplicate", which are shown with the picture that was kept instead
_OF_A_REASON = 6  # examples of any other reason
_TOGETHER = 3  # rows of one shard before the next shard's turn
_REASONS = 200  # reasons that may have examples


@dataclass(frozen=True, order=True)
class Example:
    """A rejected row. The first three fields define the order of preference."""

    turn: int  # 0 for the first three rows of a shard, 1 for the next three ...
    shard_hash: int
    draw: float
    key: str
    detail: str

    @property
    def keeper(self) -> str | None:
        """The id of the picture that was kept instead of a duplicate."""
        found = re.fullmatch(r"of (\S+)", self.detail)
        return found[1] if found else None


@dataclass
class Rejections:
    """The number of rejected rows in a folder by reason, and a few examples of each reason."""

    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)


def survey_rejections(store: Store, folder: str) -> Rejections:
    """Counts the reasons in <folder>/*.parquet (REJECTED) and chooses examples."""
    found = Rejections()
    for part in map_in_order(lambda shard: _survey_shard(store, folder, shard), store.shards(folder)):
        add_words(found.reasons, part.reasons)
        for reason, examples in part.examples.items():
            if reason in found.examples or len(found.examples) < _REASONS:
                several = sorted(found.examples.get(reason, []) + examples)
                found.examples[reason] = several[: _limit(reason)]
    return found


def _survey_shard(store: Store, folder: str, shard: str) -> Rejections:
    batches = list(read_batches(store, f"{folder}/{shard}.parquet", ["key", "reason", "detail"]))
    if not batches:
        return Rejections()
    table, rng = pa.Table.from_batches(batches), np.random.default_rng(_shard_hash(shard))
    found, draw = Rejections(count_words(table["reason"])), rng.random(table.num_rows)
    for reason, _ in found.reasons.most_common(_REASONS):
        rows = pc.indices_nonzero(pc.equal(table["reason"], reason)).to_numpy()
        rows = rows[np.argsort(draw[rows])[: _limit(reason)]]
        keys, details = (table[column].take(pa.array(rows)).to_pylist() for column in ("key", "detail"))
        found.examples[reason] = [
            Example(rank // _TOGETHER, _shard_hash(shard), *row)
            for rank, row in enumerate(zip(draw[rows].tolist(), keys, details, strict=True))
        ]
    return found


def _limit(reason: str) -> int:
    return PAIRS if reason == "duplicate" else _OF_A_REASON


def choose_ids(store: Store, folder: str, count: int) -> list[str]:
    """The ids of `count` rows of <folder>/*.parquet, or of all rows if there are fewer. Reads only a few shards."""
    chosen: list[str] = []
    spare: list[str] = []  # further rows of the same shards, in case there are few shards
    for shard in sorted(store.shards(folder), key=_shard_hash):
        if len(chosen) >= count:
            break
        batches = read_batches(store, f"{folder}/{shard}.parquet", ["id"])
        ids = [name for batch in batches for name in batch["id"].to_pylist()]
        order = np.random.default_rng(_shard_hash(shard)).permutation(len(ids))[:count]
        drawn = [ids[number] for number in order]
        chosen += drawn[:_TOGETHER]
        spare += drawn[_TOGETHER:]
    return (chosen + spare)[:count]


def _shard_hash(shard: str) -> int:
    """Unlike Python's hash, the same in every process."""
    return zlib.crc32(shard.encode())
