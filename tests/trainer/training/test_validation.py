"""Validation losses against closed forms, and pictures of fixed prompts drawn by one or several workers."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.diffusion.flow import TIMES, draw_noise
from trainer.drawing.picture_model import PictureModel
from trainer.drawing.settings import SamplingSettings
from trainer.encoders.load_codec import load_codec
from trainer.encoders.text import build_local_text_encoder, load_text_encoder
from trainer.model.config import XUTConfig
from trainer.model.xut import XUT
from trainer.runs.ema import EMA
from trainer.training.loop import TrainingInputs
from trainer.training.validation import (
    averaged_weights,
    draw_share,
    interleave,
    validation_line,
    validation_losses,
)

CHANNELS, SIDE = 4, 16  # of latents
CONFIG = XUTConfig.tiny(in_channels=CHANNELS, text_dim=16, dim=32)
ONES_C = torch.ones(CHANNELS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """With several threads such small products are many times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(count: int = 3, latents: float = 0.0) -> TrainingInputs:
    """Crops of 128 pixels from pictures twice as wide as high."""
    text = torch.randn(count, 5, 16, generator=torch.Generator().manual_seed(0))
    return TrainingInputs(
        latents_BCHW=torch.full((count, CHANNELS, SIDE, SIDE), latents),
        text_BTD=text,
        text_mask_BT=torch.ones(count, 5, dtype=torch.bool),
        frame_B4=torch.tensor([[10.0, 0.0, 256.0, 128.0]]).repeat(count, 1),
        keys_B=torch.arange(100, 100 + count),
    )


def part(whole: TrainingInputs, start: int, stop: int) -> TrainingInputs:
    given = {name: value for name, value in vars(whole).items() if value is not None}
    return TrainingInputs(**{name: value[start:stop] for name, value in given.items()})


def evaluate(velocity: Callable[..., Tensor], *batches: TrainingInputs, weight_C: Tensor = ONES_C) -> Tensor:
    return validation_losses(velocity, batches, resolution=128, config=CONFIG, loss_weight_C=weight_C)


def tiny() -> XUT:
    """A model whose weights are all random, including those that start at zero."""
    torch.manual_seed(0)
    model = XUT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# --- Losses -----------------------------------------------------------------------------------------------------------


def test_an_error_equal_to_the_time_costs_its_square_at_each_of_eight_times() -> None:
    """With latents of 0, x_t is t * noise, so x_t / t is the exact velocity."""

    def late(x_BCHW: Tensor, t_B: Tensor, **_: Any) -> Tensor:
        t_B111 = t_B[:, None, None, None]
        return x_BCHW / t_B111 + t_B111

    sums = evaluate(late, inputs(2), inputs(3))
    assert sums[-1] == 5, "samples"
    assert TIMES == (1 / 16, 3 / 16, 5 / 16, 7 / 16, 9 / 16, 11 / 16, 13 / 16, 15 / 16)
    line = validation_line(sums.tolist())
    assert line == pytest.approx({"loss": 85 / 256} | {f"loss_at_{t}": t**2 for t in TIMES}, rel=1e-4)


def test_predicting_zero_costs_the_variance_of_noise_and_data() -> None:
    """Target noise - 2: mean square 1 + 4, here over 8 x 3,072 draws. Channels are weighted."""
    nothing = lambda x_BCHW, t_B, **_: torch.zeros_like(x_BCHW)  # noqa: E731
    assert validation_line(evaluate(nothing, inputs(latents=2.0)).tolist())["loss"] == pytest.approx(5, rel=0.02)
    only_first = torch.tensor([4.0, 0.0, 0.0, 0.0])
    weighted = evaluate(nothing, inputs(latents=2.0), weight_C=only_first)
    assert validation_line(weighted.tolist())["loss"] == pytest.approx(5, rel=0.05)


def test_noise_repeats_at_every_evaluation_and_differs_between_times_and_from_training() -> None:
    seen: list[Tensor] = []

    def noise(x_BCHW: Tensor, t_B: Tensor, **_: Any) -> Tensor:
        seen.append((x_BCHW / t_B[:, None, None, None]).flatten())
        return x_BCHW

    assert torch.equal(evaluate(noise, inputs()), evaluate(noise, inputs()))
    first, again = torch.stack(seen[:8]), torch.stack(seen[8:])
    assert torch.equal(first, again)
    training = draw_noise(inputs().keys_B, (CHANNELS, SIDE, SIDE)).flatten()
    related = torch.corrcoef(torch.cat([first, training[None]])) - torch.eye(9)
    assert related.abs().max() < 0.1  # 3,072 values: 0.018 by chance


