"""One raw shard -> one shard of checked images, one of rejected rows and, if asked for, one of smaller images.

Runs in a Ray task but does not import Ray. A worker holds one page of the raw file and some tens of megabytes of
images, whatever the size of the file and of its row groups.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.records import IMAGES, REJECTED, TAG_CATEGORIES, TIER, Post, Rejected
from pipeline.ingestion.rules import IngestRules, RawShard, tier_folder
from pipeline.pictures.crops import downsize
from pipeline.pictures.decoder import Picture, Refused, decode
from pipeline.pictures.perceptual_hash import perceptual_hash
from pipeline.sources import SITES
from pipeline.sources.fields import image_bytes
from pipeline.storage.shards import Store

# Most image bytes per row group: what a reader of the dataset has to fetch for one row.
_GROUP_BYTES = 48 << 20
_READ_BYTES = 16 << 20
_MOST_ROWS = 256
# Read buffer per column, and the size of a GET on S3. Unbuffered, pyarrow fetches whole column chunks, up to gigabytes.
_BUFFER_BYTES = 4 << 20
# A page is always read whole, and most writers check its size only after this many values.
_PAGE_ROWS = 1024

Row = dict[str, Any] | Exception  # the exception if a value cannot be represented, such as a date in the year 10000


def memory_needed(raw: RawShard) -> int:
    """Bytes that ingesting a shard may take: a page read, unpacked and as rows, the rows to write twice, the process.

    A raw file of 600 MB in a single page was measured at 1.3 GB.
    """
    return 3 * min(raw.largest_group, _PAGE_ROWS * raw.row_bytes) + 4 * _GROUP_BYTES + (300 << 20)


def validate_shard(raw: RawShard, dataset: str, rules: IngestRules) -> Counter[str]:
    """Write images/<shard>, rejected/<shard> and the smaller tier, if any. Every raw row is in one of the first two.

    The images are committed last, so that a finished shard has all of its files. Returns the number of rows "kept" and
    of rows rejected by reason.
    """
    store, counts = Store(dataset), Counter[str]()
    rejected: list[dict[str, Any]] = []
    seen: set[str] = set()
    provenance = {"raw": raw.path, "footer": raw.digest, "stamp": raw.stamp, "settings": rules.settings(raw)}
    provenance |= {"fingerprint": rules.fingerprint(raw)}
    # Tiers of an earlier ingest may hold other rows.
    for folder in store.folders(""):
        if re.fullmatch(r"images-\d+", folder):
            store.remove(f"{folder}/{raw.shard}.parquet")
    with (
        _row_groups(store, f"images/{raw.shard}.parquet", IMAGES, provenance) as append,
        _tier(store, raw, rules) if rules.downsize else nullcontext() as append_smaller,
    ):
        rows = _rows(raw.path, raw.first_row, raw.first_row + raw.rows, rules)
        for index, row in enumerate(rows, raw.first_row):
            outcome = _check(row, raw, index, seen, rules)
            if isinstance(outcome, Rejected):
                image = b"" if isinstance(row, Exception) else image_bytes(row)
                rejected.append(asdict(outcome) | {"sha256": _sha256(image)})
                counts[outcome.reason] += 1
                continue
            checked, picture = outcome
            seen.add(checked["id"])  # only now: an intact copy may follow a broken one
            counts["kept"] += 1
            append(checked)
            if append_smaller:
                append_smaller(checked, picture)
        refusals = pa.RecordBatch.from_pylist(rejected, REJECTED)
        store.write_table(f"rejected/{raw.shard}.parquet", refusals, REJECTED, raw=raw.path)
    return counts


def downsize_shard(raw: RawShard, dataset: str, rules: IngestRules) -> Counter[str]:
    """Write the smaller tier of a shard from its finished images. Returns the number of rows "downsized"."""
    store, count = Store(dataset), 0
    with _tier(store, raw, rules) as append:
        for row in _rows(store.path(f"images/{raw.shard}.parquet")):
            assert not isinstance(row, Exception), row  # written by this module
            picture = decode(row["image"], rules.limits)
            assert isinstance(picture, Picture), (row["id"], picture)  # decoded before, within the same limits
            append(row, picture)
            count += 1
    return Counter(downsized=count)


@contextmanager
def _tier(store: Store, raw: RawShard, rules: IngestRules) -> Iterator[Callable[[Mapping[str, Any], Picture], None]]:
    """Yields a function that appends a row of IMAGES to the tier. Images that are small enough stay as delivered."""
    side, provenance = rules.downsize, {"fingerprint": rules.tier_fingerprint(raw)}
    assert side is not None
    with _row_groups(store, f"{tier_folder(side)}/{raw.shard}.parquet", TIER, provenance) as append:

        def append_smaller(row: Mapping[str, Any], picture: Picture) -> None:
            smaller = {name: row[name] for name in TIER.names}
            if min(picture.image.size) > side:
                encoded = downsize(picture, side, rules.downsize_format)
                smaller |= {"image": encoded.data, "format": encoded.format}
                smaller |= {"width": encoded.width, "height": encoded.height}
            append(smaller)

        yield append_smaller


def _rows(path: str, first: int = 0, last: int | None = None, rules: IngestRules | None = None) -> Iterator[Row]:
    """Rows `first` to `last` of a parquet file, a few at a time: the fields of a raw file under the rules, or, without
    rules, the columns of TIER."""
    with Store(path).open() as file:
        parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        columns = list(rules.columns(parquet.schema_arrow.names)) if rules else TIER.names
        last = parquet.metadata.num_rows if last is None else last
        end = 0
        for group in range(parquet.metadata.num_row_groups):
            found = parquet.metadata.row_group(group)
            start, end = end, end + found.num_rows
            if end <= first or start >= last:
                continue
            at_once = min(_MOST_ROWS, max(1, _READ_BYTES * found.num_rows // max(1, found.total_byte_size)))
            for batch in parquet.iter_batches(at_once, row_groups=[group], columns=columns, use_threads=False):
                wanted = batch.slice(min(batch.num_rows, max(0, first - start)), max(0, last - max(first, start)))
                start += batch.num_rows
                yield from _as_rows(rules.named(wanted) if rules else wanted)


def _as_rows(batch: pa.RecordBatch) -> list[Row]:
    try:
        rows: list[Row] = batch.to_pylist()
        return rows
    except Exception as error:  # of many types, from invalid UTF-8 to times out of range
        if batch.num_rows == 1:
            return [error]
        return [row for number in range(batch.num_rows) for row in _as_rows(batch.slice(number, 1))]


def _check(
    row: Row, raw: RawShard, index: int, seen: Collection[str], rules: IngestRules
) -> tuple[dict[str, Any], Picture] | Rejected:
    """The row of IMAGES with its decoded picture, or the reason for rejecting it."""
    where = f"{raw.path}#{index}"
    if isinstance(row, Exception):
        return Rejected(where, "unreadable row", f"{type(row).__name__}: {row}")
    try:
        post: Post | Rejected = SITES[raw.source].read_row(row, rules.admit)
    except ValueError as error:
        return Rejected(where, "no id", str(error))
    except Exception as error:  # a field of an unexpected type: one row must not cost its shard
        return Rejected(where, "unreadable row", f"{type(error).__name__}: {error}")
    if isinstance(post, Rejected):
        return post
    if post.id in seen:
        return Rejected(post.id, "duplicate id", f"row {index} of {raw.path}")
    picture = decode(post.image, rules.limits)
    if isinstance(picture, Refused):
        return Rejected(post.id, picture.reason.value, picture.detail)
    return _image_row(post, picture), picture


def _image_row(post: Post, picture: Picture) -> dict[str, Any]:
    row = asdict(post)
    tags = row.pop("tags")
    return row | {
        "format": picture.header.format,
        "width": picture.header.width,
        "height": picture.header.height,
        "notes": "; ".join(picture.header.notes) or None,
        "sha256": _sha256(post.image),
        "phash": perceptual_hash(picture.image),
        **{f"tags_{category}": tags[category] for category in TAG_CATEGORIES},
    }


@contextmanager
def _row_groups(
    store: Store, name: str, schema: pa.Schema, metadata: Mapping[str, str]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that appends a row to a parquet file whose row groups hold at most _GROUP_BYTES of images, or
    one larger image."""
    group: list[dict[str, Any]] = []
    size = 0
    with store.writing_table(name, schema, **metadata) as write:

        def flush() -> None:
            if group:
                write(pa.RecordBatch.from_pylist(group, schema))
                group.clear()

        def append(row: dict[str, Any]) -> None:
            nonlocal size
            if size + len(row["image"]) > _GROUP_BYTES:
                flush()
                size = 0
            group.append(row)
            size += len(row["image"])

        yield append
        flush()


def _sha256(image: bytes) -> str | None:
    return hashlib.sha256(image).hexdigest() if image else None
