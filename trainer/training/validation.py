"""Evaluation of the averaged weights during training: loss on held-out samples, and pictures of fixed prompts.

Every worker computes a share of both. The caller sums and gathers the shares.

Axes: B batch, C latent channels, H W latent rows and columns, T the fixed times.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from trainer.diffusion.conditioning import aspect, crop_positions
from trainer.diffusion.flow import TIMES, draw_noise, flow_loss, interpolate, velocity_target
from trainer.drawing.picture_files import Pixels
from trainer.drawing.picture_model import PictureModel
from trainer.drawing.settings import SamplingSettings
from trainer.model.config import XUTConfig
from trainer.model.xut import XUT
from trainer.runs.ema import EMA
from trainer.training.loop import TrainingInputs
from trainer.training.metrics import Line

T = TypeVar("T")

# Changes a sample's key, so that validation never uses the noise of training.
_OWN_NOISE = 0x5851F42D4C957F2D
_PICTURES_AT_ONCE = 4  # there is little free memory during training


def validation_line(sums: Sequence[float]) -> Line:
    """Mean loss, and loss at each of TIMES, from the result of `validation_losses` summed over the workers.

    Every evaluation of a run uses the same samples and noise, so its results can be compared.
    """
    *losses, samples = sums
    means = [loss / samples for loss in losses]
    return {"loss": sum(means) / len(means), **{f"loss_at_{t}": mean for t, mean in zip(TIMES, means, strict=True)}}


@torch.no_grad()
def validation_losses(
    velocity: Callable[..., Tensor],
    batches: Iterable[TrainingInputs],
    *,
    resolution: int,
    config: XUTConfig,
    loss_weight_C: Tensor,
) -> Tensor:
    """(T + 1,) float64 on the device: the samples' losses at each of TIMES, summed, and the number of samples.

    `velocity` is XUT's forward pass with averaged weights, see `Loop.evaluation_model`. `batches` are the share of one
    worker and may be empty. The sums of all workers can be added.
    """
    sums = torch.zeros(len(TIMES) + 1, dtype=torch.float64, device=loss_weight_C.device)
    for inputs in batches:
        sums[:-1] += _losses(velocity, inputs, resolution, config, loss_weight_C)
        sums[-1] += len(inputs.keys_B)
    return sums


def _losses(
    velocity: Callable[..., Tensor], inputs: TrainingInputs, resolution: int, config: XUTConfig, loss_weight_C: Tensor
) -> Tensor:
    """(T,): summed over the samples, without TREAD."""
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
def averaged_weights(model: XUT, ema: EMA) -> Iterator[XUT]:
    """The model in evaluation mode with averaged weights. Mode and weights are restored at the end."""
    training = model.training
    try:
        with ema.applied(model):
            yield model.eval()
    finally:
        model.train(training)


# --- Pictures of fixed prompts ----------------------------------------------------------------------------------------


def draw_share(
    model: PictureModel,
    ema: EMA,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: SamplingSettings,
    rank: int,
    workers: int,
) -> list[Pixels]:
    """Pictures of prompts[rank::workers] with averaged weights, as trainer/sample.py draws them.

    `model` shares its weights with the training. They are restored at the end.
    """
    prompts, seeds = prompts[rank::workers], seeds[rank::workers]
    pictures: list[Pixels] = []
    with averaged_weights(model.model, ema):
        for start in range(0, len(prompts), _PICTURES_AT_ONCE):
            group = slice(start, start + _PICTURES_AT_ONCE)
            pictures += model.draw(prompts[group], seeds[group], settings)
    return pictures


def interleave(shares: Sequence[Sequence[T]]) -> list[T]:
    """Inverse of splitting items into items[rank::workers]: the items in order, from the shares in rank order."""
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]
