"""What a file of a selection was made from, so that a rerun makes again only what would come out differently."""

import hashlib
import json
import os
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import pyarrow.parquet as pq

from pipeline.core.errors import UsageError
from pipeline.storage.shards import Store

# Raise it when the code makes other files out of the same: all selections are then made again.
CODE_VERSION: Final = "1"

_NAMED_SHARDS = 3

MadeFrom = dict[str, str]  # ingredient -> its digest, or what it is where that is short


@dataclass(frozen=True)
class Footer:
    """A parquet file's identity: any rewrite with other rows, or from another raw file, has another footer."""

    digest: str
    rows: int
    sources: frozenset[str]  # the sites whose rows it has, where it has a column of that name

    @classmethod
    def of(cls, store: Store, name: str) -> "Footer":
        with store.open(name) as file:
            footer = pq.read_metadata(file)
            return cls(footer_digest(file), footer.num_rows, frozenset(_sources(footer)))


def footer_digest(file: BinaryIO) -> str:
    """Of an open parquet file's footer."""
    file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(-8 - length, os.SEEK_END)
    return digest(file.read(length))


def _sources(footer: pq.FileMetaData) -> Iterable[str]:
    """From the statistics: the lowest and the highest name of each row group."""
    names = footer.schema.to_arrow_schema().names
    if "source" in names and footer.num_row_groups:
        column = next(i for i in range(footer.num_columns) if footer.schema.column(i).path == "source")
        for group in range(footer.num_row_groups):
            statistics = footer.row_group(group).column(column).statistics
            if statistics is not None and statistics.has_min_max:
                yield from (statistics.min, statistics.max)


def image_footers(dataset: Store) -> dict[str, Footer]:
    """Of all image shards; UsageError where there are none."""
    images = footers(dataset, "images", dataset.shards("images"))
    if not images:
        mend = f"python pipeline/ingest.py --raw PATH --dataset {shlex.quote(dataset.root)}"
        raise UsageError(f"{dataset.root} has no images; run: {mend}")
    return images


def footers(store: Store, folder: str, shards: Iterable[str]) -> dict[str, Footer]:
    """Of these shards of a folder; those that are not there are left out. OSError where one cannot be read."""
    there = sorted(set(shards) & set(store.shards(folder)))
    with ThreadPoolExecutor(8) as readers:
        return dict(
            zip(there, readers.map(lambda shard: Footer.of(store, f"{folder}/{shard}.parquet"), there), strict=True)
        )


def made_from(store: Store, folder: str, shards: Iterable[str]) -> dict[str, MadeFrom]:
    """What the finished shards of a folder were made from."""
    there = sorted(set(shards) & set(store.shards(folder)))
    with ThreadPoolExecutor(8) as readers:
        found = readers.map(lambda shard: store.metadata(f"{folder}/{shard}.parquet").get("made_from", "{}"), there)
        return dict(zip(there, map(json.loads, found), strict=True))


def changes(before: Mapping[str, MadeFrom], now: Mapping[str, MadeFrom]) -> dict[str, str]:
    """By shard that must be made (again): why."""
    why: dict[str, str] = {}
    for shard, ingredients in now.items():
        if shard not in before:
            why[shard] = "new"
        elif other := sorted(
            name
            for name in ingredients.keys() | before[shard].keys()
            if before[shard].get(name) != ingredients.get(name)
        ):
            why[shard] = "changed: " + ", ".join(other)
    return why


def described(doing: str, why: Mapping[str, str], total: int) -> str:
    """ "judging 2 of 40 shards: 2 new (a, b)"."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for shard, reason in sorted(why.items()):
        by_reason[reason].append(shard)
    listed = [
        f"{len(names)} {reason} ({', '.join(names[:_NAMED_SHARDS])}{' ...' if len(names) > _NAMED_SHARDS else ''})"
        for reason, names in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]
    return f"{doing} {len(why)} of {total} shards" + (f": {'; '.join(listed)}" if listed else "")


def digest(content: Any) -> str:
    """Of bytes, of text, or of anything that JSON can write."""
    if isinstance(content, str):
        content = content.encode()
    if not isinstance(content, bytes):
        content = json.dumps(content, sort_keys=True, default=sorted).encode()
    return hashlib.sha256(content).hexdigest()
