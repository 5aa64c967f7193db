"""One raw shard -> one shard of checked images and one of refused rows. Runs in a Ray task; knows nothing of Ray."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.images import Limits, Picture, Refused, decode, perceptual_hash
from pipeline.jobs import UsageError, progress
from pipeline.records import IMAGES, REJECTED, TAG_CATEGORIES, Post, Rejected
from pipeline.shards import Store
from pipeline.sources import READERS, recognise
from pipeline.sources.fields import image_bytes

# Rows are read and written in groups of about this many bytes of pictures: a worker holds one group, whatever the size
# of the raw file's row groups, and a reader of the dataset fetches no more than it needs.
_GROUP_BYTES = 32 << 20
_READ_ROWS = 64


@dataclass(frozen=True)
class RawShard:
    """A raw file, the source whose layout it has, and the name of the shard that it becomes."""

    path: str
    source: str
    shard: str
    rows: int
    digest: str  # of its footer: tells it from another file that would become the same shard


@dataclass(frozen=True)
class Plan:
    shards: list[RawShard]
    unreadable: dict[str, str]  # files that are not whole parquet, each with what is wrong


def plan_shards(paths: list[str], source: str) -> Plan:
    """Read every footer before any work is done.

    UsageError for a file of an unknown layout, and for two files that would become the same shard.
    """
    shards: dict[str, RawShard] = {}
    unreadable: dict[str, str] = {}
    for path in progress(paths, len(paths), "reading footers", "files"):
        try:
            raw = _inspect(path, source)
        except (OSError, pa.ArrowInvalid) as error:
            unreadable[path] = str(error).splitlines()[0].strip()
            continue
        except ValueError as error:
            raise UsageError(f"{path} is {error}") from error
        if raw.shard in shards:
            raise UsageError(f"{path} and {shards[raw.shard].path} would both become shard {raw.shard}; rename one")
        shards[raw.shard] = raw
    return Plan(list(shards.values()), unreadable)


def _inspect(path: str, source: str) -> RawShard:
    with Store(path).open() as file:
        footer = pq.ParquetFile(file)
        source = recognise(footer.schema_arrow.names, source)
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        digest = hashlib.sha256(file.read(length)).hexdigest()
        return RawShard(path, source, shard_name(path, source), footer.metadata.num_rows, digest)


def finished_shards(plan: Plan, dataset: Store) -> set[str]:
    """Which of the plan's shards the dataset has. UsageError where one of them was made from another file."""
    finished = {raw.shard for raw in plan.shards} & set(dataset.shards("images"))
    for raw in plan.shards:
        made_from = dataset.metadata(f"images/{raw.shard}.parquet") if raw.shard in finished else {}
        if made_from and made_from["footer"] != raw.digest:
            raise UsageError(
                f"{raw.path} would become shard {raw.shard}, which is there already, made from {made_from['raw']}; "
                "rename the new file, or its folder"
            )
    return finished


def shard_name(path: str, source: str) -> str:
    """<source>-<folder>-<file>, from the path alone so that a rerun finds the same name; a folder that is named like
    the source is not named twice."""
    parts = PurePosixPath(path)
    folder = "" if parts.parent.name in (source, "") else f"{parts.parent.name}-"
    return f"{source}-{folder}{parts.stem}".replace(" ", "_")


def validate_shard(raw: RawShard, dataset: str, limits: Limits) -> None:
    """Write images/<shard> and rejected/<shard>: every row of the raw shard is in one of them. The images are committed
    last, so that a finished shard has both files."""
    rejected: list[dict[str, Any]] = []
    seen: set[str] = set()

    def checked() -> Iterator[dict[str, Any]]:
        for index, row in enumerate(_raw_rows(raw.path)):
            outcome = _check(row, raw, index, seen, limits)
            if isinstance(outcome, Rejected):
                rejected.append(asdict(outcome) | {"sha256": _digest(image_bytes(row))})
            else:
                yield outcome

    store = Store(dataset)
    with store.writing_table(f"images/{raw.shard}.parquet", IMAGES, raw=raw.path, footer=raw.digest) as write:
        for group in _groups(checked()):
            write(pa.RecordBatch.from_pylist(group, IMAGES))
        refusals = pa.RecordBatch.from_pylist(rejected, REJECTED)
        store.write_table(f"rejected/{raw.shard}.parquet", refusals, REJECTED, raw=raw.path)


def _raw_rows(path: str) -> Iterator[Mapping[str, Any]]:
    with Store(path).open() as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=_READ_ROWS):
            yield from batch.to_pylist()


def _check(
    row: Mapping[str, Any], raw: RawShard, index: int, seen: set[str], limits: Limits
) -> dict[str, Any] | Rejected:
    """The row of IMAGES, or why there is none."""
    try:
        post = READERS[raw.source](row)
    except ValueError as error:
        return Rejected(f"{raw.path}#{index}", "no id", str(error))
    except Exception as error:  # of a field that is not what its site delivers: one row must not cost its shard
        return Rejected(f"{raw.path}#{index}", "unreadable row", f"{type(error).__name__}: {error}")
    if isinstance(post, Rejected):
        return post
    if post.id in seen:
        return Rejected(post.id, "duplicate id", f"row {index} of {raw.path}")
    picture = decode(post.image, limits)
    if isinstance(picture, Refused):
        return Rejected(post.id, picture.reason.value, picture.detail)
    seen.add(post.id)  # not before: a sound copy may follow a broken one
    return _image_row(post, picture)


def _image_row(post: Post, picture: Picture) -> dict[str, Any]:
    row = asdict(post)
    tags = row.pop("tags")
    return row | {
        "format": picture.header.format,
        "width": picture.header.width,
        "height": picture.header.height,
        "sha256": _digest(post.image),
        "phash": perceptual_hash(picture.image),
        **{f"tags_{category}": tags[category] for category in TAG_CATEGORIES},
    }


def _digest(image: bytes) -> str | None:
    return hashlib.sha256(image).hexdigest() if image else None


def _groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(row["image"])
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
