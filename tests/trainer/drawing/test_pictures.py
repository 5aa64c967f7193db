"""A run is sampled from wherever it lies; a picture is a function of its prompt, seed and settings alone."""

import json
import shutil
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.storage.shards import Store
from trainer.drawing.pictures import PictureModel, Request, Settings, picture_png, read_origin, save_picture

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["red star", "blue fish with a very long tail that swims beside a red star in the night", "", "red star"]
SEEDS = [3, 4, 5, 6]
SMALL = Settings(width=64, height=48, steps=2, negative="blue fish", shift=1.0)


@pytest.fixture(scope="module")
def model(random_run: Path) -> PictureModel:
    return PictureModel.load(random_run, torch.device("cpu"))


def test_a_run_on_s3_draws_the_pictures_of_its_local_copy(bucket: str, random_run: Path, model: PictureModel) -> None:
    remote = Store(f"{bucket}/sampled")
    for name in Store(str(random_run)).sizes():
        remote.write(name, (random_run / name).read_bytes())
    settings = Settings(width=64, height=64, steps=2)
    picture = model.draw(["red star"], [3], settings)[0]
    assert picture.std() > 0
    remote_model = PictureModel.load(remote.root, torch.device("cpu"))
    assert remote_model.steps_taken == 1
    np.testing.assert_array_equal(remote_model.draw(["red star"], [3], settings)[0], picture)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"sampler": "heun"},
        {"shift": 3.0, "x_shift": 0.25, "zoom": 1.5},
        {"selection_rate": 0.5, "unconditional_rate": 0.5},
        {"unconditional_rate": 0.5},
        {"guidance": 1.0},
    ],
)
def test_a_seed_gives_the_same_latents_alone_and_in_company(model: PictureModel, changed: dict[str, Any]) -> None:
    settings = replace(SMALL, **changed)
    together = model.latents(PROMPTS, SEEDS, settings)
    alone = torch.cat([model.latents([p], [s], settings) for p, s in zip(PROMPTS, SEEDS, strict=True)])
    assert together.shape == (4, 16, 6, 8)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert (together[0] - together[3]).abs().max() > 0.1, "other seeds"


@pytest.mark.parametrize(
    "changed",
    [
        {"sampler": "heun"},
        {"shift": 2.0},
        {"guidance": 4.0},
        {"negative": "red star"},
        {"x_shift": 0.25},
        {"y_shift": 0.25},
        {"zoom": 1.25},
        {"selection_rate": 0.5},
        {"unconditional_rate": 0.5},
    ],
)
def test_every_setting_changes_the_picture(model: PictureModel, changed: dict[str, Any]) -> None:
    plain, other = (model.latents(["red star"], [0], s) for s in (SMALL, replace(SMALL, **changed)))
    assert (plain - other).abs().max() > 1e-3


def test_guidance_1_is_the_prompt_alone_and_guidance_0_the_negative_one(model: PictureModel) -> None:
    conditional = model.latents(["red star"], [0], replace(SMALL, guidance=1.0, negative="whatever"))
    unconditional = model.latents(["whatever"], [0], replace(SMALL, guidance=0.0, negative="red star"))
    torch.testing.assert_close(conditional, unconditional, atol=1e-4, rtol=0)


def test_equal_rates_take_one_pass_a_step_and_different_ones_two(model: PictureModel) -> None:
    passes: list[int] = []
    with model.model.register_forward_pre_hook(lambda module, args: passes.append(len(args[0]))):
        for rate, other in [(0.0, 0.0), (0.5, 0.5), (0.0, 0.5)]:
            model.latents(["a", "b"], [0, 1], replace(SMALL, steps=1, selection_rate=rate, unconditional_rate=other))
    assert passes == [4, 4, 2, 2]


def test_a_picture_of_more_tokens_than_the_training_spends_more_steps_near_noise(model: PictureModel) -> None:
    """SD3, section 5.3.2: the square root of the ratio of the numbers of tokens."""
    assert model.time_shift(Settings(width=64, height=64)) == 1
    assert model.time_shift(Settings(width=256, height=64)) == pytest.approx(2)
    assert model.time_shift(Settings(width=256, height=64, shift=1.5)) == 1.5


