"""Two workers of a gloo group, one of which hangs: both write what they are doing."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from trainer.health import stacks
from trainer.health.stacks import STALLS, StackWriter, has_stalled, recorder_environment, request_stacks

# Rank 1 hangs after the first of two collective operations, and rank 0 waits for it in the second.
_WORKER = """
import os, sys, threading
from pathlib import Path
folder, rank, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
from trainer.health.stacks import StackWriter, recorder_environment
os.environ |= recorder_environment(folder)
import torch
from torch import distributed

def hang_in_a_reader():
    Path(folder, "ready-1").touch()
    threading.Event().wait()

distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
writer = StackWriter(folder, rank)
distributed.all_reduce(torch.ones(4))
if rank == 1:
    hang_in_a_reader()
Path(folder, "ready-0").touch()
distributed.all_reduce(torch.ones(4))
"""


@pytest.fixture(autouse=True)
def polled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_POLL_SECONDS", 0.02)


def _wait(is_true: Callable[[], object], seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.05)


def _entries(folder: Path, rank: int) -> list[dict[str, Any]]:
    """The recorded operations; none of a file that is still being written."""
    with suppress(ValueError):
        return list(json.loads((folder / f"gloo-{rank}.json").read_text())["entries"])
    return []


def test_both_ranks_write_their_stacks_and_collectives_when_one_hangs(tmp_path: Path) -> None:
    stage = tmp_path / "my run"
    old = request_stacks(str(stage))
    workers = [
        subprocess.Popen([sys.executable, "-c", _WORKER, str(stage), str(rank), str(tmp_path / "store")])
        for rank in range(2)
    ]
    try:
        _wait(lambda: all((stage / f"ready-{rank}").exists() for rank in range(2)))
        assert all(worker.poll() is None for worker in workers)
        while (folder := request_stacks(str(stage))) == old:  # the name is that of the second
            time.sleep(0.1)
        _wait(lambda: len(list(folder.glob("gloo-*"))) == 2)
        _wait(lambda: all(_entries(folder, rank) for rank in range(2)))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait(timeout=60)
    waiting, hanging = ((folder / f"rank-{rank}.txt").read_text() for rank in range(2))
    assert f"process {workers[0].pid} on {socket.gethostname()}" in waiting
    assert "all_reduce" in waiting
    assert "hang_in_a_reader" not in waiting
    assert "hang_in_a_reader" in hanging
    recorded = [_entries(folder, rank) for rank in range(2)]
    assert [len(entries) for entries in recorded] == [2, 1], "rank 1 never came to the second operation"
    assert {entry["profiling_name"] for entries in recorded for entry in entries} == {"gloo:all_reduce"}
    assert not list(old.iterdir()), "requests from before the start are not answered"


def test_a_disk_that_refuses_costs_the_stacks_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / STALLS).mkdir()
    writer = StackWriter(str(tmp_path), 3)
    try:
        (tmp_path / STALLS / "a").write_text("not a folder")
        _wait(lambda: caplog.records)
        folder = request_stacks(str(tmp_path))
        _wait(lambda: (folder / "rank-3.txt").exists())
    finally:
        writer.close()
    assert "no stacks of rank 3" in caplog.text
    assert [path.name for path in folder.iterdir()] == ["rank-3.txt"], "there is no process group"


def test_a_run_has_stalled_in_relation_to_its_own_pace() -> None:
    assert not has_stalled(599, 1), "whatever the pace, for less than ten minutes"
    assert not has_stalled(1199, 600)
    assert has_stalled(1201, 600)


def test_the_files_of_nccl_lie_in_the_run_folder() -> None:
    assert recorder_environment("/data/run/256")["TORCH_FR_DUMP_TEMP_FILE"].startswith("/data/run/256/")