def test_the_shares_of_workers_of_any_size_add_up_to_the_whole() -> None:
    model, whole = tiny(), inputs(5, latents=0.5)
    expected = evaluate(model, whole)
    shares = [
        evaluate(model, part(whole, 0, 1), part(whole, 1, 3)),
        evaluate(model, part(whole, 3, 5)),
        evaluate(model),
    ]
    torch.testing.assert_close(sum(shares), expected, rtol=1e-5, atol=0)
    assert shares[-1].tolist() == [0.0] * 9


def test_the_loss_depends_on_the_crops_position_and_has_no_gradient() -> None:
    model, sample = tiny(), inputs(latents=0.5)
    here = evaluate(model, sample)
    moved = replace(sample, frame_B4=sample.frame_B4 + torch.tensor([60.0, 0.0, 0.0, 0.0]))
    assert not torch.allclose(evaluate(model, moved), here, rtol=1e-5)
    assert not here.requires_grad


def test_averaged_weights_are_only_in_place_inside_the_block() -> None:
    model = tiny().train()
    ema = EMA(model, decay=0.9)
    average = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    before = evaluate(model, inputs(latents=0.5))
    with averaged_weights(model, ema) as evaluated:
        assert not evaluated.training
        assert torch.equal(evaluate(evaluated, inputs(latents=0.5)), evaluate(average, inputs(latents=0.5)))
    assert model.training
    assert torch.equal(evaluate(model, inputs(latents=0.5)), before)
    assert not torch.equal(evaluate(average, inputs(latents=0.5)), before)


# --- Pictures of fixed prompts ----------------------------------------------------------------------------------------

SETTINGS = SamplingSettings(width=32, height=32, steps=3)
PROMPTS = ("red ball", "blue fish, night sky", "a green tree", "pink cat", "yellow star")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> PictureModel:
    """A model in training on 32-pixel crops."""
    folder = tmp_path_factory.mktemp("live")
    build_local_text_encoder(PROMPTS, folder / "text_encoder", seed=0)
    encoder, codec = load_text_encoder(folder / "text_encoder"), load_codec("dct")
    torch.manual_seed(0)
    model = XUT(XUTConfig.tiny(in_channels=codec.channels, patch_size=1, text_dim=encoder.dim, dim=32))
    with torch.no_grad():
        model.patch_out.weight.normal_(std=0.2)
    return PictureModel(
        model, codec, encoder, 16, torch.device("cpu"), 0, {"stage": {"resolution": 32}}, Path(folder)
    )  # fmt: skip


def test_pictures_show_the_averages_for_any_number_of_workers(live: PictureModel) -> None:
    seeds = [7, 8, 9, 10, 11]
    expected = np.stack(live.draw(PROMPTS, seeds, SETTINGS))
    assert expected.std(axis=0).mean() > 5, "the pictures differ"
    ema = EMA(live.model, decay=0.9)
    kept = {name: weight.clone() for name, weight in live.model.state_dict().items()}
    with torch.no_grad():
        live.model.patch_out.weight.mul_(2)
    for workers in (1, 2, 7):
        shares = [draw_share(live, ema, PROMPTS, seeds, SETTINGS, rank, workers) for rank in range(workers)]
        pictures = np.stack(interleave(shares))
        assert pictures.shape == (5, 32, 32, 3)
        assert np.abs(pictures.astype(int) - expected).max() <= 1  # batches of other sizes may round differently
    assert torch.equal(live.model.patch_out.weight, 2 * kept["patch_out.weight"])
    live.model.load_state_dict(kept)


def test_in_bf16_the_pictures_are_nearly_the_same(live: PictureModel) -> None:
    fp32 = np.stack(live.draw(PROMPTS[:2], [0, 1], SETTINGS)).astype(int)
    bf16 = np.stack(replace(live, precision="bf16").draw(PROMPTS[:2], [0, 1], SETTINGS)).astype(int)
    assert 0 < np.abs(fp32 - bf16).mean() < 2  # of 255


@pytest.mark.parametrize("workers", [1, 3, 5, 8])
def test_interleaving_restores_the_order_of_split_items(workers: int) -> None:
    items = list(range(7))
    assert interleave([items[rank::workers] for rank in range(workers)]) == items