def test_groups_are_as_large_as_their_pictures_allow(model: PictureModel) -> None:
    assert model.at_once(Settings(width=64, height=64)) == 32
    assert model.at_once(Settings(width=2048, height=1024)) == 1
    steps: list[tuple[int, int]] = []
    settings = Settings(width=8, height=8, steps=2)
    pictures = model.draw(["a"] * 33, range(33), settings, on_step=lambda *step: steps.append(step))
    assert len(pictures) == 33
    assert steps == [(1, 2), (2, 2)] * 2


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"width": 0}, "4096"),
        ({"height": -64}, "4096"),
        ({"height": 4097}, "4096"),
        ({"steps": 0}, "sampling steps"),
        ({"steps": 1001}, "1000"),
        ({"zoom": 0.0}, "zoom"),
        ({"zoom": -1.0}, "zoom"),
        ({"zoom": 1e-30}, "zoom"),
        ({"zoom": float("nan")}, "zoom"),
        ({"zoom": float("inf")}, "zoom"),
        ({"x_shift": float("nan")}, "x_shift"),
        ({"y_shift": float("-inf")}, "y_shift"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"shift": 0.0}, "shift"),
        ({"shift": float("nan")}, "shift"),
        ({"sampler": "ddim"}, "euler, heun"),
        ({"selection_rate": 1.0}, "selection_rate"),
        ({"unconditional_rate": float("nan")}, "selection_rate"),
        ({"negative": "\udcff"}, "UTF-8"),
    ],
)
def test_settings_out_of_their_range_are_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Settings(**{"width": 64, "height": 64, **wrong})


def test_seeds_and_prompts_that_cannot_be_drawn_are_refused() -> None:
    assert Request(prompt="", seed=0, settings=SMALL).prompt == ""
    for prompt, seed, named in (("a", -1, "seed -1"), ("a", 2**62, "seed"), ("\udcff", 0, "UTF-8")):
        with pytest.raises(ValueError, match=named):
            Request(prompt=prompt, seed=seed, settings=SMALL)


def test_a_picture_of_too_many_tokens_is_refused_by_their_number(model: PictureModel) -> None:
    assert model.fitting(Settings(width=2050, height=2046)) == Settings(width=2048, height=2048)
    with pytest.raises(ValueError, match="131072 tokens of 8 pixels; this program draws 65536"):
        model.fitting(Settings(width=4096, height=2048))
    with pytest.raises(ValueError, match="no whole number of 8-pixel tokens"):
        model.draw(["a"], [0], Settings(width=60, height=64))


# --- The checkpoint -------------------------------------------------------------------------------------------------


def spoilt(run: Path, copy: Path, **stage: object) -> Path:
    """A copy of the run whose checkpoint names other encoders."""
    shutil.copytree(run, copy)
    [path] = copy.glob("demo/checkpoints/*/state.json")
    state = json.loads(path.read_text())
    state["config"]["stage"] |= stage
    path.write_text(json.dumps(state))
    return copy


@pytest.mark.parametrize(
    ("stage", "named"), [({"codec": "wavelet"}, "no codec 'wavelet'"), ({"text_encoder": "/gone/qwen"}, "/gone/qwen")]
)
def test_a_checkpoint_whose_encoder_is_not_there_is_refused(
    random_run: Path, tmp_path: Path, stage: dict[str, str], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        PictureModel.load(spoilt(random_run, tmp_path / "run", **stage), torch.device("cpu"))


# --- Files ----------------------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def test_a_picture_says_what_made_it_and_so_does_the_file_beside_it(tmp_path: Path, model: PictureModel) -> None:
    path = save_picture(tmp_path, PIXELS, "空, red star", 3, SMALL, model.made_with)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), PIXELS)
    origin = read_origin(path)
    assert origin == json.loads(path.with_suffix(".json").read_text())
    assert origin == {"prompt": "空, red star", "seed": 3, **asdict(SMALL), **model.made_with}
    assert origin["checkpoint"]["step"] == 1
    assert path.name.startswith("000003-red-star-")


def test_no_picture_overwrites_one_of_other_settings_or_another_checkpoint(tmp_path: Path) -> None:
    def name(settings: Settings = SMALL, step: int = 1) -> str:
        return save_picture(tmp_path, PIXELS, "a", 3, settings, {"checkpoint": {"step": step}}).name

    assert name() == name()
    assert len({name(), name(replace(SMALL, zoom=2.0)), name(step=2)}) == 3


def test_a_file_that_does_not_say_what_made_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="is not there"):
        read_origin(path)
    for data, named in (
        (b"", "no PNG"),
        (b"not a picture", "no PNG"),
        (picture_png(PIXELS, {"pictures": []}), "sheet"),
        (picture_png(PIXELS, [1]), "does not say"),  # type: ignore[arg-type]
        (_png_without_text(), "does not say"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=named):
            read_origin(path)


def _png_without_text() -> bytes:
    buffer = BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_damaged_png_is_refused_or_says_the_same(tmp_path: Path) -> None:
    origin = {"prompt": "red star", "seed": 3, **asdict(SMALL)}
    whole = picture_png(PIXELS, origin)
    path, rng = tmp_path / "a.png", np.random.default_rng(0)
    refused = 0
    for number in range(400):
        data = bytearray(whole)
        if number % 2:
            data = data[: rng.integers(len(data) - 20)]
        else:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            found = read_origin(path)
        except ValueError:
            refused += 1
        else:
            assert found == origin
    assert refused > 250
