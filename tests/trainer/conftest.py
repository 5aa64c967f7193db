"""One small dataset and one undisturbed run for all tests of training jobs."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

RunJob = Callable[..., CompletedProcess[str]]
StartJob = Callable[..., "subprocess.Popen[str]"]

STEPS = 12
# Every step is logged and every fourth one saved; one evaluation, at the end.
SETTINGS = ("--steps", STEPS, "--set", "log_every=1", "--set", "checkpoint_every=4", "--set", f"evaluate_every={STEPS}")


def training(dataset: Path, run: Path, *more: object) -> tuple[object, ...]:
    """The command that `run_job` and `start_job` take; `more` stands in for two workers."""
    start = ("trainer/run.py", "--stage", "demo", "--dataset", dataset, "--run", run, "--audit", run / "audit")
    return (*start, *SETTINGS, *(more or ("--workers", 2)))


@pytest.fixture(scope="session")
def dataset(run_job: RunJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn, and curated for the demo stage."""
    folder = tmp_path_factory.mktemp("dataset")
    for job in (
        ("pipeline/sample_data.py", "--out", folder / "raw", "--images", 200),
        ("pipeline/ingest.py", "--raw", folder / "raw", "--dataset", folder / "dataset"),
        ("pipeline/caption.py", "--dataset", folder / "dataset"),
        ("pipeline/curate.py", "--dataset", folder / "dataset"),
    ):
        done = run_job(*job)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder / "dataset"


@pytest.fixture(scope="session")
def whole(run_job: RunJob, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers, which talk over gloo, that nothing happens to."""
    run = tmp_path_factory.mktemp("runs") / "two workers"
    done = run_job(*training(dataset, run))
    assert done.returncode == 0, done.stderr[-2000:]
    return run
