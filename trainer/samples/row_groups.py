"""Cache of row groups in memory. Each is read whole by a thread and kept as long as samples of it are still to come.

Reading one picture costs reading its row group, up to 48 MB. The data order takes each stream through a few row groups
at a time, so a worker with this cache reads each row group about once per epoch.
"""

import errno
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.storage.reachability import check_reachable
from pipeline.storage.shards import Store
from trainer.samples.row_index import RowIndex, Selection, held_out, id_hash, stale_selection

Value = TypeVar("Value")

_THREADS = 8  # per process: enough to hide the latency of S3
_RETRY_SECONDS = (0.5, 2.0, 8.0)  # pauses between attempts to read a file


@dataclass(frozen=True, eq=False)
class RowGroup:
    """The selected rows of a row group of pictures. Axes: R selected rows, T training rows among them."""

    rows: list[dict[str, Any]]  # SELECTION rows; converted at once, which takes a quarter of the time of one by one
    hash_R: NDArray[np.int64]  # of the ids
    row_T: NDArray[np.int64]  # indices into R of the rows that are not held out
    pictures: pa.ChunkedArray | None  # encoded bytes of each row; None if they cannot be read
    failure: str  # why they cannot be read


class RowGroups:
    """The row groups in memory and the threads that read more of them. Thread-safe."""

    def __init__(self) -> None:
        self._held = Cache[Future[RowGroup]]()
        self._readers = ThreadPoolExecutor(_THREADS, thread_name_prefix="row-group")

    def take(self, index: RowIndex, uses: dict[int, int], capacity: int) -> dict[int, RowGroup]:
        """The row groups by their number in the index, read if they are not in memory.

        `uses`: number of samples needed from each. `capacity`: number of row groups kept afterwards.
        """
        selection = index.selection
        files = (selection.dataset, selection.name, selection.digest, selection.images, index.hold_out)
        reading = {
            group: self._held.take(
                (*files, group),
                partial(self._readers.submit, read_row_group, index, group),
                count,
                int(index.counts_G[group]),
                capacity,
            )
            for group, count in uses.items()
        }
        try:
            return {group: future.result() for group, future in reading.items()}
        except Exception:  # such as S3 not answering: the next call reads again
            self.forget()
            raise

    def forget(self) -> None:
        """Drops everything that was read."""
        self._held.clear()
        selection_rows.cache_clear()
        _footer.cache_clear()


def read_row_group(index: RowIndex, group: int) -> RowGroup:
    """Reads one row group. A file that cannot be read in several attempts gives a RowGroup with a `failure`.

    ValueError if the file's rows have changed, pipeline.core.errors.StorageUnavailable if S3 does not answer or the
    folder of the dataset cannot be reached.
    """
    selection, shard = index.selection, index.selection.shards[index.shard_G[group]]
    first, stop = index.first_G[group], index.stop_G[group]
    selected = selection_rows(selection.dataset, selection.name, shard)
    row_R = selected["row"].to_numpy()
    inside = np.flatnonzero((row_R >= first) & (row_R < stop))
    texts = selected.take(pa.array(inside))
    rows = texts.to_pylist()
    hash_R = id_hash(texts["id"])
    row_T = np.flatnonzero(~held_out(hash_R, index.hold_out))
    try:
        pictures = retried(partial(_pictures, selection, shard, int(index.group_G[group])))
    except (OSError, pa.ArrowException) as error:
        others = [f"{selection.images}/{other}.parquet" for other in selection.shards if other != shard]
        _check_dataset(selection.dataset, error, others)
        line = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return RowGroup(
            rows, hash_R, row_T, None, f"row group {index.group_G[group]} of {shard} cannot be read: {line}"
        )
    if pictures.num_rows != stop - first:
        raise stale_selection(selection, shard)
    if len(inside) < pictures.num_rows:
        pictures = pictures.take(pa.array(row_R[inside] - first))
    if not pictures["id"].equals(texts["id"]):
        raise stale_selection(selection, shard)
    return RowGroup(rows, hash_R, row_T, pictures["image"], "")


def lost_row_group(reason: str) -> str | None:
    """The row group that cannot be read according to the reason why a picture was replaced; None for another reason."""
    found = re.match(r"row group \d+ of .+? cannot be read", reason)
    return found[0] if found else None


@lru_cache(maxsize=16)
def selection_rows(dataset: str, name: str, shard: str) -> pa.Table:
    """A shard of the selection, with the schema SELECTION."""
    try:
        return retried(lambda: Store(dataset).read_table(f"selections/{name}/{shard}.parquet"))
    except OSError as error:
        _check_dataset(dataset, error, [])
        raise


def _check_dataset(dataset: str, error: Exception, others: Sequence[str]) -> None:
    """StorageUnavailable if this error of a file says that the whole dataset cannot be reached. S3 raises its own."""
    store = Store(dataset)
    if isinstance(error, OSError) and not store.is_remote:
        check_reachable(store.root, error, [store.path(name) for name in others])


def retried(read: Callable[[], Value]) -> Value:
    """The result of `read`, called again after an error of the operating system, such as EIO or ETIMEDOUT.

    Raises the error of the last attempt, and at once what does not pass: a file that is missing or may not be read, or
    damaged contents, for which pyarrow raises OSError without a number.
    """
    for seconds in _RETRY_SECONDS:
        try:
            return read()
        except OSError as error:
            if error.errno in (None, errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR):
                raise
            time.sleep(seconds)
    return read()


def _pictures(selection: Selection, shard: str, group: int) -> pa.Table:
    footer = _footer(selection.dataset, selection.images, shard)
    with Store(selection.dataset).open(f"{selection.images}/{shard}.parquet") as file:
        return pq.ParquetFile(file, metadata=footer).read_row_group(group, columns=["id", "image"])


@lru_cache(maxsize=64)
def _footer(dataset: str, images: str, shard: str) -> pq.FileMetaData:
    with Store(dataset).open(f"{images}/{shard}.parquet") as file:
        return pq.read_metadata(file)


@dataclass
class _Entry(Generic[Value]):
    value: Value
    left: int = 0  # remaining uses


class Cache(Generic[Value]):
    """Evicts entries with no remaining uses first, then the least recently used.

    Either rule alone fails: with large batches some streams enter their next window between two uses of another's row
    group, and LRU would evict one with a row left before one with none.
    """

    def __init__(self) -> None:
        self._entries = OrderedDict[Hashable, _Entry[Value]]()
        self._lock = threading.Lock()

    def take(self, key: Hashable, make: Callable[[], Value], uses: int, total: int, capacity: int) -> Value:
        """The entry, made if it is missing. After `total` uses it has none left until it is used again."""
        with self._lock:
            entry = self._entries.pop(key, None) or _Entry(make())
            entry.left = (entry.left if entry.left > 0 else total) - uses
            while len(self._entries) >= max(1, capacity):
                used_up = (other for other, held in self._entries.items() if held.left <= 0)
                del self._entries[next(used_up, next(iter(self._entries)))]
            self._entries[key] = entry
        return entry.value

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
