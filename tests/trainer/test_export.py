"""The export job as its users run it: round trips of a released checkpoint, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.model.released import to_released, write_released
from trainer.model.saved import save_model
from trainer.model.xut import XUT, XUTConfig

RunJob = Callable[..., CompletedProcess[str]]

SHAPE = {"dim": 32, "heads": 2, "mlp_dim": 64, "depth": 2, "dec_blocks": 1, "post_blocks": 1, "text_dim": 16}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in the released layout, float16, with a decoder's tensor."""
    config = XUTConfig.released(**SHAPE)
    model = {name: tensor.half() for name, tensor in XUT(config).state_dict().items()}
    path = tmp_path_factory.mktemp("release") / "weights.safetensors"
    write_released(path, config, to_released(model, config))
    save_file(load_file(path) | {"vae.decoder.weight": torch.arange(4.0)}, path)
    return path


def test_there_and_back_gives_the_same_bytes(run_job: RunJob, release: Path, tmp_path: Path) -> None:
    config = release.with_suffix(".json")
    there = run_job("trainer/export.py", "--from-released", release, "--config", config, "--out", tmp_path / "ours")
    assert there.returncode == 0, there.stderr
    assert "read again and found equal" in there.stdout
    assert {file.name for file in (tmp_path / "ours").iterdir()} == {
        "config.json", "model.safetensors", "vae.safetensors",
    }  # fmt: skip
    back = tmp_path / "back.safetensors"
    assert run_job("trainer/export.py", "--to-released", tmp_path / "ours", "--out", back).returncode == 0
    wanted, found = load_file(release), load_file(back)
    assert wanted.keys() == found.keys()
    assert all(wanted[name].numpy().tobytes() == found[name].numpy().tobytes() for name in wanted)
    assert json.loads(back.with_suffix(".json").read_text()) == json.loads(config.read_text())


def test_no_file_is_written_over(call_job: RunJob, release: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "ours", XUTConfig.released(**SHAPE), XUT(XUTConfig.released(**SHAPE)).state_dict())
    (tmp_path / "back.json").write_text("mine")
    for out, said in (("back.safetensors", "back.json is there already"), ("back.json", "is there already")):
        job = call_job("trainer/export.py", "--to-released", tmp_path / "ours", "--out", tmp_path / out)
        assert job.returncode == 2
        assert said in job.stderr
    job = call_job("trainer/export.py", "--to-released", tmp_path / "ours", "--out", tmp_path / "new.bin")
    assert "must end in .safetensors" in job.stderr
    assert (tmp_path / "back.json").read_text() == "mine"


def test_values_that_are_no_numbers_survive(release: Path, tmp_path: Path, call_job: RunJob) -> None:
    tensors = load_file(release)
    name = next(name for name in tensors if name.endswith("bias"))
    tensors[name][0] = torch.nan
    save_file(tensors, tmp_path / "weights.safetensors")
    config = release.with_suffix(".json")
    source = ["--from-released", tmp_path / "weights.safetensors", "--config", config]
    job = call_job("trainer/export.py", *source, "--out", tmp_path / "ours")
    assert job.returncode == 0, job.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from-released", "nowhere.safetensors", "--out", "new"], "nowhere.safetensors is not there"),
        (["--from-released", "{release}", "--out", "new"], "these weights do not fit the config"),
        (["--from-released", "{release}", "--out", "{release}"], "is there already; give --out a new path"),
        (["--to-released", "{folder}", "--out", "new"], "is no model folder: it has no config.json and no model.saf"),
        (["--to-released", "{folder}", "--config", "c", "--out", "new"], "--config belongs to --from-released"),
        (["--out", "new"], "one of the arguments --from-released --to-released is required"),
        (["--from-released", "{folder}", "--out", "new"], "is not a file; give a .safetensors file"),
        (["--from-released", "{release}", "--config", "{release}", "--out", "new"], "is not a JSON file"),
        (["--from-released", "{text}", "--out", "new"], "is not a safetensors file (Error while deserializing"),
        (["--from-released", "{pickle}", "--out", "new"], "if you trust where it comes from, convert it once"),
        (["--from-released", "{release}", "--config", "{list}", "--out", "new"], "must hold a JSON object, not list"),
    ],
)
def test_refusals_are_one_line(
    call_job: RunJob, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    files = {"text": b"not a model", "list": b"[]"}
    paths = {name: tmp_path / name for name in (*files, "pickle")}
    for name, data in files.items():
        paths[name].write_bytes(data)
    torch.save({"weight": torch.zeros(1)}, paths["pickle"])
    filled = [argument.format(release=release, folder=release.parent, **paths) for argument in arguments]
    monkeypatch.chdir(tmp_path)
    job = call_job("trainer/export.py", *filled)
    assert job.returncode == 2
    assert said in job.stderr
    assert job.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()
