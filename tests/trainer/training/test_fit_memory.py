"""The choice of the micro batch, and a training whose memory really runs out.

Run as a script this file trains under a limit of its memory: test_fit_memory.py DATASET RUN.
"""

import itertools
import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.core.errors import JobFailed
from trainer.model.config import XUTConfig
from trainer.recipe.memory import Fit
from trainer.recipe.stages import STAGES
from trainer.recipe.training import Training
from trainer.runs.checkpoint import Checkpoints
from trainer.training import fit_memory
from trainer.training.fit_memory import largest_fitting

SIZES = [128, 64, 32, 16, 8, 4, 2, 1]
ROOT = Path(__file__).parents[3]


def choose(first: int, each: float, limit: float, idle: float = 10) -> tuple[int, list[int]]:
    """The choice where a sample takes `each`, memory runs out at 100, and the sizes that were tried."""
    tried = []

    def peak(size: int) -> float:
        tried.append(size)
        taken = idle + each * size
        return taken if taken <= 100 else math.inf

    return largest_fitting(SIZES, first, peak, idle, limit), tried


@pytest.mark.parametrize("first", SIZES)
@pytest.mark.parametrize("each", [0.1, 0.6, 1.4, 2.5, 5, 30, 79, 85])
def test_the_largest_size_within_the_limit_is_found_from_any_start(first: int, each: float) -> None:
    found, tried = choose(first, each, limit=90)
    assert found == max((size for size in SIZES if 10 + each * size <= 90), default=0)
    assert len(tried) == len(set(tried)), "each compiles for minutes"


def test_a_good_estimate_is_probed_once() -> None:
    assert choose(32, 2.4, limit=90) == (32, [32])


@pytest.fixture
def training(tmp_path: Path) -> Training:
    fields = dict.fromkeys(Training.__dataclass_fields__) | {
        "stage": STAGES["256"], "model": XUTConfig.base(), "workers": 4, "micro_batch": 32, "checkpointing": "none",
        "folder": str(tmp_path / "256"), "codec_factor": 8,
    }  # fmt: skip
    return Training(**fields)  # type: ignore[arg-type]


def test_a_choice_is_remembered_for_the_same_device_and_settings(training: Training) -> None:
    assert fit_memory.remembered(training, "some GPU") is None
    chosen = fit_memory.with_fit(training, Fit(16, "blocks"))
    fit_memory.record(chosen, "some GPU", "a step takes 20 of 30 GB")
    found = fit_memory.remembered(training, "some GPU")
    assert found is not None
    assert (found.micro_batch, found.checkpointing) == (16, "blocks")
    assert fit_memory.remembered(training, "a smaller GPU") is None
    elastic = fit_memory.remembered(replace(training, workers=256), "some GPU")
    assert elastic is not None
    assert elastic.micro_batch == STAGES["256"].batch_size // 256, "it fits, and is all that a worker has to do"
    (Path(training.folder) / "memory.json").write_text("{")
    assert fit_memory.remembered(training, "some GPU") is None


def test_memory_that_runs_out_halves_the_micro_batch_then_recomputes_then_fails(training: Training) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    assert fit_memory.lowered(training, error).micro_batch == 16
    assert fit_memory.lowered(replace(training, micro_batch=25), error).micro_batch == 8, "a divisor of the share"
    one = replace(training, micro_batch=1)
    assert fit_memory.lowered(one, error).checkpointing == "blocks"
    assert fit_memory.lowered(replace(one, checkpointing="blocks"), error).checkpointing == "all"
    with pytest.raises(JobFailed, match=r"one sample at a time and all blocks recomputed \(CUDA out of memory"):
        fit_memory.lowered(replace(one, checkpointing="all"), error)
    with pytest.raises(JobFailed, match="not even one sample fits into the 8 GB"):
        fit_memory.estimated(training, 8e9)


def test_errors_of_both_allocators_are_recognized_and_others_are_not() -> None:
    with pytest.raises(RuntimeError) as of_cpu:
        torch.empty(1 << 50)
    assert fit_memory.is_out_of_memory(of_cpu.value)
    assert fit_memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not fit_memory.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_training_whose_memory_runs_out_goes_on_with_a_smaller_micro_batch(dataset: Path, tmp_path: Path) -> None:
    """The kernel limits the process's memory to less than a micro batch of 32 takes, and torch's allocator fails."""
    done = subprocess.run(
        [sys.executable, __file__, dataset, tmp_path], capture_output=True, text=True, cwd=ROOT, timeout=400,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    starts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert starts[0]["micro_batch"] == 32
    assert "memory is full with a micro batch of 32" in starts[0]["warnings"][-1]
    assert starts[-1]["steps"] == 4
    sizes = [start["micro_batch"] for start in starts]
    assert all(after == before // 2 for before, after in itertools.pairwise(sizes))
    newest = Checkpoints.of_stage(tmp_path, "demo").newest()
    assert newest is not None
    assert newest.state()["config"]["micro_batch"] == sizes[-1] < 32, "the choice is recorded"
    assert json.loads((tmp_path / "demo/config.json").read_text())["micro_batch"] == sizes[-1]
    taken = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert [line["step"] for line in taken] == [1, 2, 3, 4], "goes on from the checkpoint of step 2"
    assert all(len(line["ids"]) == 32 for line in taken)


def _train_under_a_limit(dataset: str, run: str) -> None:
    """Two steps without a limit, then starts under a limit until step 4 is reached. Prints a line for each of these."""
    import runpy

    shared = runpy.run_path(str(Path(__file__).with_name("test_worker.py")))
    torch.set_num_threads(1)
    settings = ("batch_size=32", "streams=16", "resolution=128", "model.dim=128", "model.depth=2")

    def start(steps: int, *more: str) -> tuple[Any, Any, Any]:
        training = shared["resolved"](Path(dataset), Path(run), steps, *settings, *more, audit=f"{run}/audit")
        recorder = shared["Recorder"]()
        return training, recorder, shared["worker"](training, recorder)

    start(2, "micro_batch=1")[2].run()
    for _ in range(6):
        training, recorder, worker = start(4)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        taken = int(status["VmData"].split()[0]) * 1024
        sample = fit_memory.memory.activation_bytes(training.model, training.stage, training.codec_factor)
        resource.setrlimit(resource.RLIMIT_DATA, (int(taken + 24 * sample), resource.RLIM_INFINITY))
        try:
            steps = worker.run()
        except RuntimeError as error:
            if not fit_memory.is_out_of_memory(error):
                raise
            steps = None
        line = {"micro_batch": worker.training.micro_batch, "steps": steps, "warnings": recorder.warnings}
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(json.dumps(line), flush=True)
        if steps:
            return


if __name__ == "__main__":
    _train_under_a_limit(*sys.argv[1:])
