"""The random numbers that belong to a training sample.

Whatever is random about a sample is a hash of (seed, epoch, position), the purpose and the element's index. Nothing is
carried from draw to draw, so a sample has the same noise and time in whatever batch, worker or device it falls, and
resuming needs no random state.

Without torch, as all that loaders import: each is a process of its own, which torch would make 160 MB larger and start
a second later.
"""

from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Integers = TypeVar("Integers", "Tensor", NDArray[np.int64])

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
    """The same idea for code that wants a numpy generator (captions): Philox keyed by (key, stream)."""
    return np.random.Generator(np.random.Philox(key=[key % (1 << 64), int(stream)]))


def keyed_bits(key_B: Integers, place_N: Integers, stream: Stream) -> Integers:
    """(B, N) random int64 of torch or numpy, a function of (key, stream, place) alone; places from 0.

    The place is mixed before it is added to the key: with plain SplitMix64 two samples' noise could be the same
    sequence a few elements apart. Period: none within 2^56 elements a stream; then places run into the next stream.
    """
    return _mix(key_B[:, None] + _mix((place_N + (int(stream) << 56) + 1) * _GOLDEN))


def keyed_uniform(key_B: NDArray[np.int64], count: int, stream: Stream) -> NDArray[np.float32]:
    """(B, count), uniform on [0, 1) in steps of 2^-24."""
    bits = keyed_bits(key_B, np.arange(count), stream)
    return ((bits >> 40) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)
