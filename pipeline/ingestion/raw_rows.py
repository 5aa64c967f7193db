"""Rows of raw files as tables, a few megabytes at a time. A process holds one page of a file, whatever its size."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.core.records import TIER
from pipeline.core.tables import DIED, ROW, SHARD
from pipeline.ingestion.rules import IngestRules, RawShard
from pipeline.storage.shards import Store

# Columns of the raw shard in every table, beside those of its file.
PATH, SOURCE, MADE_FROM = "hdm_path", "hdm_source", "hdm_made_from"

_READ_BYTES = 4 << 20
_MOST_ROWS = 256
# Read buffer per column, and the size of a GET on S3. Unbuffered, pyarrow fetches whole column chunks, up to gigabytes.
_BUFFER_BYTES = 4 << 20
# A page is always read whole, and most writers check its size only after this many values.
_PAGE_ROWS = 1024
_PROCESS_BYTES = 300 << 20


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
    about = {PATH: raw.path, SOURCE: raw.source, MADE_FROM: rules.parts_fingerprint(raw)}
    for number, batch in read_rows(raw.path, wanted, rules):
        yield with_constants(pa.Table.from_batches([batch]), about).append_column(ROW, pa.array(number, pa.int32()))


def read_rows(
    path: str, wanted: NDArray[np.int32], rules: IngestRules | None = None
) -> Iterator[tuple[NDArray[np.int32], pa.RecordBatch]]:
    """The wanted rows (ascending numbers) of a parquet file, a few at a time, with their numbers: the columns of a raw
    file that the rules read or, without rules, those of TIER."""
    with Store(path).open() as file:
        parquet = pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        columns = list(rules.columns(parquet.schema_arrow.names)) if rules else TIER.names
        end = 0
        for group in range(parquet.metadata.num_row_groups):
            found = parquet.metadata.row_group(group)
            start, end = end, end + found.num_rows
            in_group = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, end)]
            if not len(in_group):
                continue
            at_once = min(_MOST_ROWS, max(1, _READ_BYTES * found.num_rows // max(1, found.total_byte_size)))
            for batch in parquet.iter_batches(at_once, row_groups=[group], columns=columns, use_threads=False):
                number = in_group[np.searchsorted(in_group, start) : np.searchsorted(in_group, start + batch.num_rows)]
                if len(number) == batch.num_rows:
                    yield number, batch
                elif len(number):
                    yield number, batch.take(pa.array(number - start))
                start += batch.num_rows
                if start > in_group[-1]:
                    break


def with_constants(table: pa.Table, values: dict[str, str]) -> pa.Table:
    """The table with more columns, each of which has the same text in every row."""
    for name, value in values.items():
        table = table.append_column(name, pa.array([value] * table.num_rows, pa.string()))
    return table


def labelled(table: pa.Table, shard: str) -> pa.Table:
    """The table as the pipeline passes it to its steps."""
    table = with_constants(table, {SHARD: shard})
    return table.append_column(DIED, pa.array([False] * table.num_rows, pa.bool_()))
