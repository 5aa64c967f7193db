"""The export job: what diffusers folders draw without this project, round trips of a release, refusals."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.drawing.picture_model import PictureModel
from trainer.drawing.settings import SamplingSettings
from trainer.encoders.load_codec import load_codec
from trainer.encoders.text import build_local_text_encoder, text_width
from trainer.model.config import XUTConfig
from trainer.model.released import to_released, write_released
from trainer.model.xut import XUT
from trainer.recipe.stages import STAGES
from trainer.runs.checkpoint import Checkpoints
from trainer.runs.ema import EMA
from trainer.runs.power_ema import PowerEMA
from trainer.runs.training_state import training_state
from trainer.runs.weights import save_model

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


def _save_run(run: Path, codec: str, config: XUTConfig) -> Path:
    """Random weights, and others as their average, in the demo stage."""
    torch.manual_seed(0)
    model = XUT(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # a new model's last layer gives nothing
    average = EMA(model, 0.9)
    for weight in average.weights.values():
        weight *= 1.1
    state = training_state(
        stage_name="demo",
        epoch=0,
        position=32,
        first_epoch=0,
        seed=0,
        config={"stage": asdict(STAGES["demo"]) | {"codec": codec}, "model": config.to_dict()},
        selection="abc",
    )
    Checkpoints.of_stage(run, "demo").save(1, {"model": model.state_dict(), "ema": average.state_dict()}, state)
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one block each, one by codec; the VAE's averages the text encoder's layers."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(1)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).save_pretrained(folder / "some-vae")
    runs = {}
    for name, codec, more in (
        ("dct", "dct", {"patch_size": 1}),
        ("vae", str(folder / "some-vae"), {"patch_size": 2, "text_layers": "average"}),
    ):
        build_local_text_encoder(["red star", "blue fish"], folder / name / "text_encoder", seed=0)
        shape = {
            "dim": 32,
            "heads": 2,
            "mlp_dim": 64,
            "depth": 1,
            "text_dim": text_width(folder / name / "text_encoder"),
        }
        config = XUTConfig.tiny(in_channels=load_codec(codec).channels, **shape, **more)
        runs[name] = _save_run(folder / name, codec, config)
    return runs


PROMPTS, SEEDS = ["red star", "a very blue fish"], [3, 8]
WIDE = {"width": 64, "height": 32, "negative": "fish", "steps": 3, "guidance": 2.0}
CAMERA = {"x_shift": 0.25, "y_shift": -0.1, "zoom": 1.5}
ROUTED = {"selection_rate": 0.25, "unconditional_rate": 0.5}


class _ProjectIsMissing:
    """An import hook for a process in which this project is not installed."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.split(".")[0] in ("trainer", "pipeline"):
            raise ModuleNotFoundError(name)


