"""How raw files are read: decided once for each layout and folder from samples, and kept in the dataset."""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any, Final
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import S3Refused, S3Unavailable, UsageError
from pipeline.ingestion.rules import IngestRules
from pipeline.sources import FIELDS, SITES
from pipeline.sources.pictures import IMAGE_COLUMNS
from pipeline.sources.reading import Profile, Reading, profile
from pipeline.storage.fingerprints import digest
from pipeline.storage.row_reader import open_parquet
from pipeline.storage.shards import Store

_FILE: Final = "raw-profiles.json"  # in the dataset
_FORMAT: Final = 1
_FILES: Final = 8  # of a layout that samples are taken from, evenly spaced
_GROUPS: Final = 3  # row groups of each, likewise
_ROWS: Final = 200  # rows of each
_READERS: Final = 8
_NO_VALUE: Final = "__HIVE_DEFAULT_PARTITION__"
_IDS: Final = frozenset({"id", "parent_id", "pixiv_id"})
_PARTITION: Final = re.compile(r"([^=]+)=(.*)")


class RawProfiles:
    """The readings of raw files. A recorded one stays as it is, so that more files of a folder change no finished
    shard; what is new is read from samples."""

    def __init__(self, dataset: Store) -> None:
        self._dataset = dataset
        self._recorded = _load(dataset)
        self._changed = False
        self.lines: dict[str, tuple[str, ...]] = {}  # of the plan, by folder

    def of(self, paths: Sequence[str], schema: pa.Schema, source: str, rules: IngestRules) -> Reading:
        """The reading of files with this schema, of one folder. Raises UsageError for what would be misread."""
        folder, constants = folder_of(paths[0]), partitions(paths[0], rules)
        _check_types(paths[0], schema, rules)
        names = [str(field) for field in schema]
        key = digest([_FORMAT, folder, names, source, rules.renamed, asdict(rules.reading), sorted(constants)])
        if key not in self._recorded:
            found = self._profile(paths, source, rules, constants)
            if found.problems:
                raise UsageError(f"{paths[0]}: {found.problems[0]}")
            # Folder names differ within a layout: they are no part of the record.
            self._recorded[key] = replace(found, reading=replace(found.reading, constants=()))
            self._changed = True
        known = self._recorded[key]
        self.lines[folder or "."] = known.lines
        return known.reading

    def save(self) -> None:
        """Writes what was decided."""
        if self._changed:
            profiles = {key: asdict(found) for key, found in self._recorded.items()}
            self._dataset.write(_FILE, json.dumps({"format": _FORMAT, "profiles": profiles}).encode())

    def _profile(self, paths: Sequence[str], source: str, rules: IngestRules, constants: Mapping[str, str]) -> Profile:
        chosen = [paths[i] for i in _spread(len(paths), _FILES)]
        with ThreadPoolExecutor(_READERS) as readers:
            samples = list(readers.map(lambda path: _sample(path, rules), chosen))
        features = [found for _, found, _ in samples]
        if differing := [path for path, found in zip(chosen, features, strict=True) if found != features[0]]:
            raise UsageError(
                f"{chosen[0]} and {differing[0]} describe their columns differently: put them into folders of their own"
            )
        if paths_only := [path for path, (_, _, empty) in zip(chosen, samples, strict=True) if empty]:
            raise UsageError(
                f"{paths_only[0]} has no pictures, only their names: they are not embedded. Write the file again with "
                "the pictures' bytes (in datasets: embed_external_files=True)"
            )
        rows = [dict(constants) | row for found, _, _ in samples for row in found]
        return profile(SITES[source], rows, features[0], constants, rules.reading)


def _check_types(path: str, schema: pa.Schema, rules: IngestRules) -> None:
    for column, name in rules.columns(schema.names).items():
        kind = schema.field(column).type
        if name in _IDS and pa.types.is_floating(kind) and kind.bit_width < 64:
            raise UsageError(
                f"{path}: {column} is {kind}, in which neighbouring ids above 2^24 are the same number. Write the file "
                "again with whole numbers, or name the column that has them: --map COLUMN=id"
            )


def folder_of(path: str) -> str:
    """The folder of a file, without partitions such as rating=e."""
    return "/".join(part for part in path.split("/")[:-1] if not _PARTITION.fullmatch(part))


def partitions(path: str, rules: IngestRules) -> dict[str, str]:
    """Fields that the folders' names give, as Hive, Spark and pyarrow write them: rating=e/0.parquet."""
    names = dict(rules.renamed)
    found = {}
    for part in path.split("/")[:-1]:
        if match := _PARTITION.fullmatch(part):
            column, value = match[1], unquote(match[2])
            name = names.get(column, column)
            if name in FIELDS and value != _NO_VALUE:
                found[name] = value
    return found


def _sample(path: str, rules: IngestRules) -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
    """Rows of a file without pictures, the features in its footer by field, and whether all its pictures are null."""
    with open_parquet(path) as parquet:
        named = rules.columns(parquet.schema_arrow.names)
        columns = [column for column, name in named.items() if name not in IMAGE_COLUMNS]
        groups = _spread(parquet.num_row_groups, _GROUPS)
        rows: list[dict[str, Any]] = []
        for group in groups:
            batch = next(parquet.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False), None)
            rows += _rows(rules.named(batch)) if batch else []
        images = [column for column, name in named.items() if name in IMAGE_COLUMNS]
        features = _features(parquet.schema_arrow.metadata or {})
        empty = bool(parquet.metadata.num_rows) and bool(images) and _all_null(parquet, images)
    return rows, {named[column]: features[column] for column in features if column in named}, empty


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Without rows that cannot be represented, which are rejected later."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except Exception:  # of many types, from invalid UTF-8 to times out of range
        if batch.num_rows == 1:
            return []
        return [row for number in range(batch.num_rows) for row in _rows(batch.slice(number, 1))]


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """What Hugging Face's libraries say about the columns, {} if nothing."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return dict(features)
    except (KeyError, ValueError, TypeError):
        return {}


def _all_null(parquet: pq.ParquetFile, columns: Sequence[str]) -> bool:
    """True if the statistics say that these columns of pictures have no value at all."""
    places = [
        i
        for i in range(parquet.metadata.num_columns)
        if parquet.metadata.schema.column(i).path in {*columns, *(f"{column}.bytes" for column in columns)}
    ]
    groups = [parquet.metadata.row_group(number) for number in range(parquet.metadata.num_row_groups)]
    statistics = [(group, group.column(place).statistics) for group in groups for place in places]
    return bool(statistics) and all(
        found is not None and found.has_null_count and found.null_count == group.num_rows for group, found in statistics
    )


def _spread(length: int, count: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, length - 1, min(count, length))}) if length else []


def _load(dataset: Store) -> dict[str, Profile]:
    """{} if nothing was recorded, or in another form."""
    try:
        record = json.loads(dataset.read(_FILE))
        if record["format"] != _FORMAT:
            return {}
        return {key: _profile_of(found) for key, found in record["profiles"].items()}
    except (OSError, ValueError, KeyError, TypeError, S3Refused, S3Unavailable):
        return {}


def _profile_of(fields: Mapping[str, Any]) -> Profile:
    about = fields["reading"]
    reading = Reading(
        constants=(),
        labels=tuple((name, tuple(names)) for name, names in about["labels"]),
        commas=tuple(about["commas"]),
        legacy_ratings=about["legacy_ratings"],
    )
    return Profile(reading=reading, lines=tuple(fields["lines"]))
