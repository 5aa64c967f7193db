"""One raw shard -> one shard of checked images, one of refused rows, and one of smaller images where asked for.

Runs in a Ray task; knows nothing of Ray. A worker holds a page of the raw file and some tens of megabytes of pictures,
whatever the size of the file and of its row groups.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.records import IMAGES, REJECTED, TAG_CATEGORIES, TIER, Post, Rejected
from pipeline.pictures.decoder import Limits, Picture, Refused, decode, downsize, perceptual_hash
from pipeline.sources import ADMISSIBLE, FIELDS, read_row
from pipeline.sources.fields import image_bytes
from pipeline.storage.fingerprints import digest
from pipeline.storage.shards import Store

# Raised where the same raw file and settings give other rows than before: then all shards are made anew.
CODE_VERSION = 1

# Row groups have at most so many bytes of pictures: what a reader of the dataset must fetch for one row.
_GROUP_BYTES = 48 << 20
_READ_BYTES = 16 << 20
_MOST_ROWS = 256
# Of each column, and of each GET on S3. Without it pyarrow fetches whole column chunks, which may have gigabytes.
_BUFFER_BYTES = 4 << 20
# But a page is always read whole. Most writers look at its size only after this many values.
_PAGE_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class IngestRules:
    """What decides which rows a raw shard becomes, besides its own bytes."""

    admit: tuple[str, ...] = ()  # of sources.ADMISSIBLE: reasons that refuse nothing
    renamed: tuple[tuple[str, str], ...] = ()  # a raw column and the field of its source that it holds
    limits: Limits = field(default_factory=Limits)
    downsize: int | None = None  # pixels along the short side of the smaller tier; None for no such tier
    downsize_format: Literal["JPEG", "WEBP"] = "JPEG"

    def columns(self, found: Collection[str]) -> dict[str, str]:
        """The raw columns to read, each with the field that it is; a column that another one stands for is left out.

        ValueError where two columns are one field.
        """
        if len(set(found)) < len(found):
            raise ValueError(f"ambiguous: a column comes twice in {sorted(found)}")
        named = {column: name for column, name in self.renamed if column in found}
        if len(set(named.values())) < len(named):
            raise ValueError(f"ambiguous: --map makes one field of several of its columns, {sorted(named)}")
        taken = set(named.values())
        return {column: named.get(column, column) for column in found if column in named or column in FIELDS - taken}

    def named(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch with its columns called as the fields that they are."""
        names = dict(self.renamed)
        return batch.rename_columns([names.get(column, column) for column in batch.schema.names])

    def fingerprint(self, raw: "RawShard") -> str:
        """Of all that decides what images/<shard> holds."""
        return digest([CODE_VERSION, raw.source, raw.digest, raw.first_row, raw.rows, self.settings(raw)])

    def settings(self, raw: "RawShard") -> str:
        """The rules that can touch this file, as JSON, by the flags that set them."""
        admitted = sorted(set(self.admit) & set(ADMISSIBLE[raw.source]))
        return json.dumps({"--admit": admitted, "--map": raw.renamed, "limits": asdict(self.limits)})

    def tier_fingerprint(self, raw: "RawShard") -> str:
        return digest([self.fingerprint(raw), self.downsize, self.downsize_format])


@dataclass(frozen=True, kw_only=True)
class RawShard:
    """Rows of a raw file, the source whose layout it has, and the name of the shard that they become."""

    path: str
    source: str
    shard: str
    first_row: int
    rows: int
    row_bytes: int  # of a row, on average, uncompressed
    largest_group: int  # bytes of the file's largest row group, uncompressed
    layout: str  # the variant of the source's layout, in words
    digest: str  # of the file's footer: tells it from another file that would become the same shard
    stamp: str  # size and time, or what S3 calls its ETag: tells that the file at this path was written again
    renamed: tuple[tuple[str, str], ...]  # those of IngestRules.renamed that the file has

    @property
    def memory(self) -> int:
        """Bytes that its worker may need: a page as it is read, unpacked and in rows, the rows to be written twice, and
        the process itself. A raw file of 600 MB in one page was seen to take 1.3 GB."""
        return 3 * min(self.largest_group, _PAGE_ROWS * self.row_bytes) + 4 * _GROUP_BYTES + (300 << 20)


def tier_folder(side: int) -> str:
    """Where the smaller tier of a dataset lies."""
    return f"images-{side}"


@dataclass(frozen=True)
class Checked:
    row: dict[str, Any]  # of IMAGES
    picture: Picture


