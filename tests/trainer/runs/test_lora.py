"""Adapters: their arithmetic, training on a frozen base, and merging wherever the model is used."""

import json
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.core.errors import UsageError
from trainer.diffusion.positions import full_position_map
from trainer.drawing.picture_model import PictureModel
from trainer.drawing.settings import SamplingSettings
from trainer.encoders.load_codec import load_codec
from trainer.model.config import XUTConfig
from trainer.model.flops import count_flops
from trainer.model.xut import XUT, compiled
from trainer.optimization.optimizers import OptimizerConfig, build_optimizer
from trainer.recipe.command import Command
from trainer.recipe.memory import check_device
from trainer.recipe.resolve import resolve
from trainer.recipe.training import Training
from trainer.runs.checkpoint import Checkpoint, Checkpoints, write_tensors
from trainer.runs.ema import trainable_parameters, trainable_state
from trainer.runs.lora import add_adapters, merge_adapters, merge_folder, write_adapters
from trainer.runs.weights import save_model, trained_model, weights_hash

# Shared with the tests of workers: a source of samples and a reporter without Ray.
_SHARED = runpy.run_path(str(Path(__file__).parents[1] / "training" / "test_worker.py"))
worker, Recorder = _SHARED["worker"], _SHARED["Recorder"]

pytestmark = pytest.mark.usefixtures("one_thread")

RunJob = Callable[..., CompletedProcess[str]]
SHAPE: dict[str, Any] = {"dim": 32, "heads": 2, "mlp_dim": 48, "depth": 1, "dec_blocks": 1, "text_dim": 16}
CPU = torch.device("cpu")


def random_model(config: XUTConfig, seed: int = 0) -> XUT:
    """A model whose weights are all random, also those that are initialised to zero."""
    torch.manual_seed(seed)
    model = XUT(config)
    scatter(dict(model.named_parameters()))
    return model.eval()


@torch.no_grad()
def scatter(tensors: dict[str, Any]) -> None:
    for tensor in tensors.values():
        tensor += 0.05 * torch.randn_like(tensor)


def small(**more: Any) -> XUT:
    return random_model(XUTConfig.tiny(**SHAPE, prev_blocks=0, post_blocks=0, **more))


