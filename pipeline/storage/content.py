"""Digests of the content of tables."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def content_digest(table: pa.Table) -> str:
    """SHA-256 of the rows in their order. Independent of chunks, offsets and the file that the rows come from."""
    hashed = hashlib.sha256()
    for name in table.column_names:
        hashed.update(name.encode())
        _hash_column(hashed, table[name])
    return hashed.hexdigest()


def _hash_column(hashed: Any, column: pa.ChunkedArray) -> None:
    """Hashes the lengths of lists and texts (-1: null) or the validity of numbers, then the values."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_list(array.type):
        hashed.update(pc.list_value_length(array).fill_null(-1).to_numpy(zero_copy_only=False).tobytes())
        _hash_column(hashed, array.flatten())
    elif pa.types.is_string(array.type):
        hashed.update(pc.binary_length(array).fill_null(-1).to_numpy(zero_copy_only=False).tobytes())
        array = array.fill_null("")
        _, offsets, values = array.buffers()
        if len(array):
            ends = np.frombuffer(offsets, np.int32)[[array.offset, array.offset + len(array)]]
            hashed.update(memoryview(values)[ends[0] : ends[1]] if values else b"")
    else:
        hashed.update(array.is_valid().to_numpy(zero_copy_only=False).tobytes())
        hashed.update(array.fill_null(pa.scalar(0).cast(array.type)).to_numpy(zero_copy_only=False).tobytes())