def validate_shard(raw: RawShard, dataset: str, rules: IngestRules) -> Counter[str]:
    """Write images/<shard> and rejected/<shard>: every row of the raw shard is in one of them; and the smaller tier
    where the rules ask for it. The images are committed last, so that a finished shard has all of its files.

    How many rows were "kept", and refused for which reason.
    """
    store, rejected, became = Store(dataset), list[dict[str, Any]](), Counter[str]()
    made = {"raw": raw.path, "footer": raw.digest, "stamp": raw.stamp, "settings": rules.settings(raw)}
    made |= {"fingerprint": rules.fingerprint(raw)}
    # Of the images that were there before, and so perhaps of other rows.
    for folder in store.folders(""):
        if re.fullmatch(r"images-\d+", folder):
            store.remove(f"{folder}/{raw.shard}.parquet")
    with ExitStack() as files:
        append = files.enter_context(_row_groups(store, f"images/{raw.shard}.parquet", IMAGES, made))
        append_smaller = _tier(files, store, raw, rules) if rules.downsize else None
        for row, outcome in _check_all(raw, rules):
            if isinstance(outcome, Rejected):
                rejected.append(asdict(outcome) | {"sha256": _sha256(image_bytes(row))})
                became[outcome.reason] += 1
                continue
            became["kept"] += 1
            append(outcome.row)
            if append_smaller:
                append_smaller(_smaller(outcome.row, outcome.picture, rules))
        refusals = pa.RecordBatch.from_pylist(rejected, REJECTED)
        store.write_table(f"rejected/{raw.shard}.parquet", refusals, REJECTED, raw=raw.path)
    return became


def downsize_shard(raw: RawShard, dataset: str, rules: IngestRules) -> Counter[str]:
    """Write the smaller tier of a shard whose images are finished, from those. How many were "downsized"."""
    store, count = Store(dataset), 0
    with ExitStack() as files:
        append = _tier(files, store, raw, rules)
        for row in _rows(store.path(f"images/{raw.shard}.parquet"), columns=["id", "image", "format"]):
            assert not isinstance(row, Exception), row  # we wrote it
            picture = decode(row["image"], rules.limits)
            assert isinstance(picture, Picture), (row["id"], picture)  # it was decoded before, within the same limits
            append(_smaller(row, picture, rules))
            count += 1
    return Counter(downsized=count)


def _tier(files: ExitStack, store: Store, raw: RawShard, rules: IngestRules) -> Callable[[dict[str, Any]], None]:
    assert rules.downsize is not None
    name, made = f"{tier_folder(rules.downsize)}/{raw.shard}.parquet", {"fingerprint": rules.tier_fingerprint(raw)}
    return files.enter_context(_row_groups(store, name, TIER, made))


def _smaller(row: Mapping[str, Any], picture: Picture, rules: IngestRules) -> dict[str, Any]:
    """The row of TIER; a picture that is small already is kept as delivered."""
    assert rules.downsize is not None
    width, height = picture.image.size
    if min(width, height) <= rules.downsize:
        return {"id": row["id"], "image": row["image"], "format": row["format"], "width": width, "height": height}
    small = downsize(picture, rules.downsize, rules.downsize_format)
    return {
        "id": row["id"],
        "image": small.data,
        "format": small.format,
        "width": small.width,
        "height": small.height,
    }


def _check_all(raw: RawShard, rules: IngestRules) -> Iterator[tuple[Mapping[str, Any], Checked | Rejected]]:
    """Every raw row, an empty one where it cannot be read, and what became of it."""
    seen: set[str] = set()
    last_row = raw.first_row + raw.rows
    for index, row in enumerate(_rows(raw.path, raw.first_row, last_row, rules), raw.first_row):
        if isinstance(row, Exception):
            yield {}, Rejected(f"{raw.path}#{index}", "unreadable row", f"{type(row).__name__}: {row}")
            continue
        outcome = _check(row, raw, index, seen, rules)
        if isinstance(outcome, Checked):
            seen.add(outcome.row["id"])  # not before: a sound copy may follow a broken one
        yield row, outcome


def _rows(
    path: str,
    first: int = 0,
    last: int | None = None,
    rules: IngestRules | None = None,
    columns: list[str] | None = None,
) -> Iterator[dict[str, Any] | Exception]:
    """Rows `first` to `last` of a parquet file, a few at a time; of a raw file with columns as the rules have them.

    A row with a value that Python has none for, such as a date after the year 9999, is the error.
    """
    with Store(path).open() as file:
        parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        columns = list(rules.columns(parquet.schema_arrow.names)) if rules else columns
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


def _as_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | Exception]:
    try:
        rows: list[dict[str, Any] | Exception] = batch.to_pylist()
        return rows
    except Exception as error:  # of many kinds, from invalid UTF-8 to times out of range
        if batch.num_rows == 1:
            return [error]
        return [row for number in range(batch.num_rows) for row in _as_rows(batch.slice(number, 1))]


def _check(
    row: Mapping[str, Any], raw: RawShard, index: int, seen: Collection[str], rules: IngestRules
) -> Checked | Rejected:
    """The row of IMAGES with its picture, or why there is none."""
    try:
        post = read_row(row, raw.source, rules.admit)
    except ValueError as error:
        return Rejected(f"{raw.path}#{index}", "no id", str(error))
    except Exception as error:  # of a field that is not what its site delivers: one row must not cost its shard
        return Rejected(f"{raw.path}#{index}", "unreadable row", f"{type(error).__name__}: {error}")
    if isinstance(post, Rejected):
        return post
    if post.id in seen:
        return Rejected(post.id, "duplicate id", f"row {index} of {raw.path}")
    picture = decode(post.image, rules.limits)
    if isinstance(picture, Refused):
        return Rejected(post.id, picture.reason.value, picture.detail)
    return Checked(_image_row(post, picture), picture)


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
    """A function that appends one row of a parquet file, whose row groups hold at most _GROUP_BYTES of pictures (one
    picture where that has more)."""
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
