"""A failure is reported for its own shard, even if its process dies; all other shards are done."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from pipeline.core.dataflow import Pool, map_shards, map_shards_with, plan_engines, plan_pool
from pipeline.core.errors import JobStopped, UsageError
from pipeline.core.progress import Progress


# The work is made inside functions, because Ray's processes cannot import a test module.
def _work(folder: Path) -> Callable[[str], None]:
    def work(shard: str) -> None:
        tries = len(list(folder.glob(f"{shard}.*")))
        (folder / f"{shard}.{tries}").touch()
        if shard == "raises":
            raise ValueError("a page is broken\nand more lines")
        if shard == "dies" or (shard == "dies once" and not tries):
            os._exit(1)

    return work


@pytest.mark.usefixtures("ray_address")
def test_a_task_that_raises_or_kills_its_process_fails_only_its_own_shard(tmp_path: Path) -> None:
    shards = {name: name for name in ("good", "raises", "dies once", "dies", "good too")}
    failures = map_shards(shards, _work(tmp_path), lambda shard: 1, "test")
    assert failures.keys() == {"raises", "dies"}
    assert failures["raises"] == "ValueError: a page is broken"
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


def test_an_actor_that_raises_or_dies_fails_only_the_shard_it_worked_on(ray_address: str) -> None:
    shards = {str(number): number for number in range(8)}
    failures = map_shards_with(odd_ones_fail, shards, lambda _: 1, "test", Pool(2, 1, 0))
    assert failures.keys() == {"3", "5"}
    assert failures["5"] == "ValueError: five is odd"
    assert "its process ended 3 times" in failures["3"]


def test_every_shard_fails_with_the_reason_if_the_work_cannot_be_made(ray_address: str) -> None:
    def make() -> Callable[[int], None]:
        raise FileNotFoundError("no model on this node")

    failures = map_shards_with(make, {"a": 1, "b": 2}, lambda _: 1, "test", Pool(1, 1, 0))
    assert failures == dict.fromkeys("ab", "FileNotFoundError: no model on this node")


def test_work_is_made_once_per_actor(ray_address: str) -> None:
    def make() -> Callable[[int], None]:
        made = []

        def work(number: int) -> None:
            made.append(number)
            if number == 3:
                raise ValueError(f"{made}")

        return work

    failures = map_shards_with(make, {str(n): n for n in range(4)}, lambda _: 1, "test", Pool(1, 1, 0))
    assert failures == {"3": "ValueError: [0, 1, 2, 3]"}


def test_a_pool_has_one_actor_per_cpu_at_most_one_per_shard_and_refuses_more(ray_address: str) -> None:
    assert plan_pool(None, 99, use_gpus=False) == Pool(3, 1, 0)
    assert plan_pool(None, 2, use_gpus=False) == Pool(2, 1, 0)
    assert plan_pool(1, 99, use_gpus=True) == Pool(1, 1, 0)
    with pytest.raises(UsageError, match=r"4 actors do not fit.* Ray has 3"):
        plan_pool(4, 99, use_gpus=False)


def test_an_actor_with_a_gpu_also_needs_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"CPU": 2.0, "GPU": 4.0}, {"CPU": 9.0, "GPU": 1.0}, {"CPU": 8.0}]
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    assert plan_pool(None, 99, use_gpus=True) == Pool(3, 1, 1)  # more would wait for ever
    with pytest.raises(UsageError, match="each of which takes a GPU and a CPU: Ray has 3"):
        plan_pool(4, 99, use_gpus=True)


def test_engines_take_the_given_number_of_gpus_and_work_on_two_shards_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    big, small = {"CPU": 32.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in (big, small)])
    assert plan_engines(None, 1, 99, use_gpus=True) == Pool(5, 8, 1, at_once=2)
    assert plan_engines(None, 2, 99, use_gpus=True) == Pool(2, 8, 2, at_once=2)
    assert plan_engines(3, 1, 2, use_gpus=True) == Pool(2, 8, 1, at_once=2)
    assert plan_engines(None, 1, 99, use_gpus=False) == Pool(1, 8, 0, at_once=2)
    with pytest.raises(
        UsageError, match="3 engines do not fit, each of which takes 2 GPU and a CPU: Ray has room for 2;"
    ):
        plan_engines(3, 2, 99, use_gpus=True)
    with pytest.raises(UsageError, match="--tensor-parallel 8: no machine"):
        plan_engines(None, 8, 99, use_gpus=True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0, "GPU": 4.0}}])
    assert plan_engines(None, 1, 99, use_gpus=True) == Pool(2, 1, 1, at_once=2)  # more would wait for ever


def watched_work(folder: Path) -> Callable[[], Callable[[str], None]]:
    """Each shard is one row; the report counts the rows of this process."""

    def make() -> Callable[[str], None]:
        class Work:
            def __init__(self) -> None:
                self.rows = 0

            def __call__(self, shard: str) -> None:
                if shard == "stops":
                    raise JobStopped("no other shard would work")
                if shard == "dies once" and not (folder / "died").exists():
                    (folder / "died").touch()
                    os._exit(1)
                self.rows += 1

            def report(self) -> int:
                return self.rows

            def close(self) -> None:
                (folder / f"closed.{os.getpid()}").touch()

        return Work()

    return make


@pytest.mark.usefixtures("ray_address")
def test_reports_include_actors_that_were_restarted_and_work_is_closed(tmp_path: Path) -> None:
    seen: list[int] = []

    def watch(reports: list[int]) -> Progress:
        seen.append(sum(reports))
        return Progress(seen[-1], "", {"hdm_test_rows": {"done": seen[-1], "never": 0}})

    shards = {name: name for name in ("a", "b", "dies once", "c")}
    pool = Pool(1, 1, 0, at_once=2)
    assert map_shards_with(watched_work(tmp_path), shards, lambda shard: 1, "test", pool, watch) == {}
    assert 1 <= seen[-1] <= 4  # rows after a process's last report are not counted
    assert len(list(tmp_path.glob("closed.*"))) == 1


@pytest.mark.usefixtures("ray_address")
def test_job_stopped_ends_the_job_with_its_message(tmp_path: Path) -> None:
    shards = {name: name for name in ("a", "stops", "b")}
    with pytest.raises(JobStopped, match=r"^no other shard would work$"):
        map_shards_with(
            watched_work(tmp_path), shards, lambda shard: 1, "test", Pool(1, 1, 0), lambda reports: Progress(0, "", {})
        )
    assert len(list(tmp_path.glob("closed.*"))) == 1
