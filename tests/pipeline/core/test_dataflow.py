"""A failure is reported for its own shard, even if its process dies; all other shards are done."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.dataflow import map_shards, run_task
from pipeline.core.errors import JobFailed, UsageError


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


@pytest.mark.usefixtures("ray_address")
def test_a_task_on_all_rows_returns_its_result_and_its_errors_take_one_line(tmp_path: Path) -> None:
    def dies(*, times: int) -> Callable[[], int]:
        def work() -> int:
            tries = len(list(tmp_path.iterdir()))
            (tmp_path / str(tries)).touch()
            if tries < times:
                os._exit(1)
            return os.getpid()

        return work

    def refuses() -> None:
        raise UsageError("give another file")

    def fails() -> None:
        raise ValueError("a page is broken\nand more lines")

    assert run_task(dies(times=1), 100 << 20, "counting") != os.getpid()
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UsageError, match=r"^give another file$"):
        run_task(refuses, 0, "counting")
    with pytest.raises(JobFailed, match=r"^counting: ValueError: a page is broken$"):
        run_task(fails, 0, "counting")
    with pytest.raises(JobFailed, match=r"^counting: its process died in each of 3 attempts, perhaps out of memory"):
        run_task(dies(times=99), 0, "counting")
    with pytest.raises(UsageError, match=r"^counting needs 1000000\.0 GB .* no node .*: add a node with more memory"):
        run_task(refuses, 10**15, "counting")
