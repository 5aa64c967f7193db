"""How good the averaged weights are while they are trained: loss on held-out samples, and pictures of fixed prompts.

Every worker does its share of both. Knows nothing of Ray; what the shares add up to is the caller's to sum and gather.

Axes: B batch, C latent channels, H W latent rows and columns, T the fixed times.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from trainer.diffusion.conditioning import aspect, crop_positions
from trainer.diffusion.flow import draw_noise, flow_loss, interpolate, velocity_target
from trainer.drawing.pictures import PictureModel, Pixels, Settings
from trainer.model.xut import XUT, XUTConfig
from trainer.runs.ema import EMA
from trainer.training.loop import Inputs
from trainer.training.metrics import Line

T = TypeVar("T")

# The middles of eight equal parts of (0, 1).
TIMES = tuple((i + 0.5) / 8 for i in range(8))
# Turns a sample's key into another one: should a sample ever be trained on as well, it is not with this noise.
_OWN_NOISE = 0x5851F42D4C957F2D


@dataclass(frozen=True)
class Validation:
    """Mean losses over the same samples with the same noise at every step of a run, so that they can be compared."""

    samples: int
    losses: tuple[float, ...]  # at TIMES

    @classmethod
    def of(cls, sums: Tensor) -> "Validation":
        """From what `validation_losses` gives, summed over the workers. ValueError where no worker had a sample."""
        *losses, samples = sums.tolist()
        if not samples:
            raise ValueError("no held-out samples to evaluate on: hold out a larger share of the selection")
        return cls(int(samples), tuple(loss / samples for loss in losses))

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    def line(self) -> Line:
        """For a log: the mean, and the loss at each time."""
        return {"loss": self.loss, **{f"loss_at_{t}": loss for t, loss in zip(TIMES, self.losses, strict=True)}}


@torch.no_grad()
def validation_losses(
    velocity: Callable[..., Tensor],
    batches: Iterable[Inputs],
    *,
    resolution: int,
    config: XUTConfig,
    loss_weight_C: Tensor,
) -> Tensor:
    """(T + 1,) float64 on the device: the sum of the samples' losses at each of TIMES, then how many samples they are.

    One worker's share, of any number of batches, also none; the sums of several workers add up to those of all.
    `velocity` is XUT's forward pass with the averaged weights, in the training's precision: Loop.evaluation_model.
    """
    sums = torch.zeros(len(TIMES) + 1, dtype=torch.float64, device=loss_weight_C.device)
    for inputs in batches:
        sums[:-1] += _losses(velocity, inputs, resolution, config, loss_weight_C)
        sums[-1] += len(inputs.keys_B)
    return sums


def _losses(
    velocity: Callable[..., Tensor], inputs: Inputs, resolution: int, config: XUTConfig, loss_weight_C: Tensor
) -> Tensor:
    """(T,): summed over the samples. Dense, whatever the training's selection rate."""
    x_BCHW = inputs.latents_BCHW.float()
    noise_BTCHW = draw_noise(inputs.keys_B ^ _OWN_NOISE, (len(TIMES), *x_BCHW.shape[1:]))
    position_map = crop_positions(config, inputs.frame_B4, resolution, x_BCHW.shape[-1])
    aspect_B = aspect(config, inputs.frame_B4[:, 2], inputs.frame_B4[:, 3])
    losses = []
    for noise_BCHW, t in zip(noise_BTCHW.unbind(1), TIMES, strict=True):
        t_B = torch.full((len(x_BCHW),), t, device=x_BCHW.device)
        velocity_BCHW = velocity(
            interpolate(x_BCHW, noise_BCHW, t_B),
            t_B,
            text=inputs.text_BTD,
            text_mask=inputs.text_mask_BT,
            position_map=position_map,
            aspect=aspect_B,
        )
        losses.append(flow_loss(velocity_BCHW, velocity_target(x_BCHW, noise_BCHW), loss_weight_C).double().sum())
    return torch.stack(losses)


@contextmanager
def averaged(model: XUT, ema: EMA) -> Iterator[XUT]:
    """The model in evaluation mode with its averaged weights; both are as before at the end."""
    training = model.training
    try:
        with ema.applied(model):
            yield model.eval()
    finally:
        model.train(training)


# --- Pictures of fixed prompts ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """What is drawn at every evaluation. `trainer/sample.py` draws the same with these prompts, seed and settings."""

    prompts: tuple[str, ...]
    seed: int = 0  # of the first prompt; the next have seed + 1 ...
    negative: str = ""
    steps: int = 20
    guidance: float = 3.0
    at_once: int = 4  # pictures: beside a training there is little memory left

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("a grid needs a prompt at least")
        if self.at_once < 1:
            raise ValueError(f"{self.at_once} pictures at once: at least 1")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must not be negative")
        self.settings(side=1)  # has rules of its own

    @property
    def seeds(self) -> list[int]:
        return [self.seed + number for number in range(len(self.prompts))]

    def settings(self, side: int) -> Settings:
        return Settings(width=side, height=side, negative=self.negative, steps=self.steps, guidance=self.guidance)


def draw_share(model: PictureModel, ema: EMA, config: GridConfig, rank: int, workers: int) -> list[Pixels]:
    """Pictures of prompts[rank::workers], squares of the training's resolution, drawn with the averaged weights.

    `model` is made of the live parts of the training; its weights are as before at the end.
    """
    settings = config.settings(model.resolution)
    prompts, seeds = config.prompts[rank::workers], config.seeds[rank::workers]
    pictures: list[Pixels] = []
    with averaged(model.model, ema):
        for start in range(0, len(prompts), config.at_once):
            group = slice(start, start + config.at_once)
            pictures += model.draw(prompts[group], seeds[group], settings)
    return pictures


def dealt_back(shares: Sequence[Sequence[T]]) -> list[T]:
    """The inverse of giving items[rank::workers] to each worker: items in their order, from shares in the ranks'."""
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]
