"""Rows of raw files that have the id of an earlier row. Hashes of ids are cached in the dataset, so that a file is read
again only after it has changed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.core.errors import S3Refused, S3Unavailable
from pipeline.core.progress import progress_bar
from pipeline.ingestion.rules import IngestRules, RawShard
from pipeline.sources import SITES
from pipeline.storage.fingerprints import digest
from pipeline.storage.shards import Store

_CACHE: Final = "raw-ids.parquet"
_SCHEMA: Final = pa.schema(
    [pa.field("file", pa.string()), pa.field("hashes", pa.large_list(pa.int64()))],
    metadata={"hdm.format": "raw ids", "hdm.version": "1"},
)
_READERS: Final = 8


class RawIds:
    """64-bit hashes of the ids of raw files."""

    def __init__(self, dataset: Store) -> None:
        self._dataset = dataset
        self._known = _load(dataset)  # by the digest of a file's identity
        self._read = False

    def repeated(self, files: list[RawShard], rules: IngestRules) -> tuple[int, str]:
        """The number of rows whose id occurred before, and an example with its files, or ""."""
        keys = [digest([raw.path, raw.stamp, raw.source, raw.renamed]) for raw in files]
        new = {key: raw for key, raw in zip(keys, files, strict=True) if key not in self._known}
        with ThreadPoolExecutor(_READERS) as threads:
            hashed = threads.map(lambda raw: _hashes(raw, rules), new.values())
            bar = progress_bar(hashed, len(new), "reading ids", "files") if new else hashed
            self._known |= dict(zip(new, bar, strict=True))
        self._read |= bool(new)
        ordered = np.sort(np.concatenate([np.zeros(0, np.int64), *(self._known[key] for key in keys)]))
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if not len(repeated):
            return 0, ""
        holding = [raw for raw, key in zip(files, keys, strict=True) if repeated[0] in self._known[key]]
        name = next(name for name in _ids(holding[0], rules) if _hash(name) == repeated[0])
        return len(repeated), f"{name} of {' and '.join(raw.path for raw in holding[:2])}"

    def save(self) -> None:
        """Writes the cache if files were read."""
        if self._read:
            table = pa.table([list(self._known), list(self._known.values())], schema=_SCHEMA)
            self._dataset.write_table(_CACHE, table, _SCHEMA)


def _load(dataset: Store) -> dict[str, NDArray[np.int64]]:
    """{} if there is no cache that can be read."""
    try:
        table = dataset.read_table(_CACHE, _SCHEMA.names)
    except (OSError, KeyError, pa.ArrowException, S3Refused, S3Unavailable):
        return {}
    hashes = (row.values.to_numpy() for row in table["hashes"])
    return dict(zip(table["file"].to_pylist(), hashes, strict=True))


def _hashes(raw: RawShard, rules: IngestRules) -> NDArray[np.int64]:
    try:
        return np.fromiter(map(_hash, _ids(raw, rules)), np.int64)
    except (OSError, pa.ArrowInvalid):  # a damaged page: reported when the shard is ingested
        return np.zeros(0, np.int64)


def _hash(name: str) -> int:
    """The same in every process, unlike Python's own."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


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
