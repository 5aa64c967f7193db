"""Rows of raw files as tables, a few megabytes at a time."""

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.core.tables import ROW, with_constants
from pipeline.ingestion.rules import IngestRules, RawShard
from pipeline.sources.pictures import IMAGE_COLUMNS, image_array
from pipeline.sources.reading import Reading
from pipeline.storage.fingerprints import digest
from pipeline.storage.row_reader import READ_BYTES, open_parquet, read_rows
from pipeline.storage.shards import Store

# Columns of the raw shard in every table, beside those of its file.
PATH, SOURCE, MADE_FROM, READING = "hdm_path", "hdm_source", "hdm_made_from", "hdm_reading"

_READ_BYTES = READ_BYTES
# A page is always read whole, and most writers check its size only after this many values.
_PAGE_ROWS = 1024
_PROCESS_BYTES = 300 << 20


class RawFileChanged(Exception):
    """A raw file was written again while a job read it."""


def reading_key(reading: Reading) -> str:
    """Stands for a reading in every row. The reading itself may hold thousands of names."""
    return "" if reading == Reading() else digest(asdict(reading))


def read_memory(raw: RawShard) -> int:
    """Bytes that reading a raw file may take: a page read and unpacked, the table of its rows, the process.

    A raw file of 600 MB in a single page was measured at 1.3 GB.
    """
    return 3 * min(raw.largest_group, _PAGE_ROWS * raw.row_bytes) + _PROCESS_BYTES


def all_rows(raw: RawShard) -> NDArray[np.int32]:
    """The numbers of the shard's rows, which are those in the raw file."""
    return np.arange(raw.first_row, raw.first_row + raw.rows, dtype=np.int32)


def read_raw(raw: RawShard, wanted: NDArray[np.int32], rules: IngestRules) -> Iterator[pa.Table]:
    """Rows of a raw file, a few megabytes at a time: the columns that the rules read, ROW and the raw shard's."""
    about = {
        PATH: raw.path,
        SOURCE: raw.source,
        MADE_FROM: rules.parts_fingerprint(raw),
        READING: reading_key(raw.reading),
    }
    with open_parquet(raw.path) as parquet:
        columns = list(rules.columns(parquet.schema_arrow.names))
        for number, batch in read_rows(parquet, wanted, columns, _READ_BYTES):
            yield with_constants(pa.Table.from_batches([batch]), about).append_column(ROW, pa.array(number, pa.int32()))


def read_images(raw: RawShard, wanted: NDArray[np.int32], rules: IngestRules) -> Iterator[pa.Array]:
    """The images of these rows (ascending numbers), binary, a few megabytes at a time.

    Raises RawFileChanged if the file is not the one that was planned.
    """
    if Store(raw.path).stamp() != raw.stamp:
        raise RawFileChanged(f"{raw.path} has changed since this job started; run the same command again")
    with open_parquet(raw.path) as parquet:
        found = rules.columns(parquet.schema_arrow.names)
        columns = [column for column, name in found.items() if name in IMAGE_COLUMNS]
        for _, batch in read_rows(parquet, wanted, columns, _READ_BYTES):
            yield image_array(rules.named(batch))
