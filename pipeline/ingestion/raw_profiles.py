"""How raw files are read: decided once for each layout and folder from samples, and kept in the dataset."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Final
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import S3Refused, S3Unavailable, UsageError
from pipeline.ingestion.rules import IngestRules
from pipeline.sources import FIELDS, SITES
from pipeline.sources.pictures import IMAGE_COLUMNS
from pipeline.sources.reading import UNCERTAIN, Profile, Reading, profile
from pipeline.storage.fingerprints import digest
from pipeline.storage.row_reader import open_parquet
from pipeline.storage.shards import Store

_FILE: Final = "raw-profiles.json"  # in the dataset
_FORMAT: Final = 2
_FILES: Final = 8  # of a layout that samples are taken from, evenly spaced
_GROUPS: Final = 3  # row groups of each, likewise
_ROWS: Final = 200  # rows of each
_ENOUGH: Final = 50  # samples: a reading that fewer decided is decided again when more files join the folder
_READERS: Final = 8
_SHOWN: Final = 60  # lines of a plan, beside the uncertain ones
_NO_VALUE: Final = "__HIVE_DEFAULT_PARTITION__"
_IDS: Final = frozenset({"id", "parent_id", "pixiv_id"})
_PARTITION: Final = re.compile(r"([^=]+)=(.*)")


class RawProfiles:
    """The readings of raw files. A recorded one stays as it is, so that more files of a folder change no finished
    shard; what is new, or was decided from few samples, is read from samples."""

    def __init__(self, dataset: Store) -> None:
        self._dataset = dataset
        self._recorded = _load(dataset)
        self._changed = False
        self._labelled: dict[str, tuple[str, Sequence[str]]] = {}  # first file and labelled fields, by layout
        self.lines: dict[str, dict[str, None]] = {}  # of the plan, by folder, in order

    def of(
        self, files: Mapping[str, str], schema: pa.Schema, features: str, source: str, rules: IngestRules
    ) -> Reading:
        """The reading of files (path -> digest) with this schema and these features (their hash), of one folder.

        Raises UsageError for what would be misread.
        """
        paths = list(files)
        folder, constants = folder_of(paths[0]), partitions(paths[0], rules)
        _check_types(paths[0], schema, rules)
        names = [str(field) for field in schema]
        layout = [_FORMAT, folder, names, source, rules.renamed, asdict(rules.reading), sorted(constants)]
        key, key_of_few = digest([*layout, features]), digest([*layout, features, sorted(files.items())])
        known = self._recorded.get(key) or self._recorded.get(key_of_few)
        if known is None:
            known, samples = self._profile(paths, source, rules)
            if known.problems:
                raise UsageError(f"{paths[0]}: {known.problems[0]}")
            self._recorded[key if samples >= _ENOUGH else key_of_few] = known
            self._changed = True
        labelled = [name for name, _ in known.reading.labels]
        other, others = self._labelled.setdefault(digest(layout), (paths[0], labelled))
        if labelled != others:
            named, unnamed = (paths[0], other) if len(labelled) > len(others) else (other, paths[0])
            field = sorted({*labelled} ^ {*others})[0]
            raise UsageError(
                f"{field} holds class labels that {named} names in its footer and {unnamed} does not: put the files "
                "into folders of their own, or write the names in place of the numbers"
            )
        self.lines.setdefault(folder or ".", {}).update(dict.fromkeys(known.lines))
        return known.reading

    def described(self) -> Iterator[str]:
        """How columns are read, for the terminal. Folders that are read alike share a line, and no uncertainty is left
        out."""
        folders: dict[str, list[str]] = {}
        for folder, lines in sorted(self.lines.items()):
            for line in lines:
                folders.setdefault(line, []).append(folder)
        plain = [line for line in folders if UNCERTAIN not in line]
        left_out = set(plain[_SHOWN:])
        for line, found in folders.items():
            if line not in left_out:
                yield f"{found[0]}{f' and {len(found) - 1} other folders' if len(found) > 1 else ''}: {line}"
        if left_out:
            yield f"({len(left_out)} further lines, none of them uncertain, are left out)"

    def save(self) -> None:
        """Writes what was decided."""
        if self._changed:
            profiles = {key: asdict(found) for key, found in self._recorded.items()}
            self._dataset.write(_FILE, json.dumps({"format": _FORMAT, "profiles": profiles}).encode())

    def _profile(self, paths: Sequence[str], source: str, rules: IngestRules) -> tuple[Profile, int]:
        """How to read files of one layout, and the number of samples."""
        chosen = [paths[i] for i in _spread(len(paths), _FILES)]
        with ThreadPoolExecutor(_READERS) as readers:
            samples = list(readers.map(lambda path: _sample(path, rules), chosen))
        if paths_only := [path for path, (_, _, empty) in zip(chosen, samples, strict=True) if empty]:
            raise UsageError(
                f"{paths_only[0]} has no pictures, only their names: they are not embedded. Write the file again with "
                "the pictures' bytes (in datasets: embed_external_files=True)"
            )
        given = [partitions(path, rules) for path in chosen]
        rows = [(folder, row) for folder, (found, _, _) in zip(given, samples, strict=True) for row in found]
        known = profile(SITES[source], rows, samples[0][1], rules.reading, rules.admit)
        return known, len(rows)


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
    """Rows of a file, with names of pictures in place of pictures, the features in its footer by field, and whether
    all its pictures are null."""
    with open_parquet(path) as parquet:
        named = rules.columns(parquet.schema_arrow.names)
        columns = [column for column, name in named.items() if name not in IMAGE_COLUMNS]
        columns += name_columns(parquet.schema_arrow, named)
        groups = _spread(parquet.num_row_groups, _GROUPS)
        rows: list[dict[str, Any]] = []
        for group in groups:
            batch = next(parquet.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False), None)
            rows += _rows(rules.named(batch)) if batch else []
        images = [column for column, name in named.items() if name in IMAGE_COLUMNS]
        features = _features(parquet.schema_arrow.metadata or {})
        empty = bool(parquet.metadata.num_rows) and bool(images) and _all_null(parquet, images)
    return rows, {named[column]: features[column] for column in features if column in named}, empty


def name_columns(schema: pa.Schema, named: Mapping[str, str]) -> list[str]:
    """The parts of columns that hold the file names of pictures, which tell the pages of Pixiv's works."""
    structs = [column for column, name in named.items() if name in IMAGE_COLUMNS]
    kinds = {column: schema.field(column).type for column in structs}
    return [
        f"{column}.path"
        for column, kind in kinds.items()
        if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0
    ]


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
