"""Actors that work on shards: each shard's failure is its own, whatever becomes of its process."""

import os
from collections.abc import Callable

import pytest

from pipeline.dataflow import Pool, map_shards_with, plan_pool
from pipeline.jobs import UsageError


# The works are made inside functions: what belongs to a test module cannot be imported by Ray's processes.
def odd_ones_fail() -> Callable[[int], None]:
    def work(number: int) -> None:
        if number == 3:
            os._exit(1)
        if number == 5:
            raise ValueError("five is odd\nvery odd")

    return work


def test_a_shard_that_raises_or_kills_its_process_costs_no_other_shard(ray_address: str) -> None:
    shards = {str(number): number for number in range(8)}
    failures = map_shards_with(odd_ones_fail, shards, lambda _: 1, "test", Pool(2, 1, 0))
    assert failures.keys() == {"3", "5"}
    assert failures["5"] == "ValueError: five is odd"
    assert "its process ended 2 times" in failures["3"]


def test_work_that_cannot_be_made_fails_every_shard_with_the_reason(ray_address: str) -> None:
    def make() -> Callable[[int], None]:
        raise FileNotFoundError("no model on this node")

    failures = map_shards_with(make, {"a": 1, "b": 2}, lambda _: 1, "test", Pool(1, 1, 0))
    assert failures == dict.fromkeys("ab", "FileNotFoundError: no model on this node")


def test_work_is_made_once_in_an_actor(ray_address: str) -> None:
    def make() -> Callable[[int], None]:
        made = []

        def work(number: int) -> None:
            made.append(number)
            if number == 3:
                raise ValueError(f"{made}")

        return work

    failures = map_shards_with(make, {str(n): n for n in range(4)}, lambda _: 1, "test", Pool(1, 1, 0))
    assert failures == {"3": "ValueError: [0, 1, 2, 3]"}


def test_a_pool_has_an_actor_for_each_cpu_and_none_without_a_shard_and_more_are_refused(ray_address: str) -> None:
    assert plan_pool(None, 99, use_gpus=False) == Pool(3, 1, 0)
    assert plan_pool(None, 2, use_gpus=False) == Pool(2, 1, 0)
    assert plan_pool(1, 99, use_gpus=True) == Pool(1, 1, 0)
    with pytest.raises(UsageError, match=r"4 actors do not fit.* Ray has 3"):
        plan_pool(4, 99, use_gpus=False)
