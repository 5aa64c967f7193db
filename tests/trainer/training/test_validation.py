"""Validation losses against closed forms, and pictures of fixed prompts drawn by one worker or several."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.diffusion.flow import draw_noise
from trainer.drawing.pictures import PictureModel
from trainer.encoders.load_codec import load_codec
from trainer.encoders.text import build_local_text_encoder, load_text_encoder
from trainer.model.xut import XUT, XUTConfig
from trainer.runs.ema import EMA
from trainer.training.loop import Inputs
from trainer.training.validation import (
    TIMES,
    GridConfig,
    Validation,
    averaged,
    dealt_back,
    draw_share,
    validation_losses,
)

CHANNELS, SIDE = 4, 16  # of latents
CONFIG = XUTConfig.tiny(in_channels=CHANNELS, text_dim=16, dim=32)
ONES_C = torch.ones(CHANNELS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Such small products take many times as long where threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(count: int = 3, latents: float = 0.0) -> Inputs:
    """Crops of 128 pixels from pictures twice as wide as high."""
    text = torch.randn(count, 5, 16, generator=torch.Generator().manual_seed(0))
    return Inputs(
        latents_BCHW=torch.full((count, CHANNELS, SIDE, SIDE), latents),
        text_BTD=text,
        text_mask_BT=torch.ones(count, 5, dtype=torch.bool),
        frame_B4=torch.tensor([[10.0, 0.0, 256.0, 128.0]]).repeat(count, 1),
        keys_B=torch.arange(100, 100 + count),
    )


def part(whole: Inputs, start: int, stop: int) -> Inputs:
    return Inputs(**{name: value[start:stop] for name, value in vars(whole).items()})


def evaluate(velocity: Callable[..., Tensor], *batches: Inputs, weight_C: Tensor = ONES_C) -> Tensor:
    return validation_losses(velocity, batches, resolution=128, config=CONFIG, loss_weight_C=weight_C)


def tiny() -> XUT:
    """All of its weights are random, those that start at zero too."""
    torch.manual_seed(0)
    model = XUT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# --- Losses -----------------------------------------------------------------------------------------------------------


def test_an_error_that_is_the_time_itself_costs_its_square_at_each_of_eight_times() -> None:
    """Latents of 0: x_t is t * noise, so that x_t / t is the whole answer."""

    def late(x_BCHW: Tensor, t_B: Tensor, **_: Any) -> Tensor:
        t_B111 = t_B[:, None, None, None]
        return x_BCHW / t_B111 + t_B111

    found = Validation.of(evaluate(late, inputs(2), inputs(3)))
    assert found.samples == 5
    assert TIMES == (1 / 16, 3 / 16, 5 / 16, 7 / 16, 9 / 16, 11 / 16, 13 / 16, 15 / 16)
    assert found.losses == pytest.approx([t**2 for t in TIMES], rel=1e-4)
    assert found.loss == pytest.approx(85 / 256)  # (1 + 9 + ... + 225) / 256 / 8
    assert found.line() == {"loss": found.loss} | {
        f"loss_at_{t}": loss for t, loss in zip(TIMES, found.losses, strict=True)
    }


def test_answering_nothing_costs_the_variance_of_noise_and_data() -> None:
    """Target noise - 2: mean square 1 + 4, here over 8 x 3,072 draws; channels count by their weights."""
    nothing = lambda x_BCHW, t_B, **_: torch.zeros_like(x_BCHW)  # noqa: E731
    assert Validation.of(evaluate(nothing, inputs(latents=2.0))).loss == pytest.approx(5, rel=0.02)
    only_first = torch.tensor([4.0, 0.0, 0.0, 0.0])
    assert Validation.of(evaluate(nothing, inputs(latents=2.0), weight_C=only_first)).loss == pytest.approx(5, rel=0.05)


def test_noise_is_the_same_at_every_evaluation_another_at_every_time_and_not_that_of_training() -> None:
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


def test_the_shares_of_workers_add_up_to_the_whole_whatever_their_sizes() -> None:
    model, whole = tiny(), inputs(5, latents=0.5)
    expected = evaluate(model, whole)
    shares = [
        evaluate(model, part(whole, 0, 1), part(whole, 1, 3)),
        evaluate(model, part(whole, 3, 5)),
        evaluate(model),
    ]
    torch.testing.assert_close(sum(shares), expected, rtol=1e-5, atol=0)
    assert shares[-1].tolist() == [0.0] * 9
    with pytest.raises(ValueError, match="hold out"):
        Validation.of(shares[-1])


def test_the_model_is_told_where_its_crop_lies_and_gets_no_gradient() -> None:
    model, sample = tiny(), inputs(latents=0.5)
    here = evaluate(model, sample)
    moved = replace(sample, frame_B4=sample.frame_B4 + torch.tensor([60.0, 0.0, 0.0, 0.0]))
    assert not torch.allclose(evaluate(model, moved), here, rtol=1e-5)
    assert not here.requires_grad


def test_inside_averaged_the_model_has_the_averages_and_after_it_what_it_had() -> None:
    model = tiny().train()
    ema = EMA(model, decay=0.9)
    average = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    before = evaluate(model, inputs(latents=0.5))
    with averaged(model, ema) as evaluated:
        assert not evaluated.training
        assert torch.equal(evaluate(evaluated, inputs(latents=0.5)), evaluate(average, inputs(latents=0.5)))
    assert model.training
    assert torch.equal(evaluate(model, inputs(latents=0.5)), before)
    assert not torch.equal(evaluate(average, inputs(latents=0.5)), before)


# --- Pictures of fixed prompts ----------------------------------------------------------------------------------------

PROMPTS = ("red ball", "blue fish, night sky", "a green tree", "pink cat", "yellow star")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> PictureModel:
    """The parts of a training of 32-pixel crops."""
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


def test_pictures_are_those_of_the_averages_however_many_workers_draw_them(live: PictureModel) -> None:
    config = GridConfig(prompts=PROMPTS, seed=7, steps=3, at_once=2)
    expected = np.stack(live.draw(PROMPTS, [7, 8, 9, 10, 11], config.settings(32)))
    assert expected.std(axis=0).mean() > 5, "the pictures differ"
    ema = EMA(live.model, decay=0.9)
    kept = {name: weight.clone() for name, weight in live.model.state_dict().items()}
    with torch.no_grad():
        live.model.patch_out.weight.mul_(2)
    for workers in (1, 2, 7):
        shares = [draw_share(live, ema, config, rank, workers) for rank in range(workers)]
        pictures = np.stack(dealt_back(shares))
        assert pictures.shape == (5, 32, 32, 3)
        assert np.abs(pictures.astype(int) - expected).max() <= 1  # sums of a batch of another size may round otherwise
    assert torch.equal(live.model.patch_out.weight, 2 * kept["patch_out.weight"])
    live.model.load_state_dict(kept)


def test_in_bf16_the_pictures_are_nearly_the_same(live: PictureModel) -> None:
    settings = GridConfig(prompts=PROMPTS, steps=3).settings(32)
    fp32 = np.stack(live.draw(PROMPTS[:2], [0, 1], settings)).astype(int)
    bf16 = np.stack(replace(live, precision="bf16").draw(PROMPTS[:2], [0, 1], settings)).astype(int)
    assert 0 < np.abs(fp32 - bf16).mean() < 2  # of 255


@pytest.mark.parametrize("workers", [1, 3, 5, 8])
def test_items_that_were_dealt_come_back_in_order(workers: int) -> None:
    items = list(range(7))
    assert dealt_back([items[rank::workers] for rank in range(workers)]) == items


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"prompts": ()}, "a prompt"),
        ({"at_once": 0}, "0 pictures"),
        ({"seed": -1}, "seed -1"),
        ({"steps": 0}, "0 sampling steps"),
        ({"guidance": float("nan")}, "guidance"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        GridConfig(**({"prompts": PROMPTS} | wrong))
