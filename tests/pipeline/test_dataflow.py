"""A failure costs its own shard and is told, whatever becomes of its process; all other shards are done."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.dataflow import Pool, map_shards, map_shards_with, plan_pool
from pipeline.jobs import UsageError


# The works are made inside functions: what belongs to a test module cannot be imported by Ray's processes.
def _work(folder: Path) -> Callable[[str], None]:
    def work(shard: str) -> None:
        tries = len(list(folder.glob(f"{shard}.*")))
        (folder / f"{shard}.{tries}").touch()
        if shard == "raises":
            raise ValueError("a page is spoilt\nand more lines")
        if shard == "dies" or (shard == "dies once" and not tries):
            os._exit(1)

    return work


@pytest.mark.usefixtures("ray_address")
def test_a_shard_that_fails_or_kills_its_process_is_named_and_all_others_are_done(tmp_path: Path) -> None:
    shards = {name: name for name in ("good", "raises", "dies once", "dies", "good too")}
    failures = map_shards(shards, _work(tmp_path), lambda shard: 1, "test")
    assert failures.keys() == {"raises", "dies"}
    assert failures["raises"] == "ValueError: a page is spoilt"
    assert "its process died" in failures["dies"]
    tries = {name: len(list(tmp_path.glob(f"{name}.*"))) for name in shards}
    assert tries == {"good": 1, "raises": 1, "dies once": 2, "dies": 3, "good too": 1}


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
    assert "its process ended 3 times" in failures["3"]


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
