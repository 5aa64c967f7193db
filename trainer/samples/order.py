"""The sample at each position of the training: canonical streams, a pure function of (seed, epoch, position).

The global batches must not depend on the number of workers, and each row group should be read about once per epoch, by
one worker. Therefore the permuted row groups of an epoch are dealt to a fixed number of streams, as in MosaicML
Streaming. Every stream contributes the same number of rows to each batch, and a worker reads whole streams.

Positions count samples from the start of the training. Batch b of B samples begins at position b * B. An epoch begins
where the previous one ended, possibly inside a batch. The samples of an epoch that do not fill whole batches are its
pool. They are dealt row by row: at the start to the batch that the previous epoch began, at the end to the next one.

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

# Last part of a permutation's seed. Never 0: numpy gives the same numbers for the seeds [s, e] and [s, e, 0].
_OF_GROUPS, _OF_ROWS, _OF_WINDOW = 1, 2, 3


def effective_streams(batch_size: int, streams: int) -> int:
    """The largest divisor of `streams` that also divides the batch, so that every stream gets an equal share."""
    return math.gcd(streams, batch_size)


@dataclass(frozen=True, eq=False)
class Order:
    """Samples are numbered by row group: the first row group has samples 0 to counts_G[0] - 1.

    Nothing is precomputed. `samples` permutes the row groups of an epoch and the rows of the windows it needs.
    """

    counts_G: Sequence[int] | NDArray[np.integer[Any]]  # samples of each row group; may be 0
    batch_size: int  # samples per optimizer step, summed over the workers
    streams: int  # divides the batch size; best a multiple of the number of workers
    window: int  # row groups of a stream that are shuffled together and so must fit into memory
    seed: int
    first_epoch: int = 0  # number of the epoch at position 0; above 0 after a change of the data order

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts_G", np.asarray(self.counts_G, np.int64))
        assert self.count > 0, "no samples"
        assert self.batch_size >= 1, self.batch_size
        assert self.streams >= 1, self.streams
        assert self.batch_size % self.streams == 0, (self.batch_size, self.streams)
        assert self.window >= 1, self.window

    @property
    def count(self) -> int:
        """Samples per epoch."""
        return int(np.sum(self.counts_G))

    def epochs(self, positions: Sequence[int] | Indices) -> tuple[Indices, Indices]:
        """The epoch number of each position, and its place in that epoch."""
        epoch_P, place_P = np.divmod(np.asarray(positions, np.int64), self.count)
        return epoch_P + self.first_epoch, place_P

    def samples(self, positions: Sequence[int] | Indices) -> Indices:
        """sample_P: the sample at each position. Positions may lie in several epochs."""
        epoch_P, place_P = self.epochs(positions)
        sample_P = np.empty_like(place_P)
        for epoch in np.unique(epoch_P):
            here = epoch_P == epoch
            sample_P[here] = _samples(self, int(epoch), place_P[here])
        return sample_P


def micro_batches(step: int, batch_size: int, rank: int, workers: int, micro: int) -> list[range]:
    """The positions of a rank's share of optimizer step `step` (from 0), split into micro batches of size `micro`."""
    share = batch_size // workers
    assert batch_size % workers == 0, (batch_size, workers)
    assert share % micro == 0, (share, micro)
    first = step * batch_size + rank * share
    return [range(first + at, first + at + micro) for at in range(0, share, micro)]


# --- One epoch --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sequence:
    """The permuted row groups of an epoch, without those that have no samples."""

    group_S: Indices
    end_S: Indices  # samples of the sequence up to the end of each row group
    first_S: Indices  # number of each row group's first sample


# Order is hashed by identity, because comparing the counts of 40,000 row groups would cost more than planning them.
@lru_cache(maxsize=4)
def _sequence(order: Order, epoch: int) -> _Sequence:
    count_G = np.asarray(order.counts_G)
    group_S = np.random.default_rng([order.seed, epoch, _OF_GROUPS]).permutation(np.flatnonzero(count_G))
    return _Sequence(group_S, np.cumsum(count_G[group_S]), (np.cumsum(count_G) - count_G)[group_S])


def _samples(order: Order, epoch: int, place_P: Indices) -> Indices:
    """The samples at these places of one epoch."""
    end_S = _sequence(order, epoch).end_S
    count, batch, share = order.count, order.batch_size, order.batch_size // order.streams
    head = min(count, -(epoch - order.first_epoch) * count % batch)  # completes the previous epoch's last batch
    steps = (count - head) // batch
    length = steps * share  # samples of each stream
    in_streams, dealt = order.streams * length, place_P - head

    # Position of each place in the unshuffled sequence, and the part [start, stop) that its shuffle stays within.
    streamed_P = (dealt >= 0) & (dealt < in_streams)
    step_P, slot_P = np.divmod(dealt, batch)
    stream_P = slot_P // share
    at_P = np.where(streamed_P, stream_P * length + step_P * share + slot_P % share, place_P)
    at_P = np.where(dealt < 0, in_streams + place_P, at_P)
    start_P = np.where(streamed_P, stream_P * length, in_streams)
    stop_P = np.where(streamed_P, start_P + length, count)

    # The pool keeps the order of its row groups, so that each worker's slots lie in few of them.
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

    The rows of each row group are permuted first, so that a row group split between windows is split differently in
    every epoch.
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
