"""What a checkpoint says of the training besides its tensors."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from trainer.runs.checkpoint import Checkpoints
from trainer.runs.training_state import git_revision, training_state

revision = git_revision.__wrapped__  # without its cache


def test_the_state_says_where_training_goes_on_and_what_trained(tmp_path: Path) -> None:
    config = {"stage": {"batch_size": 32, "betas": (0.9, 0.98)}, "model": {"dim": 64}}
    state = training_state(
        stage_name="demo", epoch=2, position=640, first_epoch=1, seed=3, config=config, selection="abc"
    )
    tensors = {"model": {"weight": torch.ones(1)}}
    read = Checkpoints(str(tmp_path)).save(20, tensors, state).state()
    assert read.keys() - state.keys() == {"step", "saved_at", "files"}
    assert (read["stage_name"], read["step"], read["epoch"], read["position"]) == ("demo", 20, 2, 640)
    assert (read["first_epoch"], read["seed"], read["selection"]) == (1, 3, "abc")
    assert read["config"] == json.loads(json.dumps(config))
    written = json.dumps(config, sort_keys=True).encode()
    assert read["config_hash"] == hashlib.sha256(written).hexdigest()
    assert read["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__


def test_a_configs_hash_is_that_of_its_values_and_not_of_their_order() -> None:
    def config_hash(config: dict[str, object]) -> str:
        where = {"stage_name": "demo", "epoch": 0, "position": 0, "first_epoch": 0, "seed": 0, "selection": ""}
        return training_state(**where, config=config)["config_hash"]

    assert config_hash({"a": 1, "b": (2, 3)}) == config_hash({"b": [2, 3], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_the_revision_is_the_checkouts_own(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git here")

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", *who, "-C", str(tmp_path), *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert revision(tmp_path) is None
    git("init")
    assert revision(tmp_path) is None, "no commit yet"
    git("commit", "--allow-empty", "-m", "first")
    assert revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "installed").mkdir()
    assert revision(tmp_path / "installed") is None, "another project's checkout is around it"
    assert git_revision() == revision(Path(__file__).parents[3])
