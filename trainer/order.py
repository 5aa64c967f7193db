"""Which sample is number i of epoch e: a pure function of (seed, epoch, i).

A position counts samples from the start of training: position p lies in epoch p // count at place p % count. Batches
are cut from positions alone, so they do not depend on the number of workers, an epoch sees every sample exactly once,
and a checkpoint needs one integer of data state.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> Indices:
    """The order in which an epoch visits samples 0 .. count - 1."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def samples(count: int, seed: int, start: int, stop: int) -> Indices:
    """The sample indices of positions start .. stop - 1, across epoch borders."""
    assert count > 0, count
    positions = np.arange(start, stop)
    epochs, places = np.divmod(positions, count)
    return np.concatenate(
        [epoch_order(count, seed, int(e))[places[epochs == e]] for e in np.unique(epochs)] or [positions]
    )


def rank_positions(step: int, batch_size: int, rank: int, workers: int) -> range:
    """The positions that one of `workers` ranks takes in optimizer step `step` (from 0)."""
    assert batch_size % workers == 0, (batch_size, workers)
    share = batch_size // workers
    first = step * batch_size + rank * share
    return range(first, first + share)
