"""Reading shards for counting: a few columns in batches, by a few threads, with results in a fixed order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.jobs import JobFailed
from pipeline.shards import Store

Item = TypeVar("Item")
Result = TypeVar("Result")

# Arrow and numpy let go of the interpreter lock; on S3 most of the time is waiting.
_THREADS = 4
_BATCH_ROWS = 16_384


def read_batches(store: Store, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Small columns of a parquet file, a bounded number of rows at a time. JobFailed where the file cannot be read."""
    # Pre-buffering joins the requests for neighbouring columns, and keeps what it read: hence some groups at a time.
    with readable(store, name), store.open(name) as opened, pq.ParquetFile(opened, pre_buffer=True) as file:
        groups: list[int] = []
        rows = 0
        for group in range(file.metadata.num_row_groups):
            groups.append(group)
            rows += file.metadata.row_group(group).num_rows
            if rows >= _BATCH_ROWS or group == file.metadata.num_row_groups - 1:
                yield from file.iter_batches(_BATCH_ROWS, groups, list(columns))
                groups, rows = [], 0


def row_count(store: Store, name: str) -> int:
    """The number of rows of a parquet file. JobFailed where the file cannot be read."""
    with readable(store, name):
        return store.rows(name)


@contextmanager
def readable(store: Store, name: str) -> Iterator[None]:
    """JobFailed, in one line, where reading this file fails."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JobFailed(f"cannot read {store.path(name)}: {why}; remove it and run the job that wrote it") from None


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int = _THREADS) -> Iterator[Result]:
    """`map` by a few threads: results in the order of the items, of which only a few are ahead of the reader."""
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
