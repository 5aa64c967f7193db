"""The order of samples is a function of (seed, epoch, position) and of nothing else."""

import numpy as np
import pytest

from trainer.order import rank_positions, samples


@pytest.mark.parametrize("count", [1, 7, 100])
def test_every_sample_is_seen_exactly_once_an_epoch(count: int) -> None:
    for epoch in range(3):
        seen = samples(count, seed=0, start=epoch * count, stop=(epoch + 1) * count)
        assert sorted(seen) == list(range(count))


def test_a_range_that_crosses_epochs_is_its_two_parts() -> None:
    whole = samples(10, seed=3, start=5, stop=27)
    parts = [samples(10, 3, 5, 10), samples(10, 3, 10, 20), samples(10, 3, 20, 27)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_epochs_and_seeds_differ() -> None:
    first = samples(100, seed=0, start=0, stop=100)
    assert not np.array_equal(first, samples(100, seed=0, start=100, stop=200))
    assert not np.array_equal(first, samples(100, seed=1, start=0, stop=100))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_workers(workers: int) -> None:
    shares = [rank_positions(5, 8, rank, workers) for rank in range(workers)]
    assert [position for share in shares for position in share] == list(range(40, 48))
