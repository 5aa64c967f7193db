"""What an ingest would do, found out before any work: every raw footer, every id, what is there already.

Knows nothing of Ray. Footers and ids are read by threads: on S3 each is a wait of its own.
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
from pipeline.core.progress import progress
from pipeline.ingestion.validation import IngestRules, RawShard, tier_folder
from pipeline.sources import describe, id_columns, recognise, row_id
from pipeline.storage.fingerprints import footer_digest
from pipeline.storage.shards import Store

_THREADS = 8


@dataclass(frozen=True)
class Plan:
    """What ingest will do. `todo` and `tiers` are to be made, each with why; all other shards are finished."""

    shards: dict[str, RawShard]
    unreadable: dict[str, str]  # raw files that are not whole parquet, each with what is wrong
    todo: dict[str, str]  # shards of images, with the smaller tier where one is asked for
    tiers: dict[str, str]  # shards whose images are finished and whose smaller tier is not
    repeated: int  # rows that have the id of another row
    example: str  # of such an id, "" where there is none

    def lines(self, dataset: Store) -> Iterator[str]:
        """The plan as it is printed."""
        parts = self.shards.values()
        yield f"{len(parts)} raw shards, {sum(raw.rows for raw in parts):,} rows, {_size(sum(map(_bytes, parts)))}"
        for layout, count in sorted(Counter(raw.layout for raw in parts).items()):
            yield f"  {count} x {layout}"
        if parts:
            largest = max(parts, key=lambda raw: raw.largest_group)
            yield f"  largest row group {_size(largest.largest_group)}, of {largest.path}"
        if self.repeated:
            yield f"  {self.repeated:,} rows repeat the id of another, as {self.example}: ingest or curation keeps one"
        for path, why in sorted(self.unreadable.items()):
            yield f"  unreadable, left out: {path} ({why})"
        tiers = f", {len(self.tiers)} smaller tiers to do" if self.tiers else ""
        finished = len(parts) - len(self.todo)
        yield f"  {finished} of them finished before, {len(self.todo)} to do{tiers}{self._room(dataset)}"
        for why, count in sorted(Counter([*self.todo.values(), *self.tiers.values()]).items()):
            yield f"    {count} x {why}"

    def _room(self, dataset: Store) -> str:
        if dataset.is_remote or not self.todo:
            return ""
        folder = next(path for path in (Path(dataset.root), *Path(dataset.root).parents) if path.exists())
        needed = sum(_bytes(self.shards[name]) for name in self.todo)
        return f", about {_size(needed)} to write, {_size(shutil.disk_usage(folder).free)} free"


def plan_shards(paths: list[str], source: str, rows_per_shard: int | None, dataset: Store, rules: IngestRules) -> Plan:
    """Read every footer and every id before any work is done.

    UsageError for a file of an unknown layout, for two files that would become the same shard, and for a shard that the
    dataset already has from another file or in other chunks.
    """
    files, unreadable = _inspect_all(paths, source, rules)
    shards: dict[str, RawShard] = {}
    for raw in (part for whole in files for part in _chunks(whole, rows_per_shard)):
        if raw.shard in shards:
            raise UsageError(f"{raw.path} and {shards[raw.shard].path} would both become shard {raw.shard}; rename one")
        shards[raw.shard] = raw
    _check_chunks(files, shards, dataset)
    todo, tiers = _unfinished(shards, dataset, rules)
    # All files, not the new ones alone: a new file may repeat an old one. Nothing new, nothing to be found.
    repeated, example = _repeated_ids(files, rules) if todo else (0, "")
    return Plan(shards, unreadable, todo, tiers, repeated, example)


def _inspect_all(paths: list[str], source: str, rules: IngestRules) -> tuple[list[RawShard], dict[str, str]]:
    """The raw files, each as one shard, and what is wrong with those that are not whole parquet."""

    def inspect(path: str) -> RawShard | str:
        try:
            return _inspect(path, source, rules)
        except (OSError, pa.ArrowInvalid) as error:
            return str(error).splitlines()[0].strip()
        except ValueError as error:
            raise UsageError(f"{path} is {error}") from error

    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(progress(threads.map(inspect, paths), len(paths), "reading footers", "files"))
    for pair in rules.renamed:
        if not any(isinstance(raw, RawShard) and pair in raw.renamed for raw in found):
            raise UsageError(f"--map {'='.join(pair)}: no file has a column {pair[0]!r}; mend the name or leave it out")
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
    """<source>-<folder>-<file>, from the path alone so that a rerun finds the same name; a folder that is named like
    the source is not named twice."""
    parts = PurePosixPath(path)
    folder = "" if parts.parent.name in (source, "") else f"{parts.parent.name}-"
    return f"{source}-{folder}{parts.stem}".replace(" ", "_")


def _chunks(raw: RawShard, rows_per_shard: int | None) -> Iterator[RawShard]:
    """The raw file cut into shards of at most so many rows; whole where no number is given."""
    if rows_per_shard is None:
        yield raw
        return
    for number, first in enumerate(range(0, max(1, raw.rows), rows_per_shard)):
        rows = min(rows_per_shard, raw.rows - first)
        yield replace(raw, shard=f"{raw.shard}-{number:05d}", first_row=first, rows=rows)


def _check_chunks(files: list[RawShard], shards: Mapping[str, RawShard], dataset: Store) -> None:
    """UsageError where the dataset has the rows of a raw file under other shard names: they would be there twice."""
    names = {raw.shard for raw in files}
    for name in dataset.shards("images"):
        if name not in shards and (name in names or re.sub(r"-\d{5}$", "", name) in names):
            raise UsageError(
                f"{dataset.root} has shard {name}, perhaps the same rows cut another way; give the --rows-per-shard "
                "that it was made with, or none, or rename the raw file, or remove the shard from images/ and rejected/"
            )


def _unfinished(
    shards: Mapping[str, RawShard], dataset: Store, rules: IngestRules
) -> tuple[dict[str, str], dict[str, str]]:
    """Shards of images to be made, and shards whose smaller tier alone is, each with why."""
    todo = dict.fromkeys(shards.keys() - set(dataset.shards("images")), "new")
    present = [raw for name, raw in shards.items() if name not in todo]
    with ThreadPoolExecutor(_THREADS) as threads:
        recorded = list(threads.map(lambda raw: dataset.metadata(f"images/{raw.shard}.parquet"), present))
    for raw, made in zip(present, recorded, strict=True):
        written_again = made.get("raw") == raw.path and made.get("stamp") != raw.stamp
        if made.get("footer") == raw.digest and not written_again:
            if made.get("fingerprint") != rules.fingerprint(raw):
                todo[raw.shard] = _other_settings(made.get("settings", "{}"), rules.settings(raw))
        elif made.get("raw") == raw.path:
            todo[raw.shard] = "the raw file has changed since"
        else:
            raise UsageError(
                f"{raw.path} would become shard {raw.shard}, which is there already, made from {made.get('raw')}; "
                "rename the new file, or its folder"
            )
    tiers: dict[str, str] = {}
    if rules.downsize is not None:
        folder = tier_folder(rules.downsize)
        there = set(dataset.shards(folder))
        for raw in present:
            made = dataset.metadata(f"{folder}/{raw.shard}.parquet") if raw.shard in there else {}
            if raw.shard not in todo and made.get("fingerprint") != rules.tier_fingerprint(raw):
                tiers[raw.shard] = f"{folder} from images"
    return todo, tiers


def _other_settings(before: str, now: str) -> str:
    """Which of the settings that a finished shard was made with are others now."""
    old, new = json.loads(before), json.loads(now)
    other = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    changed = ", ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in other)
    return f"made with other settings: {changed or 'another version of ingest'}"


def _repeated_ids(files: list[RawShard], rules: IngestRules) -> tuple[int, str]:
    """How many rows have the id of another one before them, and such an id."""
    with ThreadPoolExecutor(_THREADS) as threads:
        hashes = list(progress(threads.map(lambda raw: _hashes(raw, rules), files), len(files), "reading ids", "files"))
    every = np.sort(np.concatenate([np.zeros(0, np.int64), *hashes]))
    again = every[1:][every[1:] == every[:-1]]
    if not len(again):
        return 0, ""
    of = [raw for raw, found in zip(files, hashes, strict=True) if again[0] in found]
    name = next(name for name in _ids(of[0], rules) if hash(name) == again[0])
    return len(again), f"{name} of {of[0].path}" + (f" and {of[1].path}" if len(of) > 1 else "")


def _hashes(raw: RawShard, rules: IngestRules) -> NDArray[np.int64]:
    try:
        return np.fromiter(map(hash, _ids(raw, rules)), np.int64)
    except (OSError, pa.ArrowInvalid):  # a page is spoilt: the work itself says so
        return np.zeros(0, np.int64)


def _ids(raw: RawShard, rules: IngestRules) -> Iterator[str]:
    """The ids of a raw file's rows, those without one left out."""
    with Store(raw.path).open() as file:
        parquet = pq.ParquetFile(file)
        columns = rules.columns(parquet.schema_arrow.names)
        fields = {field: column for column, field in columns.items()}
        wanted = id_columns(fields, raw.source)
        read = [name.replace(name.partition(".")[0], fields[name.partition(".")[0]], 1) for name in wanted]
        for batch in parquet.iter_batches(columns=read):
            for row in rules.named(batch).to_pylist():
                try:
                    yield row_id(row, raw.source)
                except ValueError:
                    continue


def _bytes(raw: RawShard) -> int:
    return raw.rows * raw.row_bytes


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
