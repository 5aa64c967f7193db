"""Benches are run by hand and rarely: what they generate must still be what the jobs read."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def bench(name: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, ROOT / "tests" / "bench" / f"{name}.py", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_generated_dataset_has_todays_columns_and_is_told_of_by_its_rows() -> None:
    done = bench("report", "--rows", "2000")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| report of 2,000 rows |" in done.stdout


def test_the_whole_table_is_not_overwritten_by_a_part_of_it() -> None:
    done = bench("all", "--only", "dedup", "--out", str(ROOT / "tests" / "bench" / "RESULTS.md"))
    assert done.returncode == 2
    assert "--only" in done.stderr