def velocity(model: Callable[..., Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    text_BTD = torch.randn(2, 5, 16, generator=generator)
    map_BN2 = full_position_map(64, 64, 4, 4).expand(2, -1, -1)
    x_BCHW, t_B = torch.randn(2, 4, 8, 8, generator=generator), torch.rand(2, generator=generator)
    routed = {"selection_rate": 0.5, "routing_key": torch.arange(2)}
    return model(x_BCHW, t_B, text=text_BTD, position_map=map_BN2, aspect=torch.zeros(2), **routed)


# --- The mathematics ------------------------------------------------------------------------------------------------


def test_new_adapters_change_nothing_and_merging_trained_ones_keeps_the_output() -> None:
    model = small()
    names, plain = list(model.state_dict()), velocity(model)
    add_adapters(model, 3)
    assert torch.equal(velocity(model), plain)
    scatter(trainable_state(model))
    adapted = velocity(model)
    assert (adapted - plain).abs().max() > 0.1
    merge_adapters(model)
    torch.testing.assert_close(velocity(model), adapted, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_merged_layer_is_its_weight_and_the_scaled_product() -> None:
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapters(model, 3)
    adapters = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
    scatter(adapters)
    model.load_state_dict(adapters, strict=False)
    merge_adapters(model, scale=-0.5)
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in adapters:
            product = adapters[f"{layer}.lora_B.default.weight"] @ adapters[f"{layer}.lora_A.default.weight"]
            torch.testing.assert_close(tensor, before[name] - 0.5 * product)
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("adaln", ["shared", "per_layer"])
def test_the_adapters_of_a_block_learn_and_nothing_else(adaln: str) -> None:
    model = small(adaln=adaln)
    add_adapters(model, 3)
    dim, mlp, rank = 32, 48, 3
    attention = rank * ((dim + 3 * dim) + (dim + dim))
    cross = rank * ((dim + dim) + (dim + 2 * dim) + (dim + dim))
    feed_forward = rank * ((dim + 2 * mlp) + (mlp + dim))
    blocks = 2  # of an encoder and a decoder stage
    learning = trainable_parameters(model)
    assert sum(p.numel() for p in learning.values()) == blocks * (attention + feed_forward) + cross
    assert all(".lora_A." in name or ".lora_B." in name for name in learning)
    torch.autograd.backward(velocity(model).square().mean())
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_the_compiled_model_is_the_same_function() -> None:
    model = small()
    add_adapters(model, 2)
    scatter(trainable_state(model))
    expected = velocity(model)
    torch.testing.assert_close(velocity(compiled(model, backend="eager")), expected, atol=1e-5, rtol=1e-5)


def test_a_step_takes_slightly_more_operations_than_the_closed_form_says() -> None:
    config = XUTConfig(dim=256, heads=4, mlp_dim=768, depth=1, text_dim=64)
    with torch.device("meta"):
        model = XUT(config)
        x, t, text, positions = (torch.empty(shape) for shape in ((1, 4, 32, 32), (1,), (1, 32, 64), (1, 256, 2)))
    add_adapters(model, 8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, t, text=text, position_map=positions, aspect=t).sum().backward()
    closed = count_flops(config, 256, 32)
    assert 0.85 * counter.get_total_flops() < closed.frozen_step < counter.get_total_flops()
    assert closed.step > 1.15 * counter.get_total_flops()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_rate_of_a_falls_with_the_width_and_that_of_b_does_not(kind: Any) -> None:
    """As in LoRA+: the fan-in of B is the rank. AdamW trains both, because Muon would fix the norm of each update."""
    for dim in (32, 64):
        model = random_model(XUTConfig.tiny(**SHAPE | {"dim": dim}))
        add_adapters(model, 4)
        optimizer = build_optimizer(model, OptimizerConfig(kind=kind, learning_rate=1e-3, base_width=16))
        assert type(optimizer).__name__ == "AdamW"
        rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
        found = {name: rates[id(parameter)] for name, parameter in trainable_parameters(model).items()}
        assert len(rates) == len(found)
        for name, rate in found.items():
            fan_in = 48 if ".down." in name else dim
            assert rate == pytest.approx(1e-3 if ".lora_B." in name else 1e-3 * 16 / fan_in), name


# --- Training -------------------------------------------------------------------------------------------------------

SETTINGS = ("log_every=1", "checkpoint_every=2", "evaluate_every=1000", "batch_size=4", "streams=4")
RATE = "optimizer.learning_rate=0.01"


@pytest.fixture
def ask(dataset: Path, tmp_path: Path, random_run: Path) -> Callable[..., Training]:
    """ask("a=1", run="lora", lora=4) -> the resolved training of tmp_path/lora on the random run."""

    def resolved(*settings: str, run: str = "lora", **flags: Any) -> Training:
        (tmp_path / "prompts").write_text("red star")  # one picture in place of six at the end of every run
        flags = {"stage": "demo", "steps": 3, "lora": 4, "start_from": str(random_run), **flags}
        flags |= {"prompts": str(tmp_path / "prompts")}
        return resolve(Command(dataset=str(dataset), run=str(tmp_path / run), settings=(*SETTINGS, *settings), **flags))

    return resolved


@pytest.fixture(scope="module")
def live(dataset: Path, random_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A worker that has trained adapters of rank 4 on the random run for three steps, at a high rate."""
    run = tmp_path_factory.mktemp("runs") / "lora"
    settings = (*SETTINGS, RATE, "ema_decay=0.5")
    command = Command(
        stage="demo", dataset=str(dataset), run=str(run), steps=3, settings=settings, lora=4, start_from=str(random_run)
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = worker(resolve(command), Recorder())
    assert trained.run() == 3
    torch.set_num_threads(threads)
    return trained


@pytest.fixture(scope="module")
def lora_run(live: Any) -> Path:
    return Path(live.training.run)


def newest(run: Path, stage: str = "demo") -> Checkpoint:
    found = Checkpoints.of_stage(run, stage).newest()
    assert found is not None
    return found


def test_adapters_change_the_base_does_not_and_a_checkpoint_holds_only_adapters(live: Any, random_run: Path) -> None:
    found, base = newest(Path(live.training.run)), newest(random_run)
    record = found.state()["config"]
    assert record["lora"] == {
        "rank": 4, "base": base.folder, "sha256": weights_hash(trained_model(base)),
    }  # fmt: skip
    assert record["model"] == base.state()["config"]["model"]
    for file in ("model", "ema", "optimizer"):
        names = [name for name in found.tensors(file) if "." in name]  # others are counts and gradient norms
        assert names
        assert all(".lora_A.default." in name or ".lora_B.default." in name for name in names)
    size, whole = (sum(path.stat().st_size for path in Path(f.folder).glob("model.*")) for f in (found, base))
    assert size < whole / 8
    moved = {name: tensor.abs().max().item() for name, tensor in found.tensors("model").items() if ".lora_B." in name}
    assert min(moved.values()) > 0
    frozen = {name: p for name, p in live.loop.model.named_parameters() if not p.requires_grad}
    wanted = dict(trained_model(base).named_parameters())
    assert {name.replace(".base_layer.", ".") for name in frozen} == wanted.keys()
    assert all(torch.equal(tensor, wanted[name.replace(".base_layer.", ".")]) for name, tensor in frozen.items())


def test_a_stopped_run_continues_bit_for_bit(ask: Callable[..., Training]) -> None:
    whole, parts, again = Recorder(), Recorder(stops_after=1), Recorder()
    assert worker(ask(RATE, steps=4, run="whole"), whole).run() == 4
    assert worker(ask(RATE, steps=4, run="parts"), parts).run() == 2
    assert worker(ask(RATE, steps=4, run="parts"), again).run() == 4
    assert [line["loss"] for line in parts.lines + again.lines] == [line["loss"] for line in whole.lines]
    tensors = [
        newest(Path(ask(run=run, steps=4).run)).tensors(file)
        for file in ("model", "ema", "optimizer")
        for run in ("whole", "parts")
    ]
    for one, other in zip(tensors[::2], tensors[1::2], strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_defaults_of_a_run_of_adapters(ask: Callable[..., Training], random_run: Path) -> None:
    training = ask(steps=None)
    assert (training.stage.optimizer.kind, training.stage.optimizer.learning_rate) == ("adamw", 5e-4)
    assert training.stop_step == 64_000 // 4
    assert "--lora implies optimizer.kind=adamw" in training.notes[0]
    assert newest(random_run).folder in training.notes[-1]
    check_device(training, gpus=0)
    large = replace(training, stage=replace(training.stage, model="base"), model=XUTConfig.base())
    with pytest.raises(UsageError, match=r"trains adapters on 343M parameters, .* at least about \d GB\. To try"):
        check_device(large, gpus=0)
    with pytest.raises(UsageError, match="fp8=true converts the layers that --lora adapts"):
        ask("fp8=true", "precision=bf16", run="float8")
    with pytest.raises(UsageError, match=r"repa\.features aligns whole models"):
        ask("repa.features=any", run="aligned")
    with pytest.raises(UsageError, match="there is no GPU"):  # whatever preset the stage names
        check_device(replace(training, model=XUTConfig.base()), gpus=0)


def test_another_stage_takes_model_and_encoders_from_the_base(ask: Callable[..., Training]) -> None:
    training = ask("selection=demo", "resolution=64", stage="256")
    assert (training.stage.codec, training.stage.text_encoder, training.stage.patch_size) == ("dct", "local", 1)
    assert training.model.dim == 128


# --- Refusals -------------------------------------------------------------------------------------------------------


def refused(ask: Callable[..., Training], *settings: str, **flags: Any) -> str:
    with pytest.raises(UsageError) as error:
        ask(*settings, **flags)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_base_that_does_not_fit_is_refused_with_advice(
    ask: Callable[..., Training], random_run: Path, tmp_path: Path
) -> None:
    save_model(tmp_path / "model", small().config, small().state_dict())
    for start_from in (None, "nothing"):
        assert "give --from FOLDER" in refused(ask, start_from=start_from)
    assert "has no weights; give a run" in refused(ask, start_from=str(tmp_path))
    assert "a rank from 1 to the model's width of 128" in refused(ask, lora=0)
    assert "a rank from 1 to" in refused(ask, lora=129)
    assert "with --lora the model is the one of --from" in refused(ask, "model.dim=64")
    assert "with --lora the model is the one of --from" in refused(ask, "patch_size=2")
    assert "codec: dct -> pixel" in refused(ask, "codec=pixel")
    said = refused(ask, start_from=str(tmp_path / "model"))
    assert "takes 4 latent channels, but codec dct gives" in said
    assert "--lora RANK trains adapters on a model folder" in refused(
        ask, lora=None, start_from=str(tmp_path / "model")
    )


def test_a_text_encoder_of_another_width_is_refused(ask: Callable[..., Training], tmp_path: Path) -> None:
    model = random_model(XUTConfig.tiny(**SHAPE | {"in_channels": load_codec("dct").channels}))
    save_model(tmp_path / "model", model.config, model.state_dict())
    said = refused(ask, start_from=str(tmp_path / "model"))
    assert "takes 16 values per text token, but text_encoder local gives 128: --set text_encoder=" in said


def test_rank_and_base_cannot_change_but_the_base_may_move(
    ask: Callable[..., Training], random_run: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(random_run, base)
    worker(ask(start_from=str(base)), Recorder()).run()
    assert "lora.rank: 4 -> 8" in refused(ask, start_from=str(base), lora=8)
    assert "lora.rank: 4 -> 0" in refused(ask, start_from=None, lora=None)
    assert ask(start_from=None, steps=5).start_step == 3, "the run knows its base"

    moved = base.rename(tmp_path / "moved")
    said = refused(ask, start_from=None)
    assert "base of these adapters is gone" in said
    assert "--from FOLDER where it is now" in said
    with pytest.raises(ValueError, match="base of these adapters is gone"):
        PictureModel.load(tmp_path / "lora", CPU)
    going_on = ask(start_from=str(moved), steps=5)
    assert going_on.start_step == 3
    assert going_on.lora is not None
    assert going_on.lora.base.startswith(str(moved))

    moved.rename(base)
    file = Path(newest(base).folder) / "ema.safetensors"
    averages = {name: tensor + (name == "patch_in.bias") for name, tensor in load_file(file).items()}
    write_tensors(str(file), averages)
    assert "base of these adapters has changed" in refused(ask, start_from=None)
    assert "base of these adapters has changed" in refused(ask, start_from=str(base))
    other = tmp_path / "other"
    base.rename(other)
    assert "lora.base: " in refused(ask, start_from=str(other))


def test_a_base_that_is_trained_on_leaves_the_adapters_where_they_began(
    ask: Callable[..., Training], random_run: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(random_run, base)
    worker(ask(start_from=str(base)), Recorder()).run()
    first = newest(base)
    tensors = {name: first.tensors(name) for name in ("model", "ema")}
    tensors["ema"]["patch_in.bias"] += 1
    Checkpoints.of_stage(base, "demo").save(2, tensors, first.state())
    again = ask(start_from=str(base), steps=5)
    assert again.lora is not None
    assert again.lora.base == first.folder


# --- Using them -----------------------------------------------------------------------------------------------------

SETTINGS_OF_A_PICTURE = SamplingSettings(width=64, height=32, steps=2)
DRAWN = ("--width", 64, "--height", 32, "--steps", 2, "--prompt", "red star")


def latents(model: PictureModel) -> Tensor:
    return model.latents(["red star"], [3], SETTINGS_OF_A_PICTURE)


def test_pictures_of_a_run_of_adapters_are_those_of_its_base_merged(lora_run: Path, random_run: Path) -> None:
    adapted, plain = (PictureModel.load(run, CPU) for run in (lora_run, random_run))
    drawn, before = latents(adapted), latents(plain)
    averages = newest(lora_run).tensors("ema")
    for name, tensor in plain.model.state_dict().items():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" in averages:
            tensor += averages[f"{layer}.lora_B.default.weight"] @ averages[f"{layer}.lora_A.default.weight"]
    torch.testing.assert_close(drawn, latents(plain), atol=1e-4, rtol=1e-4)
    assert (drawn - before).abs().max() > 0.01


def test_exported_adapters_make_the_same_picture_on_the_base_and_load_in_peft(
    call_job: RunJob, lora_run: Path, random_run: Path, tmp_path: Path
) -> None:
    done = call_job("trainer/export.py", "--run", lora_run, "--to-lora", tmp_path / "adapters")
    assert done.returncode == 0, done.stderr
    assert "read again and found equal" in done.stdout
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    exported, averages = load_file(tmp_path / "adapters/adapter_model.safetensors"), newest(lora_run).tensors("ema")
    assert len(exported) == len(averages) - 1
    for name, tensor in exported.items():
        assert torch.equal(
            averages[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")], tensor
        )

    wanted = PictureModel.load(lora_run, CPU)
    with_adapters = PictureModel.load(random_run, CPU).with_adapters(tmp_path / "adapters", 1.0)
    torch.testing.assert_close(latents(with_adapters), latents(wanted), atol=1e-4, rtol=1e-4)
    peft = pytest.importorskip("peft")
    base = trained_model(newest(random_run))
    merged = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapters")).merge_and_unload()
    assert all(torch.allclose(tensor, wanted.model.state_dict()[name]) for name, tensor in merged.state_dict().items())

    raw = call_job("trainer/export.py", "--run", lora_run, "--weights", "raw", "--to-lora", tmp_path / "raw")
    assert raw.returncode == 0, raw.stderr
    a_name = min(exported)
    assert not torch.equal(load_file(tmp_path / "raw/adapter_model.safetensors")[a_name], exported[a_name])


def test_sample_merges_adapters_by_their_scale_and_says_so_in_the_picture(
    call_job: RunJob, lora_run: Path, random_run: Path, tmp_path: Path
) -> None:
    assert call_job("trainer/export.py", "--run", lora_run, "--to-lora", tmp_path / "adapters").returncode == 0

    def sample(out: str, *arguments: object) -> tuple[Path, str]:
        done = call_job("trainer/sample.py", "--out", tmp_path / out, *arguments)
        assert done.returncode == 0, done.stderr
        [path] = (tmp_path / out).glob("*.png")
        return path, done.stdout

    def pixels(path: Path) -> np.ndarray:
        from PIL import Image

        return np.asarray(Image.open(path)).astype(int)

    plain, _ = sample("plain", "--run", random_run, *DRAWN)
    merged, _ = sample("merged", "--run", lora_run, *DRAWN)
    whole, _ = sample("whole", "--run", random_run, "--lora", tmp_path / "adapters", *DRAWN)
    none, _ = sample("none", "--run", random_run, "--lora", f"{tmp_path / 'adapters'}:0", *DRAWN)
    assert np.abs(pixels(whole) - pixels(merged)).max() <= 1
    assert np.array_equal(pixels(none), pixels(plain))
    assert not np.array_equal(pixels(whole), pixels(plain))
    assert json.loads(whole.with_suffix(".json").read_text())["adapters"][0]["scale"] == 1
    again, said = sample("again", "--run", random_run, "--lora", tmp_path / "adapters", "--like", whole)
    assert again.read_bytes() == whole.read_bytes()
    assert "will differ" not in said
    _, said = sample("without", "--run", random_run, "--like", whole)
    assert "now no adapters: the picture will differ" in said


def test_adapters_that_do_not_fit_are_refused_in_one_line(call_job: RunJob, random_run: Path, tmp_path: Path) -> None:
    model = small()
    add_adapters(model, 2)
    state = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
    write_adapters(tmp_path / "narrow", state, 2)
    write_adapters(tmp_path / "dora", state, 2)
    config = json.loads((tmp_path / "dora/adapter_config.json").read_text())
    (tmp_path / "dora/adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    write_adapters(tmp_path / "pissa", state, 2)
    (tmp_path / "pissa/adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    write_adapters(tmp_path / "elsewhere", state, 2)
    (tmp_path / "elsewhere/adapter_config.json").write_text(json.dumps(config | {"target_modules": ["to_q"]}))
    (tmp_path / "empty").mkdir()
    for folder, said in (
        ("narrow", "belong to another model: "),
        ("dora", "use_dora=True, but only plain adapters"),
        ("pissa", "init_lora_weights=pissa_niter_4, but only plain adapters"),
        ("elsewhere", "belong to another model: Target modules"),
        ("empty", "it has no adapter_config.json and no adapter_model.safetensors"),
        ("narrow:nan", "give a scale from -10 to 10"),
        ("narrow:high", "is not a folder of adapters"),
    ):
        done = call_job(
            "trainer/sample.py", "--run", random_run, "--out", tmp_path / "out", "--lora", tmp_path / folder, *DRAWN
        )
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    done = call_job("trainer/export.py", "--run", random_run, "--to-lora", tmp_path / "new")
    assert done.returncode == 2
    assert "was not trained with --lora" in done.stderr


def test_adapters_that_do_not_fit_are_named_by_what_is_missing_unknown_and_misshapen(tmp_path: Path) -> None:
    model = small()
    add_adapters(model, 2)
    state = {name: tensor.clone() for name, tensor in trainable_state(model).items()}
    name = min(state)
    state[name] = state[name][:, :-1].contiguous()
    state["other.lora_A.default.weight"] = state.pop(max(state))
    write_adapters(tmp_path / "adapters", state, 2)
    with pytest.raises(ValueError, match=r"1 missing, such as .*; 1 unknown, such as .*; 1 misshapen, such as .*31\)"):
        merge_folder(small(), tmp_path / "adapters")


def test_a_stage_can_start_from_merged_adapters(ask: Callable[..., Training], lora_run: Path) -> None:
    live = worker(ask(lora=None, start_from=str(lora_run), run="whole"), Recorder())
    wanted = trained_model(newest(lora_run)).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in live.loop.model.state_dict().items())


# --- On released weights --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model folder of the public release's architecture, for the embedded encoders."""
    shape = SHAPE | {"in_channels": load_codec("dct").channels, "text_dim": 128, "prev_blocks": 0, "post_blocks": 1}
    model = random_model(XUTConfig.released(**shape))
    folder = tmp_path_factory.mktemp("released") / "model"
    save_model(folder, model.config, {name: tensor.half() for name, tensor in model.state_dict().items()})
    return folder


def test_released_weights_are_adapted_drawn_with_their_own_positions_and_go_back_merged(
    ask: Callable[..., Training], call_job: RunJob, released: Path, tmp_path: Path
) -> None:
    training = ask("codec=dct", "text_encoder=local", "evaluate_every=2", RATE, start_from=str(released), stage="demo")
    assert (training.model.position_grid, training.stage.patch_size) == ("latent", 2)
    check_device(training, gpus=0)
    recorder = Recorder()
    assert worker(training, recorder).run() == 3
    assert len(recorder.evaluations) == 2
    picture = PictureModel.load(training.run, CPU)
    seen: list[dict[str, Tensor]] = []
    handle = picture.model.register_forward_pre_hook(lambda _, __, inputs: seen.append(inputs), with_kwargs=True)
    picture.latents(["red star"], [3], replace(SETTINGS_OF_A_PICTURE, guidance=1.0))
    handle.remove()
    wanted = full_position_map(64, 32, 4, 8, convention="released")
    assert torch.equal(seen[0]["position_map"], wanted[None])
    assert seen[0]["aspect"].item() == 2
    assert seen[0]["text_mask"].shape == (1, training.stage.text_tokens)
    assert seen[0]["text_mask"].all()

    done = call_job("trainer/export.py", "--run", training.run, "--to-released", tmp_path / "merged.safetensors")
    assert done.returncode == 0, done.stderr
    back = ("--from-released", tmp_path / "merged.safetensors", "--config", tmp_path / "merged.json")
    assert call_job("trainer/export.py", *back, "--out", tmp_path / "back").returncode == 0
    found = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in picture.model.state_dict().items())
