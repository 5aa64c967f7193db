"""The data order: each sample once per epoch, independent of the number of workers, each row group read once."""

import itertools
import pickle
from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest

from trainer.samples.order import Order, effective_streams, micro_batches
from trainer.samples.row_groups import Cache

# Samples of each row group, rows of a batch, streams, row groups of a window.
SHAPES = [
    ([1], 1, 1, 1),
    ([7], 2, 2, 1),  # one row group
    ([100], 16, 16, 4),
    ([3], 8, 4, 2),  # fewer samples than a batch
    ([0, 3, 0, 0, 5, 0], 4, 2, 2),  # empty row groups
    ([5, 1, 9, 2, 2, 30, 4, 8], 8, 4, 3),
    ([13] * 17, 12, 4, 2),
    (list(range(40)), 32, 16, 4),
    (list(range(1, 20)), 48, 16, 100),  # a window of all row groups
    ([64] * 64, 64, 16, 4),  # everything a multiple of everything
]


def order(counts: Sequence[int], batch_size: int, streams: int, window: int, seed: int = 3, **more: int) -> Order:
    return Order(counts, batch_size, streams, window, seed, **more)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_sample_is_seen_exactly_once_per_epoch(shape: tuple[list[int], int, int, int]) -> None:
    made = order(*shape)
    for epoch in range(5):
        seen = made.samples(range(epoch * made.count, (epoch + 1) * made.count))
        assert sorted(seen) == list(range(sum(shape[0])))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_position_has_the_same_sample_whatever_other_positions_are_requested(
    shape: tuple[list[int], int, int, int],
) -> None:
    made = order(*shape)
    positions = np.random.default_rng(0).permutation(3 * made.count)
    samples = made.samples(positions)
    cut = len(positions) // 3
    np.testing.assert_array_equal(samples[:cut], order(*shape).samples(positions[:cut]))
    np.testing.assert_array_equal(samples[cut:], pickle.loads(pickle.dumps(made)).samples(positions[cut:]))
    assert [int(made.samples([p])[0]) for p in positions[:20]] == samples[:20].tolist()


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_workers(workers: int) -> None:
    made = order(list(range(40)), 32, 16, 4)
    for step in (0, 5, 24, 25, 70):
        parts = [p for rank in range(workers) for p in micro_batches(step, 32, rank, workers, micro=4)]
        assert [position for part in parts for position in part] == list(range(step * 32, (step + 1) * 32))
        samples = np.concatenate([made.samples(part) for part in parts])
        np.testing.assert_array_equal(samples, made.samples(range(step * 32, (step + 1) * 32)))


def test_a_rank_has_the_same_slots_of_every_batch() -> None:
    assert [micro_batches(0, 12, rank, 3, micro=4) for rank in range(3)] == [[range(4)], [range(4, 8)], [range(8, 12)]]
    assert micro_batches(2, 12, rank=1, workers=3, micro=2) == [range(28, 30), range(30, 32)]


def test_the_number_of_streams_divides_the_batch() -> None:
    assert [effective_streams(batch, 16) for batch in (2048, 32, 24, 2, 1, 7)] == [16, 16, 8, 2, 1, 1]


