"""Reading shards for statistics: a few columns in batches, by a few threads, with results in a fixed order."""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import JobFailed
from pipeline.storage.shards import Store

Item = TypeVar("Item")
Result = TypeVar("Result")

# Arrow and numpy release the interpreter lock; on S3 most of the time is waiting.
_THREADS = 4
_BATCH_ROWS = 16_384
_PICTURES_PER_BATCH = 8  # pictures may be large
_READ_AHEAD = 4_000_000  # bytes


def read_batches(store: Store, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Small columns of a parquet file, a bounded number of rows at a time. Raises JobFailed if reading fails."""
    # Pre-buffering joins requests for neighbouring columns but keeps all it has read: so read some groups at a time.
    with _reading(store, name), store.open(name) as opened, pq.ParquetFile(opened, pre_buffer=True) as file:
        groups: list[int] = []
        rows = 0
        for group in range(file.metadata.num_row_groups):
            groups.append(group)
            rows += file.metadata.row_group(group).num_rows
            if rows >= _BATCH_ROWS or group == file.metadata.num_row_groups - 1:
                yield from file.iter_batches(_BATCH_ROWS, groups, list(columns))
                groups, rows = [], 0


def read_pictures(store: Store, name: str, wanted: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Row number and image bytes of each wanted row (sorted row numbers), reading a page of the column at a time and
    skipping row groups without wanted rows. Raises JobFailed if reading fails."""
    streamed = {"pre_buffer": False, "buffer_size": _READ_AHEAD}
    with _reading(store, name), store.open(name) as opened, pq.ParquetFile(opened, **streamed) as file:
        end = 0
        for group in range(file.metadata.num_row_groups):
            row, end = end, end + file.metadata.row_group(group).num_rows
            rows = wanted[bisect_left(wanted, row) : bisect_left(wanted, end)]
            for batch in file.iter_batches(_PICTURES_PER_BATCH, [group], ["image"]) if rows else ():
                after = row + batch.num_rows
                for number in rows[bisect_left(rows, row) : bisect_left(rows, after)]:
                    yield number, batch["image"][number - row].as_py()
                row = after
                if row > rows[-1]:
                    break


def row_count(store: Store, name: str) -> int:
    """The number of rows of a parquet file. Raises JobFailed if reading fails."""
    with _reading(store, name):
        return store.rows(name)


@contextmanager
def _reading(store: Store, name: str) -> Iterator[None]:
    """Turns errors from reading this file into a one-line JobFailed."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JobFailed(f"cannot read {store.path(name)}: {why}; remove it and run the job that wrote it") from None


def map_in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int = _THREADS) -> Iterator[Result]:
    """`map` in threads: yields results in the order of the items and works only a few items ahead of the reader."""
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