def _drawn_without_the_project(
    folders: dict[str, Path], draw: list[tuple[str, dict[str, Any]]], refused: list[dict[str, Any]]
) -> tuple[list[np.ndarray], list[str]]:
    """Pictures of the folders' own code, and what it refuses, while nothing of this project can be imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] in ("trainer", "pipeline")]:
            patch.delitem(sys.modules, name)
        patch.setattr(sys, "meta_path", [_ProjectIsMissing(), *sys.meta_path])
        pipes = {name: _load(folder, torch.float16 if "half" in name else None) for name, folder in folders.items()}
        for name in ("half", "half dct"):
            assert pipes[name].transformer.dtype == torch.float16
            constants = [*pipes[name].transformer.buffers(), *pipes["half dct"].vae.buffers()]
            assert all(constant.dtype == torch.float32 for constant in constants)
        pictures = []
        for name, arguments in draw:
            pipe = pipes[name]
            if "dtype" in arguments:
                pipe = pipe.to(arguments["dtype"])
            pipe.set_progress_bar_config(disable=True)
            images = pipe(**{key: value for key, value in arguments.items() if key != "dtype"}).images
            pictures.append(np.stack([np.asarray(image) for image in images]))
        messages = []
        for arguments in refused:
            with pytest.raises(ValueError) as refusal:
                pipes["dct"](**arguments)
            messages.append(str(refusal.value))
        assert not [name for name in sys.modules if name.split(".")[0] in ("trainer", "pipeline")]
    return pictures, messages


def _load(folder: Path, dtype: torch.dtype | None) -> Any:
    return DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=f"{folder}/pipeline.py", trust_remote_code=True, dtype=dtype
    )


def _drawn_here(run: Path, settings: SamplingSettings, weights: str = "ema") -> tuple[np.ndarray, Tensor]:
    """Pictures and, at full precision, the latents that they were decoded from."""
    model = PictureModel.load(run, torch.device("cpu"))
    if weights == "raw":
        found = Checkpoints.of_stage(run, "demo").newest()
        assert found is not None
        model.model.load_state_dict(found.tensors("model"))
    return np.stack(model.draw(PROMPTS, SEEDS, settings)), model.latents(PROMPTS, SEEDS, settings)


def test_a_diffusers_folder_draws_the_same_pictures_without_this_project(
    call_job: RunJob, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folders = {name: tmp_path / name for name in ("dct", "vae", "raw", "half", "half dct")}
    for name, arguments in {
        "dct": ["--run", runs["dct"]],
        "vae": ["--run", runs["vae"]],
        "raw": ["--run", runs["dct"] / "demo", "--weights", "raw"],
        "half": ["--run", runs["vae"], "--dtype", "fp16"],
        "half dct": ["--run", runs["dct"], "--dtype", "fp16"],
    }.items():
        job = call_job("trainer/export.py", *arguments, "--to-diffusers", folders[name])
        assert job.returncode == 0, job.stderr
        assert job.stderr == ""
        assert "read again and found equal" in job.stdout
        assert sorted(path.name for path in folders[name].iterdir()) == [
            "model_index.json", "pipeline.py", "scheduler", "text_encoder", "tokenizer", "transformer", "vae",
        ]  # fmt: skip
    for file in [*folders["vae"].rglob("*.json"), *folders["vae"].rglob("*.py")]:
        assert str(tmp_path.parent) not in file.read_text(), f"{file} names a folder of this machine"

    wide = {"prompt": PROMPTS, "width": 64, "height": 32, "negative_prompt": "fish", "num_inference_steps": 3}
    wide |= {"guidance_scale": 2.0, "seed": SEEDS}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    by_generator = {key: value for key, value in wide.items() if key != "seed"} | {"generator": generators}
    draw = [
        ("dct", wide | {"output_type": "latent"}),
        ("dct", wide | CAMERA | {"output_type": "latent"}),
        ("vae", wide | CAMERA | {"output_type": "latent"}),
        ("raw", wide | CAMERA | {"output_type": "latent"}),
        ("dct", wide | ROUTED | {"time_shift": 2.0, "output_type": "latent"}),
        ("dct", wide | {"sampler": "heun", "guidance_scale": 1.0, "output_type": "latent"}),
        ("dct", wide | CAMERA),
        ("vae", wide | CAMERA),
        ("vae", by_generator | CAMERA),
        ("vae", wide | CAMERA | {"output_type": "np"}),
        ("vae", {key: value for key, value in wide.items() if key not in ("width", "height")} | {"seed": 3}),
        ("half", wide | CAMERA),
        ("half", wide | CAMERA | {"dtype": torch.bfloat16}),
    ]
    refused = [
        {"height": 30},
        {"zoom": 0.0},
        {"num_inference_steps": 0},
        {"seed": -1},
        {"guidance_scale": float("nan")},
    ]
    found, messages = _drawn_without_the_project(folders, draw, refused)

    plain = _drawn_here(runs["dct"], SamplingSettings(**WIDE))
    dct, vae = (_drawn_here(runs[name], SamplingSettings(**WIDE, **CAMERA)) for name in ("dct", "vae"))
    raw = _drawn_here(runs["dct"], SamplingSettings(**WIDE, **CAMERA), "raw")
    routed = _drawn_here(runs["dct"], SamplingSettings(**WIDE, **ROUTED, shift=2.0))
    heun = _drawn_here(runs["dct"], SamplingSettings(**(WIDE | {"guidance": 1.0}), sampler="heun"))
    wanted = [drawn[1] for drawn in (plain, dct, vae, raw, routed, heun)]
    for latents, mine in zip(found[:6], wanted, strict=True):
        np.testing.assert_allclose(latents, mine, atol=1e-4)
    # They are apart from each other, so that a setting which is passed over is an error.
    assert min((plain[1] - other).abs().max() for other in (dct[1], routed[1], heun[1])) > 0.01
    assert (dct[1] - raw[1]).abs().max() > 0.01
    for pixels, mine in ((found[6], dct[0]), (found[7], vae[0]), (found[8], vae[0])):
        assert mine.std() > 1
        assert np.abs(pixels.astype(int) - mine).max() <= 1  # 1e-4 apart may round to two sides
        assert (pixels == mine).mean() > 0.999
    np.testing.assert_allclose((found[9] * 255).round(), vae[0], atol=1)
    side = STAGES["demo"].resolution
    assert found[10].shape == (2, side, side, 3)
    for pixels in found[11:]:
        assert 0 < np.abs(pixels.astype(int) - vae[0]).mean() < 4
    parts = ("multiples of 8", "zoom", "must be at least 1", "from 0 to", "not a number")
    for message, part in zip(messages, parts, strict=True):
        assert part in message


def test_a_checkpoint_of_the_released_architecture_becomes_one_file(call_job: RunJob, tmp_path: Path) -> None:
    config = XUTConfig.released(**SHAPE)
    run = _save_run(tmp_path / "run", "dct", config)
    found = Checkpoints.of_stage(run, "demo").newest()
    assert found is not None
    wanted = {"raw": found.tensors("model"), "ema": found.tensors("model") | found.tensors("ema")}
    del wanted["ema"]["updates"]
    for weights, tensors in wanted.items():
        file = tmp_path / f"{weights}.safetensors"
        job = call_job("trainer/export.py", "--run", run, "--weights", weights, "--to-released", file)
        assert job.returncode == 0, job.stderr
        released = to_released(tensors, config)
        assert load_file(file).keys() == released.keys()
        assert all(torch.equal(tensor, released[name]) for name, tensor in load_file(file).items())
    tracked = PowerEMA(XUT(config), (0.05, 0.1))
    for average in tracked.averages[0.1].values():
        average *= 1.2
    tracked.updates += 100
    state = found.state()
    Checkpoints.of_stage(run, "demo").save(
        2, {name: found.tensors(name) for name in ("model", "ema")} | {"power_ema": tracked.state_dict()}, state
    )
    job = call_job(
        "trainer/export.py", "--run", run, "--ema-length", 0.1, "--to-released", tmp_path / "long.safetensors"
    )
    assert job.returncode == 0, job.stderr
    released = to_released(found.tensors("model") | tracked.averages[0.1], config)
    torch.testing.assert_close(load_file(tmp_path / "long.safetensors"), released)
    job = call_job("trainer/export.py", "--run", run, "--dtype", "fp16", "--to-released", tmp_path / "half.safetensors")
    assert job.returncode == 0, job.stderr
    dtypes = {name: tensor.dtype for name, tensor in load_file(tmp_path / "half.safetensors").items()}
    assert {name for name, dtype in dtypes.items() if dtype != torch.float16} == {"unet.model.time_emb.freqs"}
    job = call_job("trainer/export.py", "--run", run, "--to-diffusers", tmp_path / "new")
    assert job.returncode == 2
    assert "takes a position of every latent pixel" in job.stderr


def test_an_imported_release_is_exported_with_the_same_bytes(call_job: RunJob, release: Path, tmp_path: Path) -> None:
    config = release.with_suffix(".json")
    there = call_job("trainer/export.py", "--from-released", release, "--config", config, "--out", tmp_path / "ours")
    assert there.returncode == 0, there.stderr
    assert "read again and found equal" in there.stdout
    assert {file.name for file in (tmp_path / "ours").iterdir()} == {
        "config.json", "model.safetensors", "vae.safetensors",
    }  # fmt: skip
    back = tmp_path / "back.safetensors"
    assert call_job("trainer/export.py", "--run", tmp_path / "ours", "--to-released", back).returncode == 0
    wanted, found = load_file(release), load_file(back)
    assert wanted.keys() == found.keys()
    assert all(wanted[name].numpy().tobytes() == found[name].numpy().tobytes() for name in wanted)
    assert json.loads(back.with_suffix(".json").read_text()) == json.loads(config.read_text())


def test_no_file_is_overwritten(call_job: RunJob, release: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "ours", XUTConfig.released(**SHAPE), XUT(XUTConfig.released(**SHAPE)).state_dict())
    (tmp_path / "back.json").write_text("mine")
    for out, said in (("back.safetensors", "back.json exists already"), ("back.json", "exists already")):
        job = call_job("trainer/export.py", "--run", tmp_path / "ours", "--to-released", tmp_path / out)
        assert job.returncode == 2
        assert said in job.stderr
    job = call_job("trainer/export.py", "--run", tmp_path / "ours", "--to-released", tmp_path / "new.bin")
    assert "must end in .safetensors" in job.stderr
    assert (tmp_path / "back.json").read_text() == "mine"


def test_nan_is_kept(release: Path, tmp_path: Path, call_job: RunJob) -> None:
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
        (["--from-released", "nowhere.safetensors", "--out", "new"], "nowhere.safetensors does not exist"),
        (["--from-released", "{release}", "--out", "new"], "these weights do not fit the config"),
        (["--from-released", "{release}", "--out", "{release}"], "exists already. Give --out a new path"),
        (["--run", "{folder}", "--to-released", "new"], "has no checkpoint and is no model folder. Give --run a run"),
        (["--run", "{folder}", "--to-diffusers", "new"], "has no checkpoint and is no model folder. Give --run a run"),
        (["--run", "{folder}", "--to-diffusers", "{folder}"], "exists already. Give --to-diffusers a new path"),
        (["--run", "{run}", "--to-released", "new"], "this model is not of the released architecture, it differs in: "),
        (["--run", "{model}", "--to-diffusers", "new"], "is only a model, without the codec and the text encoder"),
        (
            ["--run", "{model}", "--weights", "raw", "--to-released", "new"],
            "--weights and --ema-length belong to a run",
        ),
        (["--run", "{run}", "--ema-length", "0.1", "--to-diffusers", "new"], "need --set ema_snapshots above 0"),
        (["--run", "{run}", "--ema-length", "0.1", "--weights", "ema", "--to-lora", "new"], "leave out --weights"),
        (["--run", "{run}", "--to-released", "s3://bucket/new"], "must be a path on this machine's file system"),
        (["--to-released", "{folder}", "--config", "c"], "--config belongs to --from-released"),
        (["--to-released", "{folder}", "--out", "new"], "--out belongs to --from-released"),
        (
            ["--from-released", "{release}", "--dtype", "fp16", "--out", "new"],
            "--dtype does not go with --from-released",
        ),
        (["--from-released", "{release}"], "--from-released needs --out, a new folder"),
        (["--out", "new"], "one of the arguments --to-diffusers --to-released --to-lora --from-released is required"),
        (["--from-released", "{folder}", "--out", "new"], "is not a file; give a .safetensors file"),
        (["--from-released", "{release}", "--config", "{release}", "--out", "new"], "is not a JSON file"),
        (["--from-released", "{text}", "--out", "new"], "is not a safetensors file (Error while deserializing"),
        (["--from-released", "{pickle}", "--out", "new"], "if you trust where it comes from, convert it once"),
        (["--from-released", "{release}", "--config", "{list}", "--out", "new"], "must hold a JSON object, not list"),
    ],
)
def test_refusals_are_one_line(
    call_job: RunJob,
    release: Path,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    paths = {name: tmp_path / name for name in ("text", "list", "pickle", "model")} | {"run": runs["dct"]}
    save_model(paths["model"], XUTConfig.released(**SHAPE), XUT(XUTConfig.released(**SHAPE)).state_dict())
    files = {"text": b"not a model", "list": b"[]"}
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
