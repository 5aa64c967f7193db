"""The raw files of an ingest: which files they are, what their footers say, and the names of their shards."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple

import pyarrow as pa

from pipeline.core.errors import S3Refused, S3Unavailable, UsageError
from pipeline.ingestion.raw_profiles import RawProfiles, folder_of, partitions
from pipeline.ingestion.rules import IngestRules, RawShard
from pipeline.sources import describe, recognise
from pipeline.sources.reading import Reading
from pipeline.storage.manifest import Footer, Manifest
from pipeline.storage.shards import FileInfo, Store, is_shard, list_files

_MANIFEST: Final = "raw-files.json.gz"  # in the dataset
_NAMED_PARTS: Final = 4  # of a path: they tell datasets/danbooru2023/default/train/0000.parquet from danbooru2025's
_DIGEST_DIGITS: Final = 8
# What this program writes below the root of a dataset.
_OUTPUT: Final = re.compile(r"(images(-\d+)?|rejected|captions|scores|selections|posts)/|raw-ids\.parquet")


class RawFiles:
    """The parquet files at some paths, without output of this program; `manifest` caches their footers in the dataset.

    Raises UsageError for a path without any.
    """

    def __init__(self, paths: list[str], dataset: Store) -> None:
        self.empty: list[str] = []  # files of no known layout that have no rows
        self.skipped: dict[str, int] = {}  # folders of datasets, and the parquet files in each
        listed: dict[str, FileInfo] = {}
        for path in paths:
            found = self._without_datasets(list_files(path))
            if not found:
                why = f"; it holds a dataset, {next(iter(self.skipped))}" if self.skipped else ""
                raise UsageError(f"no parquet file at {path}{why}; give a .parquet file or a folder that holds some")
            listed |= found
        self.profiles = RawProfiles(dataset)
        self.manifest = Manifest(dataset, _MANIFEST, path_of=lambda path: path, prune=False)
        self.manifest.update(listed)
        self.footers, self.unreadable = self.manifest.footers(sorted(listed))
        self.own = [path for path, footer in self.footers.items() if "hdm.format" in footer.metadata]
        for path in self.own:
            del self.footers[path]
        self.stamps = {path: listed[path].stamp for path in self.footers}
        if self.own and not (self.footers or self.unreadable):
            raise UsageError(f"{self.own[0]} was written by this program, like all files at --raw; give raw files")

    def _without_datasets(self, found: Mapping[str, FileInfo]) -> dict[str, FileInfo]:
        """The parquet files among these, without those of datasets."""
        roots = [path.removesuffix("dataset.json") for path in found if path.endswith("/dataset.json")]
        parquet = {path: info for path, info in found.items() if is_shard(_file_name(path))}
        for root in filter(_is_dataset, roots):
            own = [path for path in parquet if path.startswith(root) and _OUTPUT.match(path, len(root))]
            self.skipped[root.rstrip("/")] = len(own)
            for path in own:
                del parquet[path]
        return parquet

    def save(self) -> None:
        """Writes the caches of footers and readings."""
        self.manifest.save()
        self.profiles.save()

    def lines(self) -> Iterator[str]:
        """What was skipped, for the terminal."""
        for folder, count in sorted(self.skipped.items()):
            yield f"skipped {folder}: a dataset of this program, not raw files ({count} parquet files)"
        if self.empty:
            yield f"skipped {len(self.empty)} files without rows, for example {self.empty[0]}"
        if self.own:
            yield f"skipped {len(self.own)} files written by this program, for example {self.own[0]}"

    def shards(self, source: str, rules: IngestRules) -> Iterator[RawShard]:
        """Each raw file as one shard without a name. Raises UsageError if a file has an unknown layout, or columns that
        would be misread."""
        layouts: dict[str, str] = {}  # by path of the first file that has it

        def recognised(path: str, fields: Sequence[str]) -> str:
            found = recognise(fields, source, unread=self.footers[path].schema.names)
            layouts[path] = describe(_named(self.footers[path].schema, rules), found)
            return found

        for path, about in self.read_as(recognised, rules).items():
            footer = self.footers[path]
            yield RawShard(
                path=path,
                source=about.source,
                reading=about.reading,
                shard="",
                first_row=0,
                rows=footer.rows,
                row_bytes=footer.row_bytes,
                largest_group=footer.largest_group,
                layout=layouts[about.like],
                digest=footer.digest,
                stamp=self.stamps[path],
                renamed=tuple(pair for pair in rules.renamed if pair[0] in footer.schema.names),
            )

    def read_as(self, recognised: Callable[[str, Sequence[str]], str], rules: IngestRules) -> dict[str, "ReadAs"]:
        """How each file is read, by path.

        `recognised` gives the source of a file from its path and fields; its ValueErrors become UsageErrors.
        """
        alike: dict[tuple[pa.Schema, str, str, tuple[str, ...]], list[str]] = defaultdict(list)
        for path, footer in self.footers.items():
            given = tuple(partitions(path, rules))
            alike[footer.schema, footer.features, folder_of(path), given].append(path)
        found: dict[str, ReadAs] = {}
        for (schema, features, _, given), paths in alike.items():
            try:
                source = recognised(paths[0], [*_named(schema, rules).names, *given])
            except ValueError as error:
                if not any(self.footers[path].rows for path in paths):  # without rows, writers do not know the types
                    self.empty += paths
                    continue
                raise UsageError(f"{paths[0]} is {error}") from error
            reading = self.profiles.of(
                {path: self.footers[path].digest for path in paths}, schema, features, source, rules
            )
            for path in paths:
                constants = tuple(sorted(partitions(path, rules).items()))
                found[path] = ReadAs(source, replace(reading, constants=constants), paths[0])
        for path in self.empty:
            self.footers.pop(path, None)
        return {path: found[path] for path in self.footers}


class ReadAs(NamedTuple):
    """How a raw file is read."""

    source: str
    reading: Reading
    like: str  # path of the first file of the same layout


def _is_dataset(folder: str) -> bool:
    try:
        return "schema_version" in json.loads(Store(folder).read("dataset.json"))
    except (OSError, ValueError, TypeError):
        return False


def _named(schema: pa.Schema, rules: IngestRules) -> pa.Schema:
    """The columns that are read, under the names of their fields."""
    columns = rules.columns(schema.names)
    return pa.schema([schema.field(column).with_name(name) for column, name in columns.items()])


def name_shards(
    files: Iterable[RawShard], images: Mapping[str, Footer], rows_per_shard: int | None
) -> tuple[dict[str, RawShard], int]:
    """The shards of all raw files by name, and the number of raw files that were moved since they were ingested.

    A raw file that was ingested before keeps its shards' names. It is found by its path or, if its folder was moved, by
    its footer and file name. A new name is <source>-<folder>-<file>-<digest>, or <source>-<file>-<digest> if the folder
    has the source's name. The digest is that of the last three folders and the file name, so that another disk, machine
    or bucket gives the same names; of two files that agree in these, the second gets the digest of its whole path. With
    `rows_per_shard`, -00000, -00001 ... follow.

    Raises UsageError if the dataset has rows of a raw file split differently, or if a new file may be a changed copy of
    one that was ingested and is gone.
    """
    files = list(files)
    known = _KnownFiles({raw.path for raw in files}, images)
    shards: dict[str, RawShard] = {}
    for raw in files:
        existing = known.shards_of(raw)
        if existing:
            whole = existing[0] if rows_per_shard is None else _base(existing[0])
            name = _name_of(existing[0], images[existing[0]], raw.source) or whole
        else:
            name = known.new_name(raw)
        parts = {part.shard: part for part in _split(replace(raw, shard=name), rows_per_shard)}
        if others := sorted(set(existing) - parts.keys()):
            raise UsageError(
                f"the dataset has shard {others[0]}, which may hold the same rows of {raw.path} split differently. "
                "Give the --rows-per-shard it was made with (or none), or remove the shard from images/ and rejected/."
            )
        shards |= parts
    return shards, known.moved


class _KnownFiles:
    """The raw files from which the shards of a dataset were made."""

    def __init__(self, paths: set[str], images: Mapping[str, Footer]) -> None:
        self.moved = 0
        self._by_path: dict[str, list[str]] = defaultdict(list)  # shards
        for shard, footer in images.items():
            self._by_path[footer.metadata.get("raw", "")].append(shard)
        # Of files at other paths than those to ingest:
        others = {path: images[shards[0]] for path, shards in self._by_path.items() if path and path not in paths}
        self._by_content = {
            (footer.metadata.get("footer", ""), _file_name(path)): path for path, footer in others.items()
        }
        self._by_tail = {_tail(path): path for path in others}
        self._names = {_base(shard) for shard in images} | set(images)

    def shards_of(self, raw: RawShard) -> list[str]:
        """The shards that were made from this file."""
        if found := self._by_path.get(raw.path, []):
            return found
        if before := self._by_content.pop((raw.digest, _file_name(raw.path)), ""):
            self.moved += 1
            self._by_tail.pop(_tail(before), None)
            return self._by_path[before]
        return []

    def new_name(self, raw: RawShard) -> str:
        """A name that no other shard has."""
        names = [shard_name(raw.path, raw.source), shard_name(raw.path, raw.source, whole_path=True)]
        if (before := self._by_tail.get(_tail(raw.path))) and not _exists(before):
            raise UsageError(
                f"{raw.path} may be a changed copy of {before}, which is gone and from which the dataset has shard "
                f"{self._by_path[before][0]}. If it is, remove that shard from images/ and rejected/; if not, rename "
                "the new file or its folder."
            )
        for name in names:
            if name not in self._names:
                self._names.add(name)
                return name
        raise UsageError(f"{raw.path} would become shard {names[-1]}, which already exists. Rename the new file.")


def _name_of(shard: str, footer: Footer, source: str) -> str:
    """The name that all shards of the same raw file share; "" if it has been named otherwise."""
    path = footer.metadata["raw"]
    for naming in (shard_name, partial(shard_name, whole_path=True), _name_without_digest):
        if (name := naming(path, source)) in (shard, _base(shard)):
            return name
    return ""


def _base(shard: str) -> str:
    """The name of a shard without the number of its part."""
    return re.sub(r"-\d{5}$", "", shard)


def shard_name(path: str, source: str, whole_path: bool = False) -> str:
    """The name of the shard of a raw file: see `name_shards`."""
    hashed = path if whole_path else _tail(path)
    return f"{_name_without_digest(path, source)}-{hashlib.sha256(hashed.encode()).hexdigest()[:_DIGEST_DIGITS]}"


def _name_without_digest(path: str, source: str) -> str:
    """Also the whole name in datasets of earlier versions."""
    *_, folder, file = f"/{path}".split("/")
    folder = "" if folder in (source, "") else f"{folder}-"
    return f"{source}-{folder}{file.removesuffix('.parquet')}".replace(" ", "_")


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def _tail(path: str) -> str:
    return "/".join(path.split("/")[-_NAMED_PARTS:])


def _exists(path: str) -> bool:
    try:
        return Store(path).exists()
    except (OSError, S3Refused, S3Unavailable):
        return False


def _split(raw: RawShard, rows_per_shard: int | None) -> Iterator[RawShard]:
    """The raw file as shards of at most `rows_per_shard` rows, or as one shard if that is None."""
    if rows_per_shard is None:
        yield raw
        return
    for number, first in enumerate(range(0, max(1, raw.rows), rows_per_shard)):
        rows = min(rows_per_shard, raw.rows - first)
        yield replace(raw, shard=f"{raw.shard}-{number:05d}", first_row=first, rows=rows)
