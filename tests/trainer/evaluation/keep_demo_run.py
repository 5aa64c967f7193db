"""Copies what drawing needs from a run of `make demo` to tests/trainer/evaluation/demo_run (4.6 MB).

    make demo && .venv/bin/python tests/trainer/evaluation/keep_demo_run.py demo/run

Keeps the averaged weights of the newest checkpoint, rounded to fp16, its other tensors, and the text encoder.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch

from trainer.runs.checkpoint import Checkpoints
from trainer.runs.run_folder import find_checkpoint, text_encoder_of_checkpoint

OUT = Path(__file__).parent / "demo_run"


def main() -> None:
    found = find_checkpoint(sys.argv[1])
    assert found is not None, f"{sys.argv[1]} has no checkpoint"
    average, state = found.tensors("ema"), found.state()
    halved = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in average.items()}
    others = {name: tensor for name, tensor in found.tensors("model").items() if name not in average}
    # Paths of the machine that trained it mean nothing elsewhere.
    state["config"] = {name: state["config"][name] for name in ("stage", "model", "selection", "example_prompts")}
    state["config"]["selection"]["dataset"] = "demo/dataset"
    shutil.rmtree(OUT, ignore_errors=True)
    Checkpoints.of_stage(OUT, "demo").save(found.step, {"ema": halved, "model": others}, state)
    shutil.copytree(text_encoder_of_checkpoint(found), OUT / "text_encoder")


if __name__ == "__main__":
    main()
