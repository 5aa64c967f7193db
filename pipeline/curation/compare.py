"""Compares two selections of one dataset: rows that only one of them has, and rows whose texts differ."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.errors import UsageError
from pipeline.core.records import SELECTION
from pipeline.curation.command import curate_command
from pipeline.storage.shards import Store

_NAMED = 5  # ids that are printed for each kind of difference
_TEXTS = [field.name for field in SELECTION if field.name not in ("id", "row")]
_GONE = "its shard is gone"

# The selection that alone has the row ("" for changed texts), and the reason or the changed column (None: all of them).
Kind = tuple[str, str | None]


def compare(store: Store, first: str, second: str) -> Iterator[str]:
    """Lines with the number of differences by reason, each with a few ids.

    Raises UsageError if one of the selections is missing or unfinished.
    """
    for name in (first, second):
        if not store.exists(f"selections/{name}/selection.json"):
            raise UsageError(f"{store.root} has no finished selection {name!r}; run: {curate_command(store, name)}")
    shards = sorted({*store.shards(f"selections/{first}"), *store.shards(f"selections/{second}")})
    counts, named = Counter[Kind](), defaultdict[Kind, list[str]](list)
    with ThreadPoolExecutor(4) as readers:
        for found in readers.map(lambda shard: _compare_shard(store, first, second, shard), shards):
            for kind, (rows, ids) in found.items():
                counts[kind] += rows
                named[kind] += ids[: _NAMED - len(named[kind])]
    titles = {first: f"only in {first}", second: f"only in {second}", "": "in both, with another text"}
    for where in (first, second, ""):
        yield f"{titles[where]}: {counts[where, None]}"
        for kind, rows in counts.most_common():
            if kind[0] == where and kind[1] is not None:
                yield f"  {rows} {kind[1]}: {', '.join(named[kind])}{' ...' if rows > len(named[kind]) else ''}"


def _compare_shard(store: Store, first: str, second: str, shard: str) -> dict[Kind, tuple[int, list[str]]]:
    """The number of rows and the first few ids of each kind of difference. Memory is bounded by one shard."""
    rows = {name: _rows(store, name, shard) for name in (first, second)}
    ids: dict[Kind, pa.ChunkedArray] = {}
    for name, other in ((first, second), (second, first)):
        only = rows[name]["id"].filter(pc.invert(pc.is_in(rows[name]["id"], rows[other]["id"])))
        ids[name, None] = only
        if len(only):
            reasons = _reasons(store, other, shard, only)
            ids |= {(name, reason): only.filter(pc.equal(reasons, reason)) for reason in pc.unique(reasons).to_pylist()}
    left = rows[first].filter(pc.is_in(rows[first]["id"], rows[second]["id"]))
    right = rows[second].take(pc.index_in(left["id"], rows[second]["id"]))
    any_changed = pa.repeat(False, left.num_rows)
    for column in _TEXTS:
        changed = _differs(left[column], right[column])
        any_changed = pc.or_(any_changed, changed)
        ids["", column] = left["id"].filter(changed)
    ids["", None] = left["id"].filter(any_changed)
    return {kind: (len(found), found[:_NAMED].to_pylist()) for kind, found in ids.items() if len(found)}


def _rows(store: Store, name: str, shard: str) -> pa.Table:
    file = f"selections/{name}/{shard}.parquet"
    return store.read_table(file, ["id", *_TEXTS]) if store.exists(file) else SELECTION.empty_table()


def _reasons(store: Store, name: str, shard: str, ids: pa.ChunkedArray) -> pa.Array:
    """The reason for which a selection does not have each of these rows."""
    file = f"selections/{name}/rejected/{shard}.parquet"
    if not store.exists(file):
        return pa.repeat(_GONE, len(ids))
    table = store.read_table(file, ["key", "reason"])
    return pc.fill_null(table["reason"].take(pc.index_in(ids, table["key"])), _GONE)


def _differs(left: pa.ChunkedArray, right: pa.ChunkedArray) -> pa.Array:
    """For each row, true if the two values differ; null equals null."""
    if pa.types.is_list(left.type):
        left, right = (pc.binary_join(column, "\n") for column in (left, right))
    one_null = pc.xor(pc.is_null(left), pc.is_null(right))
    return pc.or_(pc.fill_null(pc.not_equal(left, right), False), one_null)