def test_streams_share_only_the_row_groups_at_their_borders() -> None:
    """The same holds for workers, which read whole streams: slot j belongs to stream j // rows per stream."""
    counts = [20] * 300
    group_of = np.repeat(np.arange(300), counts)
    made = order(counts, 32, 16, 4)
    for epoch in range(3):
        first = -(-epoch * made.count // 32) * 32  # of the first batch entirely inside the epoch
        batches = ((epoch + 1) * made.count - first) // 32
        sample_BS = made.samples(range(first, first + batches * 32)).reshape(batches, 16, 2)
        streams_of_group = Counter(
            group for stream in range(16) for group in np.unique(group_of[sample_BS[:, stream]]).tolist()
        )
        assert sum(count - 1 for count in streams_of_group.values()) <= 15, "at most one at each border between streams"


def test_a_stream_stays_within_its_window_of_row_groups() -> None:
    counts, window = [25] * 400, 4
    group_of = np.repeat(np.arange(400), counts)
    made = order(counts, 16, 16, window)
    stream = group_of[made.samples(range(5, made.count // 16 * 16, 16))]
    for rows in np.lib.stride_tricks.sliding_window_view(stream, window * 25):
        assert len(set(rows.tolist())) <= 2 * window, "the windows on both sides of a border"


def _reads(made: Order, counts: np.ndarray, rank: int, workers: int, steps: range) -> int:
    """Row groups read by a worker that caches (window + 1) for each of its streams."""
    group_of = np.repeat(np.arange(len(counts)), counts)
    capacity = made.streams // workers * (made.window + 1)
    held, reads = Cache[None](), list[int]()
    for step in steps:
        [positions] = micro_batches(step, made.batch_size, rank, workers, made.batch_size // workers)
        for group, uses in Counter(group_of[made.samples(positions)].tolist()).items():
            held.take(group, partial(reads.append, group), uses, int(counts[group]), capacity)
    return len(reads)


_RANDOM = np.random.default_rng(0)
DATASETS = [
    ("pictures of many sizes, some unselected", _RANDOM.integers(0, 90, 1500), 64),
    ("many rows of each stream in a batch", _RANDOM.integers(30, 120, 1200), 1024),
    ("row groups of one size, a power of 2, like all other numbers", np.full(1024, 64), 64),
    ("large row groups of small pictures", _RANDOM.integers(300, 600, 500), 256),
]


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("dataset", DATASETS, ids=lambda dataset: dataset[0])
def test_each_row_group_is_read_about_once_per_epoch(dataset: tuple[str, np.ndarray, int], workers: int) -> None:
    _, counts, batch_size = dataset
    made = order(counts, batch_size, 16, 4)
    second = range(made.count // batch_size, 2 * made.count // batch_size)  # begins and ends inside a batch
    reads = sum(_reads(made, counts, rank, workers, second) for rank in range(workers))
    assert reads <= 1.1 * np.count_nonzero(counts)


def test_a_batch_mixes_many_row_groups() -> None:
    counts = [50] * 400
    group_of = np.repeat(np.arange(400), counts)
    made = order(counts, 64, 16, 4)
    group_PB = group_of[made.samples(range(made.count // 64 * 64))].reshape(-1, 64)
    mixed = [len(set(batch.tolist())) for batch in group_PB]
    # 4 rows of each of 16 streams from 4 row groups: 16 * 4 * (1 - (3/4)^4) = 43.75 different ones are expected.
    assert 42 < np.mean(mixed) < 45
    assert min(mixed) >= 30


@pytest.mark.parametrize("counts", [[50] * 100, [5000]], ids=["many row groups", "one row group"])
def test_epochs_and_seeds_give_different_orders(counts: list[int]) -> None:
    made, other = order(counts, 50, 10, 4), order(counts, 50, 10, 4, seed=4)
    epochs = [made.samples(range(epoch * 5000, (epoch + 1) * 5000)) for epoch in range(3)]
    for one, two in itertools.combinations([*epochs, other.samples(range(5000))], 2):
        assert np.mean(one == two) < 0.01
        # The same samples rarely share a batch again: 1% of 100 x 50 x 49 pairs would by chance.
        batch_of = np.argsort(one) // 50, np.argsort(two) // 50
        pairs = Counter(zip(*(batch.tolist() for batch in batch_of), strict=True))
        again = sum(count * (count - 1) for count in pairs.values()) / (5000 * 49)
        assert again < 0.1


def test_row_groups_are_read_in_another_order_in_each_epoch() -> None:
    of_one_stream = order([16] * 12, batch_size=8, streams=1, window=1)
    sequences = [of_one_stream.samples(range(192 * epoch, 192 * (epoch + 1))) // 16 for epoch in (0, 1)]
    first, second = (list(dict.fromkeys(groups.tolist())) for groups in sequences)
    assert sorted(first) == sorted(second)
    assert first != second


def test_epoch_numbers_continue_after_a_change_of_the_selection() -> None:
    made, later = order([30] * 9, 16, 4, 2), order([30] * 9, 16, 4, 2, first_epoch=2)
    epoch, place = later.epochs([0, 269, 270])
    assert epoch.tolist() == [2, 2, 3]
    assert place.tolist() == [0, 269, 0]
    first = later.samples(range(270))
    assert sorted(first) == list(range(270))
    assert not np.array_equal(first, made.samples(range(270))), "another epoch has another order"


def test_ten_million_samples_need_no_list_of_them() -> None:
    """At a late position across the border of an epoch, where only windows are permuted."""
    counts = np.random.default_rng(0).integers(100, 401, 40_000)
    made = order(counts, 2048, 16, 4)
    border = 40 * made.count
    samples = made.samples(range(border - 1000, border + 1048))
    assert len(set(samples[:1000].tolist())) == 1000
    assert len(set(samples[1000:].tolist())) == 1048
    assert 0 <= samples.min() < samples.max() < made.count
    assert len(pickle.dumps(made)) < 1_000_000
