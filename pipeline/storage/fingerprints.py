"""Provenance of derived files: the inputs of each, so that a rerun makes only the files whose inputs have changed."""

import hashlib
import json
import os
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, TypeVar

import pyarrow.parquet as pq

from pipeline.core.errors import UsageError
from pipeline.storage.shards import Store

T = TypeVar("T")

# Increment when the code makes other files from the same inputs: all selections are then made again.
CODE_VERSION: Final = "1"

_NAMED_SHARDS = 3

Provenance = dict[str, str]  # input -> its digest, or its value where that is short


@dataclass(frozen=True)
class FileIdentity:
    """Identifies the content of a parquet file: rewriting it with other rows or from another raw file changes the
    footer."""

    digest: str  # of the footer
    rows: int
    sources: frozenset[str]  # the sites in its column `source`, if it has one

    @classmethod
    def of(cls, store: Store, name: str) -> "FileIdentity":
        with store.open(name) as file:
            footer = pq.read_metadata(file)
            return cls(footer_digest(file), footer.num_rows, frozenset(_sources(footer)))


def footer_digest(file: BinaryIO) -> str:
    """Digest of an open parquet file's footer."""
    file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(-8 - length, os.SEEK_END)
    return digest(file.read(length))


def _sources(footer: pq.FileMetaData) -> Iterable[str]:
    """The lowest and the highest source of each row group, from the column statistics."""
    names = footer.schema.to_arrow_schema().names
    if "source" in names and footer.num_row_groups:
        column = next(i for i in range(footer.num_columns) if footer.schema.column(i).path == "source")
        for group in range(footer.num_row_groups):
            statistics = footer.row_group(group).column(column).statistics
            if statistics is not None and statistics.has_min_max:
                yield from (statistics.min, statistics.max)


def image_identities(dataset: Store) -> dict[str, FileIdentity]:
    """Identity of every image shard, by name. Raises UsageError if the dataset has no images."""
    images = identities(dataset, "images", dataset.shards("images"))
    if not images:
        command = f"python pipeline/ingest.py --raw PATH --dataset {shlex.quote(dataset.root)}"
        raise UsageError(f"{dataset.root} has no images; run: {command}")
    return images


def identities(store: Store, folder: str, shards: Iterable[str]) -> dict[str, FileIdentity]:
    """Identity of each of these shards that exists in the folder. Raises OSError if one cannot be read."""
    return _read_each(store, folder, shards, lambda name: FileIdentity.of(store, name))


def read_provenance(store: Store, folder: str, shards: Iterable[str]) -> dict[str, Provenance]:
    """Provenance of each of these shards that exists in the folder, {} for files without one."""
    return _read_each(store, folder, shards, lambda name: json.loads(store.metadata(name).get("made_from", "{}")))


def _read_each(store: Store, folder: str, shards: Iterable[str], read: Callable[[str], T]) -> dict[str, T]:
    existing = sorted(set(shards) & set(store.shards(folder)))
    with ThreadPoolExecutor(8) as readers:
        found = readers.map(lambda shard: read(f"{folder}/{shard}.parquet"), existing)
        return dict(zip(existing, found, strict=True))


def changes(before: Mapping[str, Provenance], now: Mapping[str, Provenance]) -> dict[str, str]:
    """The reason, by shard, for each shard that must be made (again)."""
    why: dict[str, str] = {}
    for shard, inputs in now.items():
        if shard not in before:
            why[shard] = "new"
        elif changed := sorted(
            name for name in inputs.keys() | before[shard].keys() if before[shard].get(name) != inputs.get(name)
        ):
            why[shard] = "changed: " + ", ".join(changed)
    return why


def describe_changes(doing: str, why: Mapping[str, str], total: int) -> str:
    """One line, for example "judging 2 of 40 shards: 2 new (a, b)"."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for shard, reason in sorted(why.items()):
        by_reason[reason].append(shard)
    listed = [
        f"{len(names)} {reason} ({', '.join(names[:_NAMED_SHARDS])}{' ...' if len(names) > _NAMED_SHARDS else ''})"
        for reason, names in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]
    return f"{doing} {len(why)} of {total} shards" + (f": {'; '.join(listed)}" if listed else "")


def digest(content: Any) -> str:
    """SHA-256 of bytes, of text, or of the JSON of anything else."""
    if isinstance(content, str):
        content = content.encode()
    if not isinstance(content, bytes):
        content = json.dumps(content, sort_keys=True, default=sorted).encode()
    return hashlib.sha256(content).hexdigest()
