"""How two selections of one dataset differ: rows that only one has, with why the other has not, and changed texts."""

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.errors import UsageError
from pipeline.core.records import SELECTION
from pipeline.curation.rerun import curate_command
from pipeline.storage.shards import Store

_NAMED = 5  # ids that stand for all of a kind
_TEXTS = [field.name for field in SELECTION if field.name not in ("id", "row")]
_GONE = "its shard is gone"


@dataclass
class Difference:
    """Rows that differ in one way: how many, and the first few of them."""

    rows: int = 0
    ids: list[str] = field(default_factory=list)

    def add(self, rows: int, ids: list[str]) -> None:
        self.rows += rows
        self.ids += ids[: _NAMED - len(self.ids)]


# By what differs, the selection that alone has the row or "" for the text of both, and how. None: all of this kind.
Differences = dict[tuple[str, str | None], Difference]


def compare(store: Store, first: str, second: str) -> Iterator[str]:
    """Lines: counts by reason, each with a few ids. UsageError where there is no such selection."""
    for name in (first, second):
        if not store.exists(f"selections/{name}/selection.json"):
            raise UsageError(f"{store.root} has no finished selection {name!r}; run: {curate_command(store, name)}")
    shards = sorted({*store.shards(f"selections/{first}"), *store.shards(f"selections/{second}")})
    total: Differences = defaultdict(Difference)
    with ThreadPoolExecutor(4) as readers:
        for found in readers.map(lambda shard: _compared(store, first, second, shard), shards):
            for kind, part in found.items():
                total[kind].add(part.rows, part.ids)
    for title, what in (
        (f"only in {first}", first),
        (f"only in {second}", second),
        ("in both, with another text", ""),
    ):
        yield f"{title}: {total[what, None].rows}"
        by_reason = [(how, part) for (where, how), part in total.items() if where == what and how is not None]
        for how, part in sorted(by_reason, key=lambda item: -item[1].rows):
            yield f"  {part.rows} {how}: {', '.join(part.ids)}{' ...' if part.rows > len(part.ids) else ''}"


def _compared(store: Store, first: str, second: str, shard: str) -> Differences:
    """The differences of one shard; only its own rows are ever in memory."""
    rows = {name: _rows(store, name, shard) for name in (first, second)}
    found: Differences = {}
    for name, other in ((first, second), (second, first)):
        only = rows[name]["id"].filter(pc.invert(pc.is_in(rows[name]["id"], rows[other]["id"])))
        found[name, None] = _difference(only)
        if len(only):
            reasons = _reasons(store, other, shard, only)
            for reason in pc.unique(reasons).to_pylist():
                found[name, reason] = _difference(only.filter(pc.equal(reasons, reason)))
    left = rows[first].filter(pc.is_in(rows[first]["id"], rows[second]["id"]))
    right = rows[second].take(pc.index_in(left["id"], rows[second]["id"]))
    any_changed = pa.repeat(False, left.num_rows)
    for column in _TEXTS:
        changed = _differ(left[column], right[column])
        any_changed = pc.or_(any_changed, changed)
        found["", column] = _difference(left["id"].filter(changed))
    found["", None] = _difference(left["id"].filter(any_changed))
    return {kind: part for kind, part in found.items() if part.rows}


def _difference(ids: pa.ChunkedArray) -> Difference:
    return Difference(len(ids), ids[:_NAMED].to_pylist())


def _rows(store: Store, name: str, shard: str) -> pa.Table:
    file = f"selections/{name}/{shard}.parquet"
    return store.read_table(file, ["id", *_TEXTS]) if store.exists(file) else SELECTION.empty_table()


def _reasons(store: Store, name: str, shard: str, ids: pa.ChunkedArray) -> pa.Array:
    """Why a selection has not these rows."""
    file = f"selections/{name}/rejected/{shard}.parquet"
    if not store.exists(file):
        return pa.repeat(_GONE, len(ids))
    table = store.read_table(file, ["key", "reason"])
    return pc.fill_null(table["reason"].take(pc.index_in(ids, table["key"])), _GONE)


def _differ(left: pa.ChunkedArray, right: pa.ChunkedArray) -> pa.Array:
    """By row: whether the two are not equal; null is equal to null."""
    if pa.types.is_list(left.type):
        left, right = (pc.binary_join(column, "\n") for column in (left, right))
    one_null = pc.xor(pc.is_null(left), pc.is_null(right))
    return pc.or_(pc.fill_null(pc.not_equal(left, right), False), one_null)
