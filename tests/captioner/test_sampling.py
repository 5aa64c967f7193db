"""Sampling parameters: retries never get hotter, and each image and attempt has its own seed in every process."""

import hashlib
from typing import Any

import pytest

from captioner.sampling import Sampling, seed_for


def test_each_image_and_attempt_has_its_own_parameters() -> None:
    sampling = Sampling(temperatures=(0.6, 0.2), top_p=0.7, max_tokens=99)
    first, second = (sampling.params("danbooru:1", attempt) for attempt in (0, 1))
    assert (first.temperature, second.temperature) == (0.6, 0.2)
    assert (first.top_p, first.max_tokens) == (0.7, 99)
    assert len({first.seed, second.seed, sampling.params("danbooru:2", 0).seed}) == 3
    assert sampling.params("danbooru:1", 0, previous_attempts=1).seed == second.seed


def test_seeds_are_32_bits_and_differ_by_image_and_attempt() -> None:
    seeds = {seed_for(f"danbooru:{n}", attempt) for n in range(1000) for attempt in range(3)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_seeds_are_the_same_in_every_process() -> None:
    expected = hashlib.blake2b(b"1:pixiv:7_p0", digest_size=4).hexdigest()
    assert seed_for("pixiv:7_p0", 1) == int(expected, 16) == 1625830914


def test_by_default_there_are_two_retries_that_never_get_hotter() -> None:
    assert Sampling() == Sampling(temperatures=(0.5, 0.3, 0.2), top_p=0.9, max_tokens=256)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperatures": ()},
        {"temperatures": (0.6, 0.5, 0.4, 0.3)},
        {"temperatures": (0.2, 0.4)},
        {"temperatures": (2.5,)},
        {"max_tokens": 0},
    ],
)
def test_invalid_sampling_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
