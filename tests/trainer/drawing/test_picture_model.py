"""A run is loaded from disk or S3; a picture is a function of its prompt, seed and settings alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.storage.shards import Store
from trainer.drawing.picture_model import PictureModel
from trainer.drawing.settings import SamplingSettings

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["red star", "blue fish with a very long tail that swims beside a red star in the night", "", "red star"]
SEEDS = [3, 4, 5, 6]
SMALL = SamplingSettings(width=64, height=48, steps=2, negative="blue fish", shift=1.0)


@pytest.fixture(scope="module")
def model(random_run: Path) -> PictureModel:
    return PictureModel.load(random_run, torch.device("cpu"))


def test_a_run_on_s3_draws_the_same_pictures_as_its_local_copy(
    bucket: str, random_run: Path, model: PictureModel
) -> None:
    remote = Store(f"{bucket}/sampled")
    for name in Store(str(random_run)).sizes():
        remote.write(name, (random_run / name).read_bytes())
    settings = SamplingSettings(width=64, height=64, steps=2)
    picture = model.draw(["red star"], [3], settings)[0]
    assert picture.std() > 0
    remote_model = PictureModel.load(remote.root, torch.device("cpu"))
    assert remote_model.steps_taken == remote_model.made_with["checkpoint"]["step"] == 1
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
def test_latents_of_a_seed_do_not_depend_on_the_batch(model: PictureModel, changed: dict[str, Any]) -> None:
    settings = replace(SMALL, **changed)
    together = model.latents(PROMPTS, SEEDS, settings)
    alone = torch.cat([model.latents([p], [s], settings) for p, s in zip(PROMPTS, SEEDS, strict=True)])
    assert together.shape == (4, 16, 6, 8)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert (together[0] - together[3]).abs().max() > 0.1, "two seeds"


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


def test_equal_rates_take_one_forward_pass_per_step_and_different_ones_two(model: PictureModel) -> None:
    passes: list[int] = []
    with model.model.register_forward_pre_hook(lambda module, args: passes.append(len(args[0]))):
        for rate, other in [(0.0, 0.0), (0.5, 0.5), (0.0, 0.5)]:
            model.latents(["a", "b"], [0, 1], replace(SMALL, steps=1, selection_rate=rate, unconditional_rate=other))
    assert passes == [4, 4, 2, 2]


def test_a_picture_of_more_tokens_than_the_training_crops_spends_more_steps_near_noise(model: PictureModel) -> None:
    """SD3, section 5.3.2: the square root of the ratio of the numbers of tokens."""
    assert model.time_shift(SamplingSettings(width=64, height=64)) == 1
    assert model.time_shift(SamplingSettings(width=256, height=64)) == pytest.approx(2)
    assert model.time_shift(SamplingSettings(width=256, height=64, shift=1.5)) == 1.5


def test_batches_are_as_large_as_the_size_of_the_pictures_allows(model: PictureModel) -> None:
    assert model.max_batch(SamplingSettings(width=64, height=64)) == 32
    assert model.max_batch(SamplingSettings(width=2048, height=1024)) == 1
    steps: list[tuple[int, int]] = []
    settings = SamplingSettings(width=8, height=8, steps=2)
    pictures = model.draw(["a"] * 33, range(33), settings, on_step=lambda *step: steps.append(step))
    assert len(pictures) == 33
    assert steps == [(1, 2), (2, 2)] * 2


def test_a_picture_of_too_many_tokens_or_of_part_of_a_token_is_refused(model: PictureModel) -> None:
    assert model.round_size(SamplingSettings(width=2050, height=2046)) == SamplingSettings(width=2048, height=2048)
    with pytest.raises(ValueError, match="131072 tokens of 8 pixels, more than the 65536"):
        model.round_size(SamplingSettings(width=4096, height=2048))
    with pytest.raises(ValueError, match="not a whole number of 8-pixel tokens"):
        model.draw(["a"], [0], SamplingSettings(width=60, height=64))


# --- The checkpoint -------------------------------------------------------------------------------------------------


def with_stage(run: Path, copy: Path, **stage: object) -> Path:
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
def test_a_checkpoint_whose_encoder_is_missing_is_refused(
    random_run: Path, tmp_path: Path, stage: dict[str, str], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        PictureModel.load(with_stage(random_run, tmp_path / "run", **stage), torch.device("cpu"))


def test_a_larger_picture_starts_from_the_smaller_one_and_with_full_strength_from_noise_alone(
    model: PictureModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, changes = model.draw(["red star"], [0], SMALL)[0].astype(float), []
    for strength in (0.01, 1.0):
        [large] = model.draw(["red star"], [0], replace(SMALL, hires=2.0, hires_strength=strength))
        assert large.shape == (2 * SMALL.height, 2 * SMALL.width, 3)
        reduced = large.reshape(SMALL.height, 2, SMALL.width, 2, 3).mean((1, 3))
        changes.append(np.abs(reduced - small).mean())
    assert changes[0] < 0.5 * changes[1], "not 0: the codec of 8 x 8 blocks loses details"

    anew = replace(SMALL, hires=2.0, hires_strength=1.0)
    expected = model.latents(["red star"], [0], anew)
    encode = model.codec.encode
    monkeypatch.setattr(model.codec, "encode", lambda pixels: torch.ones_like(encode(pixels)))
    assert torch.equal(model.latents(["red star"], [0], anew), expected)
    halfway = replace(anew, hires_strength=0.5)
    changed = model.latents(["red star"], [0], halfway)
    monkeypatch.undo()
    assert not torch.equal(model.latents(["red star"], [0], halfway), changed)


def test_the_steps_of_both_sizes_are_counted_and_the_larger_size_is_checked(model: PictureModel) -> None:
    steps: list[tuple[int, int]] = []
    settings = replace(SMALL, steps=4, hires=2.0, hires_strength=0.5)
    model.draw(["a"], [0], settings, on_step=lambda *step: steps.append(step))
    assert steps == [(number, 6) for number in range(1, 7)]
    assert model.max_batch(SamplingSettings(width=1024, height=512, hires=2.0)) == 1
    with pytest.raises(ValueError, match="width 32768: must be from 1 to 4096"):
        model.round_size(SamplingSettings(width=4096, height=2048, hires=8.0))
