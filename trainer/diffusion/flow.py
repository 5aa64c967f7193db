"""Flow matching on the straight path between data and noise, and the noise and times of training samples.

Axes: B batch, C latent channels, H W latent rows and columns. Time t runs from 0 (data) to 1 (noise).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.diffusion.keyed_random import Stream, keyed_bits

TIMES = tuple((i + 0.5) / 8 for i in range(8))  # the midpoints of eight equal parts of (0, 1), to report losses by time


def keyed_normal(key_B: Tensor, shape: Sequence[int], stream: Stream) -> Tensor:
    """Standard normal values (B, *shape), float32, as a function of the keys: Box-Muller on a 64-bit hash per element.

    Values lie within +-6.8, outside of which 1 in 10^11 would fall. The hashes are equal on every device; the values
    differ in the last bits of its log and cos.
    """
    bits = keyed_bits(key_B, torch.arange(int(np.prod(shape)), device=key_B.device), stream)
    radius = ((bits >> 32) & 0xFFFFFFFF).float().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = (bits & 0xFFFFFFFF).float().mul_(2 * torch.pi * 2.0**-32)
    return radius.mul_(angle.cos_()).view(len(key_B), *shape)


def draw_times(key_B: Tensor, shift: float = 1.0) -> Tensor:
    """Training times t_B in (0, 1): sigmoid of a standard normal (HDM; the logit-normal of SD3), then `shift_time`."""
    return shift_time(torch.sigmoid(keyed_normal(key_B, (), Stream.TIME)), shift)


def draw_noise(key_B: Tensor, shape: Sequence[int]) -> Tensor:
    """Noise (B, *shape) of training samples: standard normal, float32."""
    return keyed_normal(key_B, shape, Stream.NOISE)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Multiplies the odds t / (1 - t) by `shift` (SD3, arXiv 2403.03206, eq. 23): above 1 moves times towards noise.

    Raises ValueError unless the shift is above 0; 1 is no shift.
    """
    if shift <= 0:
        raise ValueError(f"time shift {shift} must be above 0; 1 is no shift")
    return shift * t / (1 + (shift - 1) * t)


def shift_for_tokens(tokens: int, base_tokens: int) -> float:
    """The shift that gives `tokens` image tokens the signal-to-noise ratio of `base_tokens` (SD3, section 5.3.2)."""
    return float((tokens / base_tokens) ** 0.5)


def interpolate(x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """x_t = (1 - t) * x0 + t * noise, the point at t in [0, 1] on the straight path from data to noise."""
    t_B111 = t_B[:, None, None, None]
    return (1 - t_B111) * x0_BCHW + t_B111 * noise_BCHW


def velocity_target(x0_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """dx_t / dt = noise - x0, constant along the path: the target of the model."""
    return noise_BCHW - x0_BCHW


def losses_by_time(loss_B: Tensor, t_B: Tensor) -> Tensor:
    """(2, T): the samples' losses summed within each of T equal parts of (0, 1) around TIMES, and their number."""
    part_B = (t_B * len(TIMES)).long().clamp(0, len(TIMES) - 1)
    # A matrix product is summed in the same order every time, unlike index_add on a GPU, and one_hot waits for it.
    parts_BT = (part_B[:, None] == torch.arange(len(TIMES), device=t_B.device)).to(loss_B.dtype)
    return torch.stack([loss_B @ parts_BT, parts_BT.sum(0)])


def flow_loss(velocity_BCHW: Tensor, target_BCHW: Tensor, weight_C: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample (B,), float32. weight_C, with mean 1, weights the channels if given."""
    error_BCHW = (velocity_BCHW.float() - target_BCHW.float()).square()
    if weight_C is not None:
        error_BCHW = error_BCHW * weight_C[:, None, None]
    return error_BCHW.mean(dim=(1, 2, 3))
