"""Row groups in memory: each is read whole, once, by a thread, and kept while samples of it are still to come.

A picture costs the reading of its row group, up to 48 MB. The order of samples takes a stream through a few row groups
at a time, so a worker that keeps those reads each row group about once an epoch.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.storage.shards import Store
from trainer.samples.layout import Layout, Selection, held_out, id_hash, stale

Value = TypeVar("Value")

# Of one process, at once: enough to hide the waits of S3.
_THREADS = 8


@dataclass(frozen=True, eq=False)
class RowGroup:
    """The selected rows of a row group of pictures. Axes: R selected rows, T those that are trained on."""

    rows: list[dict[str, Any]]  # SELECTION. All at once: a quarter of the time that row by row takes
    hash_R: NDArray[np.int64]  # of their ids
    row_T: NDArray[np.int64]  # those of R that are not held out
    pictures: pa.ChunkedArray | None  # bytes, row for row; None where they cannot be read
    failure: str  # why they cannot


class RowGroups:
    """Those that are in memory, and the threads that read more. Any number of threads may ask."""

    def __init__(self) -> None:
        self._held = Cache[Future[RowGroup]]()
        self._readers = ThreadPoolExecutor(_THREADS, thread_name_prefix="row-group")

    def take(self, layout: Layout, uses: dict[int, int], capacity: int) -> dict[int, RowGroup]:
        """The row groups by number in the layout, read where they are not held. `uses`: how many samples of each are
        asked for; `capacity`: how many are held afterwards."""
        selection = layout.selection
        files = (selection.dataset, selection.name, selection.digest, selection.images)
        reading = {
            group: self._held.take(
                (*files, group),
                partial(self._readers.submit, read_row_group, layout, group),
                count,
                int(layout.counts_G[group]),
                capacity,
            )
            for group, count in uses.items()
        }
        try:
            return {group: future.result() for group, future in reading.items()}
        except Exception:  # such as that S3 did not answer: it may be asked again
            self.forget()
            raise

    def forget(self) -> None:
        """Everything that was read."""
        self._held.clear()
        selection_rows.cache_clear()
        _footer.cache_clear()


def read_row_group(layout: Layout, group: int) -> RowGroup:
    """ValueError where the file has other rows by now. A file that cannot be read is no error but the row group's
    `failure`; S3 that does not answer is pipeline.core.errors.S3Unavailable."""
    selection, shard = layout.selection, layout.selection.shards[layout.shard_G[group]]
    first, stop = layout.first_G[group], layout.stop_G[group]
    selected = selection_rows(selection.dataset, selection.name, shard)
    row_R = selected["row"].to_numpy()
    inside = np.flatnonzero((row_R >= first) & (row_R < stop))
    texts = selected.take(pa.array(inside))
    rows = texts.to_pylist()
    hash_R = id_hash(texts["id"])
    row_T = np.flatnonzero(~held_out(hash_R, layout.hold_out))
    try:
        pictures = _pictures(selection, shard, int(layout.group_G[group]))
    except (OSError, pa.ArrowException) as error:
        return RowGroup(rows, hash_R, row_T, None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    if pictures.num_rows != stop - first:
        raise stale(selection, shard)
    if len(inside) < pictures.num_rows:
        pictures = pictures.take(pa.array(row_R[inside] - first))
    if not pictures["id"].equals(texts["id"]):
        raise stale(selection, shard)
    return RowGroup(rows, hash_R, row_T, pictures["image"], "")


@lru_cache(maxsize=16)
def selection_rows(dataset: str, name: str, shard: str) -> pa.Table:
    """SELECTION."""
    return Store(dataset).read_table(f"selections/{name}/{shard}.parquet")


def _pictures(selection: Selection, shard: str, group: int) -> pa.Table:
    footer = _footer(selection.dataset, selection.images, shard)
    with Store(selection.dataset).open(f"{selection.images}/{shard}.parquet") as file:
        return pq.ParquetFile(file, metadata=footer).read_row_group(group, columns=["id", "image"])


@lru_cache(maxsize=64)
def _footer(dataset: str, images: str, shard: str) -> pq.FileMetaData:
    with Store(dataset).open(f"{images}/{shard}.parquet") as file:
        return pq.read_metadata(file)


# --- What is kept -----------------------------------------------------------------------------------------------------


@dataclass
class _Entry(Generic[Value]):
    value: Value
    left: int = 0  # uses until it is used up


class Cache(Generic[Value]):
    """Above `capacity` those entries go first that are used up, then the least recently used.

    That one of the two alone is not enough: with large batches some streams enter their next window between two uses of
    another's, and what has one row left would go before what has none.
    """

    def __init__(self) -> None:
        self._entries = OrderedDict[Hashable, _Entry[Value]]()
        self._lock = threading.Lock()

    def take(self, key: Hashable, make: Callable[[], Value], uses: int, total: int, capacity: int) -> Value:
        """The entry, made where it is not there. After `total` uses it is used up, until the next use."""
        with self._lock:
            entry = self._entries.pop(key, None) or _Entry(make())
            entry.left = (entry.left if entry.left > 0 else total) - uses
            while len(self._entries) >= max(1, capacity):
                del self._entries[self._first_to_go()]
            self._entries[key] = entry
        return entry.value

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def _first_to_go(self) -> Any:
        used_up = (key for key, entry in self._entries.items() if entry.left <= 0)
        return next(used_up, next(iter(self._entries)))
