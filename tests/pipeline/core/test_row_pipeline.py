"""Rows stream through steps; a row that kills its process is isolated; faults of the whole job stop it."""

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from ray import cloudpickle

from pipeline.core.errors import JobStopped
from pipeline.core.progress import Progress
from pipeline.core.row_pipeline import Actors, Step, stream_rows
from pipeline.core.shard_progress import Pending
from pipeline.core.tables import DIED, REPORT, ROW, SHARD

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import a test module

SHARDS = {
    f"shard-{number}": Pending(shard=f"shard-{number}", rows=np.arange(40, dtype=np.int32)) for number in range(3)
}


def read(shard: str, wanted: NDArray[np.int32]) -> Iterator[pa.Table]:
    for start in range(0, len(wanted), 8):
        rows = wanted[start : start + 8]
        yield pa.table({ROW: rows, "value": [f"{shard} {row}" for row in rows.tolist()]})


class Recorder:
    """The last step and the commit, which write what they get into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, table: pa.Table) -> Iterator[pa.Table]:
        for row in table.to_pylist():
            with open(self.folder / row[SHARD], "a") as file:
                file.write(json.dumps([row[ROW], row["value"]]) + "\n")
        yield table.select([SHARD, ROW])

    def commit(self, shard: str) -> Counter[str]:
        (self.folder / f"{shard}.done").write_text((self.folder / shard).read_text())
        return Counter(done=40)

    def rows(self, shard: str) -> list[list[Any]]:
        return sorted(json.loads(line) for line in (self.folder / f"{shard}.done").read_text().splitlines())


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def stream(recorder: Recorder, work: Any, todo: dict[str, Pending[str]] = SHARDS, **options: Any) -> dict[str, str]:
    steps = [Step(name="work", work=work, cpus=0.5), Step(name="write", work=recorder.write, cpus=0.5)]
    return stream_rows("test", todo, read, steps, recorder.commit, **options)


def upper(table: pa.Table) -> Iterator[pa.Table]:
    yield table.set_column(
        table.column_names.index("value"), "value", [[v.upper() for v in table["value"].to_pylist()]]
    )


def test_every_row_passes_through_tasks_and_actors_once_and_each_shard_is_committed(
    ray_address: str, recorder: Recorder
) -> None:
    def make() -> Callable[[pa.Table], Iterator[pa.Table]]:
        return upper

    assert stream(recorder, Actors(make=make, most=1, calls=2)) == {}
    for shard in SHARDS:
        assert recorder.rows(shard) == [[row, f"{shard} {row}".upper()] for row in range(40)]


class Counting:
    """A meter that counts."""

    def __init__(self) -> None:
        self.reports: Counter[str] = Counter()
        self.committed: Counter[str] = Counter()

    def add(self, report: str) -> None:
        self.reports[report] += 1

    def commit(self, outcomes: Mapping[str, int]) -> None:
        self.committed += Counter(outcomes)

    def progress(self, rows: int) -> Progress:
        return Progress(rows, "line", {})


def test_tables_are_split_and_a_meter_gets_every_report_and_commit(ray_address: str, recorder: Recorder) -> None:
    def write(table: pa.Table) -> Iterator[pa.Table]:
        for written in recorder.write(table):
            reports = [f"a table of {table.num_rows}", *[None] * (table.num_rows - 1)]
            yield written.append_column(REPORT, pa.array(reports, pa.string()))

    meter = Counting()
    steps = [Step(name="write", work=write, cpus=0.5, rows=10, split=True)]
    assert stream_rows("test", SHARDS, read, steps, recorder.commit, most_reads=1, meter=meter) == {}
    assert meter.reports == {"a table of 10": 12}
    assert meter.committed == {"done": 120}
    for shard in SHARDS:
        assert recorder.rows(shard) == [[row, f"{shard} {row}"] for row in range(40)]


def test_only_pending_rows_are_read_and_a_shard_without_any_is_committed(ray_address: str, recorder: Recorder) -> None:
    (recorder.folder / "b").write_text("[0, 0]\n")
    todo = {
        "a": Pending(shard="a", rows=np.array([3, 17], np.int32)),
        "b": Pending(shard="b", rows=np.empty(0, np.int32)),
    }
    assert stream(recorder, upper, todo) == {}
    assert recorder.rows("a") == [[3, "A 3"], [17, "A 17"]]
    assert recorder.rows("b") == [[0, 0]]


def test_a_row_that_kills_its_process_is_isolated_and_marked(ray_address: str, recorder: Recorder) -> None:
    def work(table: pa.Table) -> Iterator[pa.Table]:
        values = []
        for row in table.to_pylist():
            if row["value"] == "shard-1 13" and not row[DIED]:
                os.kill(os.getpid(), signal.SIGKILL)
            values.append("died" if row[DIED] else row["value"])
        yield table.set_column(table.column_names.index("value"), "value", [values])

    assert stream(recorder, work) == {}
    for shard in SHARDS:
        died = {13: "died"} if shard == "shard-1" else {}
        assert dict(recorder.rows(shard)) == {row: f"{shard} {row}" for row in range(40)} | died


def test_an_exception_fails_its_shard_only_and_a_fault_of_the_job_stops_it(
    ray_address: str, recorder: Recorder
) -> None:
    def broken(table: pa.Table) -> Iterator[pa.Table]:
        if table[SHARD][0].as_py() == "shard-1":
            raise ValueError("a bad value\nwith details")
        yield table

    assert stream(recorder, broken) == {"shard-1": "ValueError: a bad value"}
    assert len(recorder.rows("shard-0")) == len(recorder.rows("shard-2")) == 40

    def full(table: pa.Table) -> Iterator[pa.Table]:
        raise OSError(28, "No space left on device", "/data/x")

    with pytest.raises(JobStopped, match="No space left on device: '/data/x'"):
        stream(recorder, full)


def test_many_shards_that_fail_alike_stop_the_job(ray_address: str, recorder: Recorder) -> None:
    def broken(table: pa.Table) -> Iterator[pa.Table]:
        raise PermissionError(13, "Permission denied", f"/data/{table[SHARD][0].as_py()}")

    todo = {
        f"shard-{number}": Pending(shard=f"shard-{number}", rows=np.arange(1, dtype=np.int32)) for number in range(30)
    }
    with pytest.raises(JobStopped, match=r"20 shards in a row failed, the last one, shard-\d+, with: PermissionError"):
        stream(recorder, broken, todo)


def test_many_rows_that_kill_their_worker_alone_stop_the_job_instead_of_being_blamed(
    ray_address: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.core.shard_progress._DIED_ROWS", 1)

    def broken(table: pa.Table) -> Iterator[pa.Table]:
        if table[SHARD][0].as_py() == "b" and not table[DIED][0].as_py():
            os.kill(os.getpid(), signal.SIGKILL)
        yield table

    todo = {name: Pending(shard=name, rows=np.arange(2, dtype=np.int32)) for name in "ab"}
    with pytest.raises(JobStopped, match="2 of 4 rows killed their worker even when they ran alone"):
        stream(recorder, broken, todo)
    assert not (recorder.folder / "b").exists()


def test_a_job_whose_actors_have_no_node_any_more_stops(
    ray_address: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.core.row_pipeline._LOST_SECONDS", 3.0)
    actors = Actors(make=lambda: upper, resources={"captioner": 0.01})
    with pytest.raises(JobStopped, match="no node of the cluster has offered captioner for 3 s"):
        stream(recorder, actors)
