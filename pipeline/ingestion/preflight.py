"""The plan of an ingest, made before any work from the footers and ids of all raw files and from what is finished.

Does not import Ray. Threads read footers and ids, because on S3 every read is a round trip.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.core.errors import UsageError
from pipeline.core.progress import progress_bar
from pipeline.ingestion.rules import IngestRules, RawShard, tier_folder
from pipeline.sources import SITES, describe, recognise
from pipeline.storage.fingerprints import footer_digest
from pipeline.storage.shards import Store, find_parquet

_THREADS = 8


@dataclass(frozen=True)
class IngestPlan:
    """What an ingest will do. Shards in neither `todo` nor `tiers` are finished."""

    shards: dict[str, RawShard]  # by name
    unreadable: dict[str, str]  # raw files that are not complete parquet files, and what is wrong with each
    todo: dict[str, str]  # shards to ingest (with their smaller tier, if any), and why
    tiers: dict[str, str]  # shards whose images are finished but whose smaller tier is not, and why
    repeated: int  # rows that have the id of an earlier row
    example: str  # one such id and its files, or ""

    def lines(self, dataset: Store) -> Iterator[str]:
        """The plan for the terminal."""
        parts = self.shards.values()
        yield f"{len(parts)} raw shards, {sum(raw.rows for raw in parts):,} rows, {_size(sum(map(_bytes, parts)))}"
        for layout, count in sorted(Counter(raw.layout for raw in parts).items()):
            yield f"  {count} x {layout}"
        if parts:
            largest = max(parts, key=lambda raw: raw.largest_group)
            yield f"  largest row group: {_size(largest.largest_group)}, in {largest.path}"
        if self.repeated:
            yield f"  {self.repeated:,} rows repeat an id, for example {self.example}; one row per id is kept"
        for path, why in sorted(self.unreadable.items()):
            yield f"  unreadable, skipped: {path} ({why})"
        tiers = f", {len(self.tiers)} smaller tiers to do" if self.tiers else ""
        finished = len(parts) - len(self.todo)
        yield f"  {finished} of them finished before, {len(self.todo)} to do{tiers}{self._disk_space(dataset)}"
        for why, count in sorted(Counter([*self.todo.values(), *self.tiers.values()]).items()):
            yield f"    {count} x {why}"

    def _disk_space(self, dataset: Store) -> str:
        if dataset.is_remote or not self.todo:
            return ""
        folder = next(path for path in (Path(dataset.root), *Path(dataset.root).parents) if path.exists())
        needed = sum(_bytes(self.shards[name]) for name in self.todo)
        return f", about {_size(needed)} to write, {_size(shutil.disk_usage(folder).free)} free"


def find_raw(paths: list[str]) -> list[str]:
    """Every raw parquet file at these paths. Raises UsageError for a path without any."""
    found = {path: find_parquet(path) for path in paths}
    for path, files in found.items():
        if not files:
            raise UsageError(f"no parquet file at {path}; give a .parquet file or a folder that holds some")
    return sorted({file for files in found.values() for file in files})


def plan_shards(
    paths: list[str], source: str, rows_per_shard: int | None, dataset: Store, rules: IngestRules
) -> IngestPlan:
    """Read the footer and the ids of every raw file and compare them with the dataset.

    Raises UsageError if a file has an unknown layout, if two files would become the same shard, or if the dataset has a
    shard from another file or with other row ranges.
    """
    files, unreadable = _inspect_all(paths, source, rules)
    shards: dict[str, RawShard] = {}
    for raw in (part for whole in files for part in _split(whole, rows_per_shard)):
        if raw.shard in shards:
            raise UsageError(
                f"{raw.path} and {shards[raw.shard].path} would both become shard {raw.shard}. Rename one of them."
            )
        shards[raw.shard] = raw
    _check_row_ranges(files, shards, dataset)
    todo, tiers = _unfinished(shards, dataset, rules)
    # A new file may repeat the ids of an old one, so all are read; without new files nothing can have changed.
    repeated, example = _repeated_ids(files, rules) if todo else (0, "")
    return IngestPlan(shards, unreadable, todo, tiers, repeated, example)


def _inspect_all(paths: list[str], source: str, rules: IngestRules) -> tuple[list[RawShard], dict[str, str]]:
    """Raw files, each as one shard, and those that are not complete parquet files with the error of each."""

    def inspect(path: str) -> RawShard | str:
        try:
            return _inspect(path, source, rules)
        except (OSError, pa.ArrowInvalid) as error:
            return str(error).splitlines()[0].strip()
        except ValueError as error:
            raise UsageError(f"{path} is {error}") from error

    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(progress_bar(threads.map(inspect, paths), len(paths), "reading footers", "files"))
    for pair in rules.renamed:
        if not any(isinstance(raw, RawShard) and pair in raw.renamed for raw in found):
            raise UsageError(f"--map {'='.join(pair)}: no file has a column {pair[0]!r}. Correct or remove it.")
    unreadable = {path: why for path, why in zip(paths, found, strict=True) if isinstance(why, str)}
    return [raw for raw in found if isinstance(raw, RawShard)], unreadable


def _inspect(path: str, source: str, rules: IngestRules) -> RawShard:
    with Store(path).open() as file:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
        columns = rules.columns(schema.names)
        named = pa.schema([schema.field(column).with_name(field) for column, field in columns.items()])
        source = recognise(named.names, source, unread=schema.names)
        groups = [parquet.metadata.row_group(group) for group in range(parquet.metadata.num_row_groups)]
        return RawShard(
            path=path,
            source=source,
            shard=shard_name(path, source),
            first_row=0,
            rows=parquet.metadata.num_rows,
            row_bytes=sum(group.total_byte_size for group in groups) // max(1, parquet.metadata.num_rows),
            largest_group=max((group.total_byte_size for group in groups), default=0),
            layout=describe(named, source),
            digest=footer_digest(file),
            stamp=Store(path).stamp(),
            renamed=tuple((column, field) for column, field in rules.renamed if column in schema.names),
        )


def shard_name(path: str, source: str) -> str:
    """<source>-<folder>-<file>, or <source>-<file> if the folder has the source's name. Depends only on the path, so
    that a rerun finds the same name."""
    parts = PurePosixPath(path)
    folder = "" if parts.parent.name in (source, "") else f"{parts.parent.name}-"
    return f"{source}-{folder}{parts.stem}".replace(" ", "_")


def _split(raw: RawShard, rows_per_shard: int | None) -> Iterator[RawShard]:
    """The raw file as shards of at most `rows_per_shard` rows, or as one shard if that is None."""
    if rows_per_shard is None:
        yield raw
        return
    for number, first in enumerate(range(0, max(1, raw.rows), rows_per_shard)):
        rows = min(rows_per_shard, raw.rows - first)
        yield replace(raw, shard=f"{raw.shard}-{number:05d}", first_row=first, rows=rows)


def _check_row_ranges(files: list[RawShard], shards: Mapping[str, RawShard], dataset: Store) -> None:
    """Raises UsageError if the dataset has rows of a raw file under other shard names: they would be there twice."""
    names = {raw.shard for raw in files}
    for name in dataset.shards("images"):
        if name not in shards and (name in names or re.sub(r"-\d{5}$", "", name) in names):
            raise UsageError(
                f"{dataset.root} has shard {name}, which may hold the same rows split differently. Give the "
                "--rows-per-shard it was made with (or none), rename the raw file, or remove the shard from images/ "
                "and rejected/."
            )


def _unfinished(
    shards: Mapping[str, RawShard], dataset: Store, rules: IngestRules
) -> tuple[dict[str, str], dict[str, str]]:
    """Shards to ingest, and shards that need only their smaller tier, each with the reason."""
    todo = dict.fromkeys(shards.keys() - set(dataset.shards("images")), "new")
    present = [raw for name, raw in shards.items() if name not in todo]
    with ThreadPoolExecutor(_THREADS) as threads:
        recorded = list(threads.map(lambda raw: dataset.metadata(f"images/{raw.shard}.parquet"), present))
    for raw, provenance in zip(present, recorded, strict=True):
        same_path = provenance.get("raw") == raw.path
        if provenance.get("footer") == raw.digest and (not same_path or provenance.get("stamp") == raw.stamp):
            if provenance.get("fingerprint") != rules.fingerprint(raw):
                todo[raw.shard] = _changed_settings(provenance.get("settings", "{}"), rules.settings(raw))
        elif same_path:
            todo[raw.shard] = "the raw file has changed"
        else:
            raise UsageError(
                f"{raw.path} would become shard {raw.shard}, which already exists, made from {provenance.get('raw')}. "
                "Rename the new file or its folder."
            )
    tiers: dict[str, str] = {}
    if rules.downsize is not None:
        folder = tier_folder(rules.downsize)
        existing = set(dataset.shards(folder))
        for raw in present:
            provenance = dataset.metadata(f"{folder}/{raw.shard}.parquet") if raw.shard in existing else {}
            if raw.shard not in todo and provenance.get("fingerprint") != rules.tier_fingerprint(raw):
                tiers[raw.shard] = f"{folder} from images"
    return todo, tiers


def _changed_settings(before: str, now: str) -> str:
    """Describes the differences between the settings of a finished shard and the current ones (both JSON)."""
    old, new = json.loads(before), json.loads(now)
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    changed = ", ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)
    return f"made with other settings: {changed or 'another version of ingest'}"


def _repeated_ids(files: list[RawShard], rules: IngestRules) -> tuple[int, str]:
    """Number of rows whose id occurred before, and an example."""
    with ThreadPoolExecutor(_THREADS) as threads:
        hashes = list(
            progress_bar(threads.map(lambda raw: _hashes(raw, rules), files), len(files), "reading ids", "files")
        )
    ordered = np.sort(np.concatenate([np.zeros(0, np.int64), *hashes]))
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(repeated):
        return 0, ""
    holding = [raw for raw, found in zip(files, hashes, strict=True) if repeated[0] in found]
    name = next(name for name in _ids(holding[0], rules) if hash(name) == repeated[0])
    return len(repeated), f"{name} of {' and '.join(raw.path for raw in holding[:2])}"


def _hashes(raw: RawShard, rules: IngestRules) -> NDArray[np.int64]:
    try:
        return np.fromiter(map(hash, _ids(raw, rules)), np.int64)
    except (OSError, pa.ArrowInvalid):  # a damaged page: reported when the shard is ingested
        return np.zeros(0, np.int64)


def _ids(raw: RawShard, rules: IngestRules) -> Iterator[str]:
    """Ids of a raw file's rows, without the rows that have none."""
    with Store(raw.path).open() as file:
        parquet = pq.ParquetFile(file)
        columns = rules.columns(parquet.schema_arrow.names)
        fields = {field: column for column, field in columns.items()}
        site = SITES[raw.source]
        parts = [name.partition(".") for name in site.ID_COLUMNS]
        read = [f"{fields[field]}{dot}{rest}" for field, dot, rest in parts if field in fields]
        for batch in parquet.iter_batches(columns=read):
            for row in rules.named(batch).to_pylist():
                try:
                    yield site.row_id(row)
                except ValueError:
                    continue


def _bytes(raw: RawShard) -> int:
    return raw.rows * raw.row_bytes


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
