"""Which sample is at which position of training: canonical streams, a pure function of (seed, epoch, position).

Two wishes pull against each other: global batches must not depend on the number of workers, and each row group should
be read about once an epoch, by one worker. So an epoch's row groups, permuted, are dealt to a fixed number of streams
(as in MosaicML Streaming); every stream gives the same number of rows to every batch, and a worker takes whole streams.

Positions count samples from the start of training. Batch b of B samples begins at position b * B; an epoch begins
wherever the one before it ended, perhaps inside a batch. What of an epoch does not fill whole batches is its pool:
dealt row by row, at its beginning to the rest of a batch, at its end to the first part of one.

    epoch:   | pool | batch | batch | ... | batch | pool |
    batch:   | stream 0 | stream 1 | ... | stream C-1 |       slots; worker 0 of 2 has the first half

Axes: P positions, G row groups, S row groups with samples in the order of an epoch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

# What a random permutation is of. Never 0: numpy seeds [s, e] and [s, e, 0] give the same numbers.
_OF_GROUPS, _OF_ROWS, _OF_WINDOW = 1, 2, 3


def streams_of(batch_size: int, streams: int) -> int:
    """The most streams, of `streams` at most, that both give equal shares to a batch and are dealt equally to whatever
    number of workers divides it."""
    return math.gcd(streams, batch_size)


@dataclass(frozen=True, eq=False)
class Order:
    """Samples are numbered row group by row group: the first row group has 0 to counts_G[0] - 1.

    Nothing is planned ahead: `samples` permutes an epoch's row groups and the rows of the windows that it is asked for.
    """

    counts_G: Sequence[int] | NDArray[np.integer[Any]]  # samples of each row group; may be 0
    batch_size: int  # samples of all workers together
    streams: int  # divides the batch size; a multiple of every number of workers
    window: int  # row groups among whose rows a stream is shuffled: what must be held in memory for it
    seed: int
    first_epoch: int = 0  # the number of the epoch at position 0: that of a run that goes on with other samples

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts_G", np.asarray(self.counts_G, np.int64))
        assert self.count > 0, "no samples"
        assert self.batch_size >= 1, self.batch_size
        assert self.streams >= 1, self.streams
        assert self.batch_size % self.streams == 0, (self.batch_size, self.streams)
        assert self.window >= 1, self.window

    @property
    def count(self) -> int:
        """Samples of an epoch."""
        return int(np.sum(self.counts_G))

    def epochs(self, positions: Sequence[int] | Indices) -> tuple[Indices, Indices]:
        """The number of each position's epoch, and its place in that epoch."""
        epoch_P, place_P = np.divmod(np.asarray(positions, np.int64), self.count)
        return epoch_P + self.first_epoch, place_P

    def samples(self, positions: Sequence[int] | Indices) -> Indices:
        """sample_P: the samples at these positions, which may lie in several epochs."""
        epoch_P, place_P = self.epochs(positions)
        sample_P = np.empty_like(place_P)
        for epoch in np.unique(epoch_P):
            here = epoch_P == epoch
            sample_P[here] = _samples(self, int(epoch), place_P[here])
        return sample_P


def rank_slots(batch_size: int, rank: int, workers: int) -> range:
    """The slots of a batch, from 0, that one of `workers` ranks takes."""
    assert batch_size % workers == 0, (batch_size, workers)
    share = batch_size // workers
    return range(rank * share, (rank + 1) * share)


def micro_batches(step: int, batch_size: int, rank: int, workers: int, micro: int) -> list[range]:
    """The positions that a rank takes in optimizer step `step` (from 0), `micro` at a time."""
    slots = rank_slots(batch_size, rank, workers)
    assert len(slots) % micro == 0, (len(slots), micro)
    first = step * batch_size + slots.start
    return [range(first + at, first + at + micro) for at in range(0, len(slots), micro)]


# --- One epoch --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sequence:
    """An epoch's row groups one after the other, those without samples left out."""

    group_S: Indices
    end_S: Indices  # samples of the sequence up to the end of each
    first_S: Indices  # the number of each one's first sample


# Keyed by the object itself: comparing the counts of 40,000 row groups would cost more than planning them.
@lru_cache(maxsize=4)
def _sequence(order: Order, epoch: int) -> _Sequence:
    count_G = np.asarray(order.counts_G)
    group_S = np.random.default_rng([order.seed, epoch, _OF_GROUPS]).permutation(np.flatnonzero(count_G))
    return _Sequence(group_S, np.cumsum(count_G[group_S]), (np.cumsum(count_G) - count_G)[group_S])


def _samples(order: Order, epoch: int, place_P: Indices) -> Indices:
    """The samples at these places of an epoch."""
    end_S = _sequence(order, epoch).end_S
    count, batch, share = order.count, order.batch_size, order.batch_size // order.streams
    head = min(count, -(epoch - order.first_epoch) * count % batch)  # the rest of a batch that the last epoch began
    steps = (count - head) // batch
    length = steps * share  # of each stream
    in_streams, dealt = order.streams * length, place_P - head

    # Where in the sequence each place lies, before shuffling, and the part [start, stop) of it that its shuffle keeps.
    streamed_P = (dealt >= 0) & (dealt < in_streams)
    step_P, slot_P = np.divmod(dealt, batch)
    stream_P = slot_P // share
    at_P = np.where(streamed_P, stream_P * length + step_P * share + slot_P % share, place_P)
    at_P = np.where(dealt < 0, in_streams + place_P, at_P)
    start_P = np.where(streamed_P, stream_P * length, in_streams)
    stop_P = np.where(streamed_P, start_P + length, count)

    # The pool stays in the order of its row groups: then each worker's slots of it lie in few of them.
    window_P = np.where(streamed_P, order.window, 1)
    first_P = np.searchsorted(end_S, at_P, side="right") // window_P * window_P
    last_P = np.minimum(first_P + window_P, len(end_S)) - 1
    start_P = np.maximum(start_P, np.where(first_P > 0, end_S[first_P - 1], 0))
    stop_P = np.minimum(stop_P, end_S[last_P])

    sample_P = np.empty_like(place_P)
    for start in np.unique(start_P):
        here = np.flatnonzero(start_P == start)
        shuffled = _window(order, epoch, int(start), int(stop_P[here[0]]))
        sample_P[here] = shuffled[at_P[here] - start]
    return sample_P


@lru_cache(maxsize=512)
def _window(order: Order, epoch: int, start: int, stop: int) -> Indices:
    """The samples from `start` to `stop` of an epoch's sequence, shuffled.

    The rows of a row group are permuted first: or a row group that is cut would always be cut at the same row.
    """
    sequence = _sequence(order, epoch)
    first = int(np.searchsorted(sequence.end_S, start, side="right"))
    last = int(np.searchsorted(sequence.end_S, stop, side="left"))
    begin_S = np.concatenate([[0], sequence.end_S])
    rows = [
        sequence.first_S[at]
        + np.random.default_rng([order.seed, epoch, _OF_ROWS, int(sequence.group_S[at])]).permutation(
            begin_S[at + 1] - begin_S[at]
        )
        for at in range(first, last + 1)
    ]
    samples = np.concatenate(rows)[start - begin_S[first] : stop - begin_S[first]]
    return np.random.default_rng([order.seed, epoch, _OF_WINDOW, start]).permutation(samples)
