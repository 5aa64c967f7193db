"""Blocks of samples: what a read task of the sample stream yields, and the batches put together from them.

A block is a table with a row per sample. Imports no Ray, torch or transformers, because every read task imports it.

Axes: B samples of a micro batch, P samples of a block.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trainer.samples.data import Batch, TrainingData, load_batch
from trainer.samples.order import micro_batches

_LOWEST_PRIORITY = 19


@dataclass(frozen=True)
class Share:
    """The micro batches of one training worker, numbered from 0, and the readers that share the work.

    The streams of the data order are dealt to the readers in turns, so that each reads its own row groups and all of
    them have something to read for consecutive micro batches. Where the number of workers does not divide the streams,
    two workers read the row groups of the stream at their border.
    """

    first_position: int  # a multiple of batch_size
    batch_size: int  # summed over the workers; a multiple of workers * micro_batch
    streams: int  # of the data order; divides the batch size
    rank: int
    workers: int
    micro_batch: int
    most_readers: int

    @cached_property
    def readers(self) -> int:
        """At most one per stream, and so many that each has an equal part of every micro batch, if possible."""
        spanned = max(1, self.micro_batch // self._stream_rows)  # streams of a micro batch
        most = max(1, min(self.most_readers, len(self._own_streams)))
        return next(count for count in range(most, 0, -1) if count >= spanned or spanned % count == 0)

    @property
    def streams_per_reader(self) -> int:
        return -(-len(self._own_streams) // self.readers)

    @property
    def least_part(self) -> int:
        """Samples of a reader's part of a micro batch where the parts are equal."""
        spanned = max(1, self.micro_batch // self._stream_rows)
        return max(1, self.micro_batch // min(spanned, self.readers))

    def positions(self, number: int) -> range:
        """The positions of micro batch `number`."""
        step, within = divmod(number, self.batch_size // (self.workers * self.micro_batch))
        batch = self.first_position // self.batch_size + step
        return micro_batches(batch, self.batch_size, self.rank, self.workers, self.micro_batch)[within]

    def part(self, number: int, reader: int) -> NDArray[np.int64]:
        """The positions of micro batch `number` that `reader` reads; may be empty."""
        position_B = np.array(self.positions(number), np.int64)
        stream_B = position_B % self.batch_size // self._stream_rows
        part_P: NDArray[np.int64] = position_B[stream_B % self.readers == reader]
        return part_P

    @property
    def _stream_rows(self) -> int:
        return self.batch_size // self.streams

    @property
    def _own_streams(self) -> range:
        share = self.batch_size // self.workers
        return range(self.rank * share // self._stream_rows, -(-(self.rank + 1) * share // self._stream_rows))


def read_blocks(
    load: Callable[[], TrainingData], share: Share, reader: int, numbers: range, *, low_priority: bool
) -> Iterator[pa.Table]:
    """A reader's parts of the micro batches `numbers`, a block each.

    With `low_priority`, for training on the same CPUs, the process runs at niceness 19: a training thread that waits
    for a decoder delays all others, while the readers are a few batches ahead. (SCHED_IDLE starves beside a busy
    process.)
    """
    if low_priority:
        os.setpriority(os.PRIO_PROCESS, 0, _LOWEST_PRIORITY)
    data = load()
    for number in numbers:
        position_P = share.part(number, reader)
        if len(position_P):
            yield to_block(load_batch(data, position_P), position_P)


def to_block(batch: Batch, position_P: NDArray[np.int64]) -> pa.Table:
    """The samples with their positions. The pixels are not copied.

    Replaced pictures stand in the first rows, whichever samples replaced them.
    """
    count = len(position_P)
    names, reasons = zip(*batch.replaced, strict=True) if batch.replaced else ((), ())
    missing = [None] * (count - len(names))
    return pa.table(
        {
            "position": position_P,
            "id": pa.array(batch.ids, pa.string()),
            "pixels": _rows(batch.pixels_BHW3),
            "frame": _rows(batch.frame_B4),
            "text": pa.array(batch.texts, pa.string()),
            "key": batch.keys_B,
            "replaced": pa.array([*names, *missing], pa.string()),
            "reason": pa.array([*reasons, *missing], pa.string()),
        }
    )


def _rows(array: NDArray[np.generic]) -> pa.Array:
    """A contiguous array as a column with the bytes of each row."""
    size = array.nbytes // len(array)
    return pa.Array.from_buffers(pa.binary(size), len(array), [None, pa.py_buffer(array)])


@dataclass
class _Collected:
    """A micro batch of which some samples may be missing."""

    pixels_BHW3: NDArray[np.uint8]
    frame_B4: NDArray[np.float32]
    keys_B: NDArray[np.int64]
    present_B: NDArray[np.bool_]
    ids: list[str]
    texts: list[str]
    replaced: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def empty(cls, count: int, side: int) -> "_Collected":
        return cls(
            np.empty((count, side, side, 3), np.uint8), np.empty((count, 4), np.float32), np.empty(count, np.int64),
            np.zeros(count, np.bool_), [""] * count, [""] * count,
        )  # fmt: skip

    def add(self, place_P: NDArray[np.int64], block: pa.Table) -> None:
        """Samples for these places of the batch. A sample that is present already is the same one again."""
        self.pixels_BHW3[place_P] = _values(block, "pixels", self.pixels_BHW3)
        self.frame_B4[place_P] = _values(block, "frame", self.frame_B4)
        self.keys_B[place_P] = block["key"].to_numpy()
        for place, name, text in zip(place_P.tolist(), block["id"].to_pylist(), block["text"].to_pylist(), strict=True):
            self.ids[place], self.texts[place] = name, text
        if block["replaced"].null_count < len(block):
            pairs = zip(block["replaced"].to_pylist(), block["reason"].to_pylist(), strict=True)
            self.replaced.extend((name, why) for name, why in pairs if name is not None)
        self.present_B[place_P] = True

    def batch(self) -> Batch:
        return Batch(self.ids, self.pixels_BHW3, self.frame_B4, self.texts, self.keys_B, self.replaced)


def _values(block: pa.Table, name: str, like: NDArray[np.generic]) -> NDArray[np.generic]:
    """A column of bytes as an array with the row shape and type of `like`."""
    column = block[name].combine_chunks()
    [chunk] = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    row = like[0]
    flat = np.frombuffer(chunk.buffers()[1], like.dtype, len(chunk) * row.size, chunk.offset * row.nbytes)
    return flat.reshape(len(chunk), *row.shape)


class Assembly:
    """Puts blocks, which come in any order, together to the micro batches of a share, in order."""

    def __init__(self, share: Share, side: int, number: int = 0) -> None:
        """`side`: of a crop in pixels. `number`: of the first micro batch that is wanted."""
        self.number = number  # of the next micro batch
        self._share, self._side = share, side
        self._collected: dict[int, _Collected] = {}  # by the first position of their micro batch

    def add(self, block: pa.Table) -> Iterator[Batch]:
        """Yields the micro batches that this block completes. Samples of earlier micro batches are dropped."""
        micro = self._share.micro_batch
        position_P = block["position"].to_numpy()
        first_P = position_P - position_P % micro  # a share begins at a multiple of its micro batches' size
        for first in np.unique(first_P).tolist():
            if first < self._share.positions(self.number).start:
                continue
            place_P = np.flatnonzero(first_P == first)
            start, stop = int(place_P[0]), int(place_P[-1]) + 1
            rows = block.slice(start, stop - start) if stop - start == len(place_P) else block.take(place_P)
            collected = self._collected.setdefault(first, _Collected.empty(micro, self._side))
            collected.add(position_P[place_P] - first, rows)
        while (first := self._share.positions(self.number).start) in self._collected:
            if not self._collected[first].present_B.all():
                return
            self.number += 1
            yield self._collected.pop(first).batch()
