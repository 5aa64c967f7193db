"""Flow matching on the straight path, and the random numbers of a training sample.

Legend: B batch, C latent channels, H W latent rows and columns. Time t runs from 0 (data) to 1 (noise).

Whatever is random about a sample is a hash of (seed, epoch, position), the purpose and the element's index. Nothing is
carried from draw to draw, so a sample has the same noise and time in whatever batch, worker or device it falls, and
resuming needs no random state.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Integers = TypeVar("Integers", Tensor, NDArray[np.int64])

# SplitMix64 (Steele, Lea and Flood 2014) with Stafford's "Mix13" constants, written as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


class Stream(IntEnum):
    """What a random number is for; the streams of one sample are independent of each other."""

    TIME = 1
    NOISE = 2
    CROP = 3
    CAPTION = 4
    ROUTING = 5


def _mix(x: Integers) -> Integers:
    """SplitMix64's finaliser on int64: a bijection in which each input bit flips each output bit half of the time."""
    # int64 has only an arithmetic shift: the mask takes off the copies of the sign.
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@overload
def sample_key(seed: int, epoch: int, position: int) -> int: ...
@overload
def sample_key(seed: int, epoch: int, position: NDArray[np.integer[Any]]) -> NDArray[np.int64]: ...
def sample_key(seed: int, epoch: int, position: int | NDArray[np.integer[Any]]) -> int | NDArray[np.int64]:
    """64-bit key (signed) of the sample at `position` of an epoch; an array of positions gives an array of keys.

    Within one (seed, epoch) no two positions share a key: the last step is a bijection of the position.
    """
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed {seed} and epoch {epoch} must not be negative")
    key = np.zeros(1, dtype=np.int64)
    for part in (seed, epoch, position):
        key = _mix(key + (np.atleast_1d(np.asarray(part, dtype=np.int64)) + 1) * _GOLDEN)
    return key.reshape(position.shape) if isinstance(position, np.ndarray) else int(key[0])


def sample_generator(key: int, stream: Stream) -> np.random.Generator:
    """The same idea for code that wants a numpy generator (captions, crops): Philox keyed by (key, stream)."""
    return np.random.Generator(np.random.Philox(key=[key % (1 << 64), int(stream)]))


def _keyed_bits(key_B: Tensor, count: int, stream: Stream) -> Tensor:
    """(B, count) random int64, a function of (key, stream, index) alone.

    The index is mixed before it is added to the key: with plain SplitMix64 two samples' noise could be the same
    sequence a few elements apart. Period: none within 2^56 elements a stream; then indices run into the next stream.
    """
    index = torch.arange(count, device=key_B.device) + (int(stream) << 56)
    return _mix(key_B[:, None] + _mix((index + 1) * _GOLDEN))


def keyed_uniform(key_B: Tensor, shape: Sequence[int], stream: Stream) -> Tensor:
    """(B, *shape) fp32, uniform on [0, 1) in steps of 2^-24."""
    bits = _keyed_bits(key_B, int(np.prod(shape)), stream)
    return ((bits >> 40) & 0xFFFFFF).float().mul_(2.0**-24).view(len(key_B), *shape)


def keyed_normal(key_B: Tensor, shape: Sequence[int], stream: Stream) -> Tensor:
    """(B, *shape) fp32, standard normal: Box and Muller's transform of the two halves of one 64-bit hash.

    |value| < 6.8, beyond which 1 in 10^11 would lie. The hashes are equal on every device, the values up to the last
    bits of its log and cos.
    """
    bits = _keyed_bits(key_B, int(np.prod(shape)), stream)
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
