"""Flow matching on the straight path, and the noise and times of training samples.

Legend: B batch, C latent channels, H W latent rows and columns. Time t runs from 0 (data) to 1 (noise).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.diffusion.keyed_random import Stream, keyed_bits


def keyed_normal(key_B: Tensor, shape: Sequence[int], stream: Stream) -> Tensor:
    """(B, *shape) fp32, standard normal: Box and Muller's transform of the two halves of one 64-bit hash.

    |value| < 6.8, beyond which 1 in 10^11 would lie. The hashes are equal on every device, the values up to the last
    bits of its log and cos.
    """
    bits = keyed_bits(key_B, torch.arange(int(np.prod(shape)), device=key_B.device), stream)
    radius = ((bits >> 32) & 0xFFFFFFFF).float().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = (bits & 0xFFFFFFFF).float().mul_(2 * torch.pi * 2.0**-32)
    return radius.mul_(angle.cos_()).view(len(key_B), *shape)


def draw_times(key_B: Tensor, shift: float = 1.0) -> Tensor:
    """t_B in (0, 1): the sigmoid of a standard normal (HDM, as SD3's logit-normal), then shifted."""
    return shift_time(torch.sigmoid(keyed_normal(key_B, (), Stream.TIME)), shift)


def draw_noise(key_B: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape), fp32."""
    return keyed_normal(key_B, shape, Stream.NOISE)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Moves times towards noise for shift > 1; 0 and 1 stay, and shift 1 changes nothing (SD3, eq. 23)."""
    if shift <= 0:
        raise ValueError(f"time shift {shift} must be above 0; 1 is no shift")
    return shift * t / (1 + (shift - 1) * t)


def shift_for_tokens(tokens: int, base_tokens: int) -> float:
    """The shift that gives `tokens` image tokens the signal-to-noise ratios of `base_tokens` (SD3, section 5.3.2)."""
    return float((tokens / base_tokens) ** 0.5)


def interpolate(x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """The point at t of the straight path from data to noise."""
    t_B111 = t_B[:, None, None, None]
    return (1 - t_B111) * x0_BCHW + t_B111 * noise_BCHW


def velocity_target(x0_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """d x_t / d t of that path, the same at every t: what the model learns to give."""
    return noise_BCHW - x0_BCHW


def flow_loss(velocity_BCHW: Tensor, target_BCHW: Tensor, weight_C: Tensor | None = None) -> Tensor:
    """loss_B, fp32: each sample's mean squared error, its channels weighted by weight_C (mean 1) where given."""
    error_BCHW = (velocity_BCHW.float() - target_BCHW.float()).square()
    if weight_C is not None:
        error_BCHW = error_BCHW * weight_C[:, None, None]
    return error_BCHW.mean(dim=(1, 2, 3))
