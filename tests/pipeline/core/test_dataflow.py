"""A failure is reported for its own shard, even if its process dies; all other shards are done."""

import errno
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.dataflow import map_shards, run_task
from pipeline.core.errors import JobFailed, JobStopped, S3Refused, ShardsFailed, UsageError


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
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/data/x"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "/data/x"),
        S3Refused("the key is wrong: set AWS_ACCESS_KEY_ID"),
        JobStopped("the engine is unusable"),
    ],
    ids=str,
)
def test_a_fault_of_the_job_stops_it_with_its_message(error: Exception) -> None:
    def work(shard: str) -> None:
        if shard == "b":
            raise error

    with pytest.raises(JobStopped, match=f"^{re.escape(str(error))}$"):
        map_shards({name: name for name in "abc"}, work, lambda shard: 1, "test")


@pytest.mark.usefixtures("ray_address")
def test_many_shards_that_fail_alike_stop_the_job() -> None:
    def work(shard: str) -> None:
        raise PermissionError(13, "Permission denied", f"/data/{shard}")

    with pytest.raises(JobStopped, match=r"^20 shards in a row failed, the last one, s\d+, with: PermissionError"):
        map_shards({f"s{number}": f"s{number}" for number in range(25)}, work, lambda shard: 1, "test")


@pytest.mark.usefixtures("ray_address")
def test_a_job_without_any_node_left_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(shard: str) -> None:
        time.sleep(10)

    monkeypatch.setattr("pipeline.core.row_pipeline._LOST_SECONDS", 1.0)
    monkeypatch.setattr("pipeline.core.row_pipeline.nodes", list)
    with pytest.raises(JobStopped, match=r"no node of the cluster has offered CPU for 1 s"):
        map_shards({"a": "a"}, work, lambda shard: 1, "test")


def test_a_message_names_five_failed_shards_and_counts_the_others() -> None:
    failures = {f"s{number:05d}": "ValueError: broken" for number in range(40_000)}
    assert str(ShardsFailed(failures)) == (
        "not done: " + "; ".join(f"s0000{number} (ValueError: broken)" for number in range(5))
        + "; and 39,995 more; all other shards are. Fix or remove these and run the same command again"
    )  # fmt: skip
    assert str(ShardsFailed({"a": "why"})).startswith("not done: a (why); all other shards are.")


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
