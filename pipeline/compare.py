"""How two selections of one dataset differ: rows that only one has, with why the other has not, and changed texts."""

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.jobs import UsageError
from pipeline.records import SELECTION
from pipeline.rerun import curate_command
from pipeline.shards import Store

_NAMED = 5  # ids that stand for all of a kind
_TEXTS = [field.name for field in SELECTION if field.name not in ("id", "row")]
_GONE = "its shard is gone"

Groups = dict[tuple[str, str], list[str]]  # what differs, and how -> ids


def compare(store: Store, first: str, second: str) -> Iterator[str]:
    """Lines: counts by reason, each with a few ids. UsageError where there is no such selection."""
    for name in (first, second):
        if not store.exists(f"selections/{name}/selection.json"):
            raise UsageError(f"{store.root} has no finished selection {name!r}; run: {curate_command(store, name)}")
    shards = sorted({*store.shards(f"selections/{first}"), *store.shards(f"selections/{second}")})
    total: Groups = defaultdict(list)
    with ThreadPoolExecutor(4) as readers:
        for groups in readers.map(lambda shard: _compared(store, first, second, shard), shards):
            for kind, ids in groups.items():
                total[kind] += ids
    for title, what in (
        (f"only in {first}", first),
        (f"only in {second}", second),
        ("in both, with another text", ""),
    ):
        by_reason = {how: ids for (where, how), ids in total.items() if where == what}
        yield f"{title}: {len({each for ids in by_reason.values() for each in ids})}"
        for how, ids in sorted(by_reason.items(), key=lambda item: -len(item[1])):
            yield f"  {len(ids)} {how}: {', '.join(ids[:_NAMED])}{' ...' if len(ids) > _NAMED else ''}"


def _compared(store: Store, first: str, second: str, shard: str) -> Groups:
    rows = {name: _rows(store, name, shard) for name in (first, second)}
    found: Groups = defaultdict(list)
    for name, other in ((first, second), (second, first)):
        only = rows[name].filter(pc.invert(pc.is_in(rows[name]["id"], rows[other]["id"])))["id"].to_pylist()
        reasons = _reasons(store, other, shard) if only else {}
        for each in only:
            found[name, reasons.get(each, _GONE)].append(each)
    left = rows[first].filter(pc.is_in(rows[first]["id"], rows[second]["id"]))
    right = rows[second].take(pc.index_in(left["id"], rows[second]["id"]))
    for column in _TEXTS:
        changed = _differ(left[column], right[column])
        found["", column] += left["id"].filter(changed).to_pylist()
    return {kind: ids for kind, ids in found.items() if ids}


def _rows(store: Store, name: str, shard: str) -> pa.Table:
    file = f"selections/{name}/{shard}.parquet"
    return store.read_table(file, ["id", *_TEXTS]) if store.exists(file) else SELECTION.empty_table()


def _reasons(store: Store, name: str, shard: str) -> dict[str, str]:
    file = f"selections/{name}/rejected/{shard}.parquet"
    table = store.read_table(file, ["key", "reason"]) if store.exists(file) else None
    return dict(zip(table["key"].to_pylist(), table["reason"].to_pylist(), strict=True)) if table else {}


def _differ(left: pa.ChunkedArray, right: pa.ChunkedArray) -> pa.Array:
    """By row: whether the two are not equal; null is equal to null."""
    if pa.types.is_list(left.type):
        left, right = (pc.binary_join(column, "\n") for column in (left, right))
    one_null = pc.xor(pc.is_null(left), pc.is_null(right))
    return pc.or_(pc.fill_null(pc.not_equal(left, right), False), one_null)
