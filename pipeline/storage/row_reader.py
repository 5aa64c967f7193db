"""Some rows of a parquet file, a few megabytes at a time: a process holds one page of the file, whatever its size."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.storage.shards import Store

READ_BYTES: Final = 4 << 20
# Read buffer per column, and the size of a GET on S3. Unbuffered, pyarrow fetches whole column chunks, up to gigabytes.
_BUFFER_BYTES: Final = 4 << 20
_MOST_ROWS: Final = 256


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Opens a parquet file, local or on S3, for reading it in small pieces."""
    with Store(path).open() as file:
        yield pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def read_rows(
    parquet: pq.ParquetFile, wanted: NDArray[np.int32], columns: Sequence[str], read_bytes: int = READ_BYTES
) -> Iterator[tuple[NDArray[np.int32], pa.RecordBatch]]:
    """Yields the rows whose numbers are in `wanted` (ascending), about `read_bytes` at a time and of one row group
    each, with their numbers."""
    end = 0
    for group in range(parquet.metadata.num_row_groups):
        found = parquet.metadata.row_group(group)
        start, end = end, end + found.num_rows
        in_group = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, end)]
        if not len(in_group):
            continue
        at_once = min(_MOST_ROWS, max(1, read_bytes * found.num_rows // max(1, found.total_byte_size)))
        for batch in parquet.iter_batches(at_once, row_groups=[group], columns=columns, use_threads=False):
            number = in_group[np.searchsorted(in_group, start) : np.searchsorted(in_group, start + batch.num_rows)]
            if len(number) == batch.num_rows:
                yield number, batch
            elif len(number):
                yield number, batch.take(pa.array(number - start))
            start += batch.num_rows
            if start > in_group[-1]:
                break
