"""Benchmarks run rarely and by hand. These tests check that they still run and that the data they generate is valid."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_benchmark(name: str, *arguments: str, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, ROOT / "tests" / "bench" / f"{name}.py", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def test_the_report_benchmark_generates_a_dataset_that_the_report_job_reads() -> None:
    done = run_benchmark("report", "--rows", "2000")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| report: 2,000 rows |" in done.stdout


def test_a_partial_run_cannot_overwrite_the_whole_table() -> None:
    done = run_benchmark("all", "--only", "dedup", "--out", str(ROOT / "tests" / "bench" / "RESULTS.md"))
    assert done.returncode == 2
    assert "--only" in done.stderr


@pytest.mark.cluster
def test_jobs_with_a_killed_process_write_what_undisturbed_ones_write() -> None:
    """Seed 636 kills the raylet of a node and an actor, each during another job."""
    jobs = ("--jobs", "caption", "score")
    done = run_benchmark("chaos", "--kills", "2", "--seed", "636", "--images", "120", *jobs, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    killed = [line.split()[1:3] for line in done.stdout.splitlines() if line.endswith("identical")]
    assert killed == [["caption", "raylet"], ["score", "actor"]]
