"""Checked rows -> partial files -> the finished shard. See pipeline/storage/partial.py.

Partial files have no images: the commit reads them from the raw file again, which costs less than to write them twice.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.records import IMAGES, REJECTED, TIER, Rejected
from pipeline.core.tables import ROW, SHARD, labelled
from pipeline.ingestion.raw_rows import MADE_FROM, all_rows, read_images, read_raw, reading_key
from pipeline.ingestion.rules import IngestRules, RawShard, tier_folder
from pipeline.ingestion.validation import ABOUT_IMAGES, TIER_COLUMNS, check_rows
from pipeline.pictures.containers import RejectReason
from pipeline.storage.partial import PartialShard
from pipeline.storage.shards import Store

# Most image bytes per row group: what a reader of the dataset has to fetch for one row.
_GROUP_BYTES = 48 << 20
COMMIT_BYTES: Final = 3 * _GROUP_BYTES  # memory of a commit, without reading
_IMAGE: Final = IMAGES.get_field_index("image")
_DECODER_REASONS: Final = frozenset(map(str, RejectReason))


def partial_shard(raw: RawShard, dataset: str, rules: IngestRules) -> PartialShard:
    return PartialShard(Store(dataset), "images", raw.shard, rules.parts_fingerprint(raw))


def write_rows(table: pa.Table, dataset: str) -> Iterator[pa.Table]:
    """Writes rows of CHECKED into partial files of their shard."""
    for shard in pc.unique(table[SHARD]).to_pylist():
        rows = table.filter(pc.equal(table[SHARD], shard))
        partial_files = PartialShard(Store(dataset), "images", shard, rows[MADE_FROM][0].as_py())
        is_kept = pc.is_null(rows["reason"])
        kept, rejected = rows.filter(is_kept), rows.filter(pc.invert(is_kept))
        partial_files.write("rejected", rejected[ROW].to_numpy(), rejected.select(REJECTED.names).cast(REJECTED))
        smaller = kept.select(["id", *TIER_COLUMNS]).rename_columns(["id", *TIER_COLUMNS.values()])
        if smaller["image"].null_count == 0:
            partial_files.write("tier", kept[ROW].to_numpy(), smaller.select(TIER.names).cast(TIER))
        partial_files.write("checked", kept[ROW].to_numpy(), kept.select(ABOUT_IMAGES.names).cast(ABOUT_IMAGES))
    yield table.select([SHARD, ROW])


def commit_shard(raw: RawShard, dataset: str, rules: IngestRules) -> Counter[str]:
    """Writes images/<shard>, rejected/<shard> and the smaller tier, if any, from the partial files and the images of
    the raw file. Every raw row is in one of the first two: of several intact copies of a post, the first is kept.

    The images are committed last, so that a finished shard has all of its files. Returns the number of rows "kept" and
    of rows rejected by reason. Raises RawFileChanged if the raw file is not the one that was checked.
    """
    store, parts = Store(dataset), partial_shard(raw, dataset, rules)
    provenance = {"raw": raw.path, "footer": raw.digest, "stamp": raw.stamp, "settings": rules.settings(raw)}
    provenance |= {"fingerprint": rules.fingerprint(raw)}
    # Tiers of an earlier ingest may hold other rows.
    for folder in store.folders(""):
        if re.fullmatch(r"images-\d+", folder):
            store.remove(f"{folder}/{raw.shard}.parquet")
    numbers, about = parts.rows_of("checked", ABOUT_IMAGES)
    intact, copies = set(numbers.tolist()), about.select(["id", "sha256"]).to_pylist()
    first: dict[str, int] = {}  # row of each kept post
    for row, copy in zip(numbers.tolist(), copies, strict=True):
        first.setdefault(copy["id"], row)
    is_first = np.array([first[copy["id"]] == row for row, copy in zip(numbers.tolist(), copies, strict=True)], bool)
    rejected: dict[int, dict[str, Any]] = {}
    for place in np.flatnonzero(~is_first).tolist():
        row, copy = int(numbers[place]), copies[place]
        rejected[row] = _repeated(copy["id"], row, raw) | {"sha256": copy["sha256"]}
    with row_groups(store, f"images/{raw.shard}.parquet", IMAGES, provenance) as append:
        kept, done = about.filter(pa.array(is_first)), 0
        for images in read_images(raw, numbers[is_first], rules):
            append(kept.slice(done, len(images)).add_column(_IMAGE, IMAGES.field(_IMAGE), images))
            done += len(images)
        if rules.downsize:
            write_tier(parts, raw, rules, lambda id, row: first[id] == row)
        for number, table in parts.tables("rejected"):
            for row, refusal in zip(number.tolist(), table.to_pylist(), strict=True):
                if row in intact:  # run twice, and refused once, for lack of memory
                    continue
                if refusal["reason"] in _DECODER_REASONS and first.get(refusal["key"], row) < row:
                    refusal |= _repeated(refusal["key"], row, raw)
                rejected[row] = refusal
        assert done + len(rejected) == raw.rows, (raw.shard, done, len(rejected), raw.rows)
        refusals = pa.RecordBatch.from_pylist([row for _, row in sorted(rejected.items())], REJECTED)
        store.write_table(f"rejected/{raw.shard}.parquet", refusals, REJECTED, raw=raw.path)
    parts.remove()
    return Counter({"kept": done}) + Counter(row["reason"] for row in rejected.values())


def _repeated(id: str, row: int, raw: RawShard) -> dict[str, str]:
    return asdict(Rejected(id, "duplicate id", f"row {row} of {raw.path}"))


def write_tier(parts: PartialShard, raw: RawShard, rules: IngestRules, is_wanted: Callable[[str, int], bool]) -> int:
    """Writes the smaller tier of a shard from its partial files: the rows for which `is_wanted` (id, row number) is
    true. Returns their number."""
    assert rules.downsize
    count, provenance = 0, {"fingerprint": rules.tier_fingerprint(raw)}
    with row_groups(parts.store, f"{tier_folder(rules.downsize)}/{raw.shard}.parquet", TIER, provenance) as append:
        for number, table in parts.tables("tier"):
            rows = zip(table["id"].to_pylist(), number.tolist(), strict=True)
            wanted = table.filter(pa.array([is_wanted(id, row) for id, row in rows], pa.bool_()))
            append(wanted)
            count += wanted.num_rows
    return count


def ingest_shard(raw: RawShard, dataset: str, rules: IngestRules) -> Counter[str]:
    """All steps for one shard in this process: what the pipeline does on many."""
    readings = {reading_key(raw.reading): raw.reading}
    for table in read_raw(raw, all_rows(raw), rules):
        for checked in check_rows(labelled(table, raw.shard), rules, readings):
            list(write_rows(checked, dataset))
    return commit_shard(raw, dataset, rules)


@contextmanager
def row_groups(
    store: Store, name: str, schema: pa.Schema, metadata: Mapping[str, str]
) -> Iterator[Callable[[pa.Table], None]]:
    """Yields a function that appends rows to a parquet file whose row groups hold at most _GROUP_BYTES of images, or
    one larger image."""
    group: list[pa.Table] = []
    size = 0
    with store.writing_table(name, schema, **metadata) as write:

        def flush() -> None:
            nonlocal size
            if group:
                write(pa.concat_tables(group).combine_chunks())
                group.clear()
                size = 0

        def append(table: pa.Table) -> None:
            nonlocal size
            start = 0
            for row, length in enumerate(pc.binary_length(table["image"]).to_pylist()):
                if size and size + length > _GROUP_BYTES:
                    group.append(table.slice(start, row - start))
                    flush()
                    start = row
                size += length
            group.append(table.slice(start))

        yield append
        group[:] = [part for part in group if part.num_rows]
        flush()
