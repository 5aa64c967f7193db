"""The random numbers of training samples, which must not depend on library versions or machines."""

import numpy as np
import pytest
import torch

from trainer.diffusion.keyed_random import Stream, keyed_bits, keyed_uniform, sample_generator, sample_key

GOLDEN = 0x9E3779B97F4A7C15


def splitmix64_finaliser(x: int) -> int:
    """The published algorithm in unbounded integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def test_keys_are_the_published_hash_chained_over_seed_epoch_position() -> None:
    key = 0
    for part in (7, 3, 123_456_789):
        key = splitmix64_finaliser((key + (part + 1) * GOLDEN) % 2**64)
    assert sample_key(7, 3, 123_456_789) % 2**64 == key


def test_an_array_of_positions_gives_the_same_keys_as_one_by_one() -> None:
    positions = np.array([[0, 1, 2], [40_000_000, 5, 2**40]])
    keyed = sample_key(7, 3, positions)
    assert keyed.dtype == np.int64
    assert keyed.tolist() == [[sample_key(7, 3, int(p)) for p in row] for row in positions]


def test_keys_differ_between_positions_epochs_and_seeds() -> None:
    positions = np.arange(50_000)
    drawn = np.concatenate([sample_key(seed, epoch, positions) for seed in (0, 1) for epoch in (0, 1)])
    assert len(np.unique(drawn)) == len(drawn)


@pytest.mark.parametrize(("seed", "epoch"), [(-1, 0), (0, -1)])
def test_a_negative_seed_or_epoch_is_refused(seed: int, epoch: int) -> None:
    with pytest.raises(ValueError, match="-1"):
        sample_key(seed, epoch, 0)


def test_uniforms_are_the_upper_bits_of_the_published_hash() -> None:
    keys = sample_key(7, 3, np.arange(5))
    by_hand = [
        [
            (splitmix64_finaliser((int(key) + splitmix64_finaliser((place + 1) * GOLDEN % 2**64)) % 2**64) >> 40)
            / 2**24
            for place in ((int(Stream.CROP) << 56) + at for at in range(4))
        ]
        for key in keys
    ]
    assert keyed_uniform(keys, 4, Stream.CROP).tolist() == by_hand


def test_torch_and_numpy_have_the_same_bits() -> None:
    keys = sample_key(7, 3, np.arange(50))
    of_numpy = keyed_bits(keys, np.arange(20), Stream.NOISE)
    assert torch.equal(keyed_bits(torch.from_numpy(keys), torch.arange(20), Stream.NOISE), torch.from_numpy(of_numpy))


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    x = keyed_uniform(sample_key(0, 0, np.arange(1_000)), 1_000, Stream.CROP)
    assert x.min() >= 0
    assert x.max() < 1
    counts, _ = np.histogram(x, 100, (0, 1))
    chi_square = ((counts - 10_000) ** 2 / 10_000).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom


def test_a_samples_numpy_generator_repeats_and_differs_by_stream_and_key() -> None:
    key = sample_key(0, 0, 0)
    drawn = {
        name: tuple(sample_generator(key, stream).random(4))
        for name, key, stream in [
            ("first", key, Stream.CROP),
            ("other stream", key, Stream.CAPTION),
            ("other key", sample_key(0, 0, 1), Stream.CROP),
        ]
    }
    assert len(set(drawn.values())) == 3
    assert tuple(sample_generator(key, Stream.CROP).random(4)) == drawn["first"]
