"""Counter-based random numbers for training samples.

Every random number of a sample is a hash of (seed, epoch, position), its purpose and its index. There is no state, so a
sample has the same noise and time in any batch, on any worker and device, and resuming needs no saved generator.

Does not import torch, like everything that read tasks import: they are separate processes, which torch would make
160 MB larger and a second slower to start.

Axes: B batch, N elements.
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
    """The purpose of a random number. The streams of a sample are independent of each other."""

    TIME = 1
    NOISE = 2
    CROP = 3
    CAPTION = 4


def _mix(x: Integers) -> Integers:
    """SplitMix64's finaliser on int64: a bijection; each input bit flips each output bit with probability 1/2."""
    # int64 has only an arithmetic shift; the masks remove the copies of the sign bit.
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@overload
def sample_key(seed: int, epoch: int, position: int) -> int: ...
@overload
def sample_key(seed: int, epoch: int, position: NDArray[np.integer[Any]]) -> NDArray[np.int64]: ...
def sample_key(seed: int, epoch: int, position: int | NDArray[np.integer[Any]]) -> int | NDArray[np.int64]:
    """The int64 key of the sample at `position` of an epoch; an array of positions gives an array of keys.

    Positions of one (seed, epoch) have distinct keys, because the last step is a bijection of the position. Raises
    ValueError for a negative seed or epoch.
    """
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed {seed} and epoch {epoch} must not be negative")
    key = np.zeros(1, dtype=np.int64)
    for part in (seed, epoch, position):
        key = _mix(key + (np.atleast_1d(np.asarray(part, dtype=np.int64)) + 1) * _GOLDEN)
    return key.reshape(position.shape) if isinstance(position, np.ndarray) else int(key[0])


def sample_generator(key: int, stream: Stream) -> np.random.Generator:
    """A numpy generator (Philox) keyed by (key, stream), for code that draws a varying number of values."""
    return np.random.Generator(np.random.Philox(key=[key % (1 << 64), int(stream)]))


def keyed_bits(key_B: Integers, index_N: Integers, stream: Stream) -> Integers:
    """Random int64 (B, N), in torch or numpy, as a function of (key, stream, index); indices in [0, 2^56).

    The index is mixed before it is added to the key. With plain SplitMix64 the noise of two samples could be the same
    sequence, a few elements apart.
    """
    return _mix(key_B[:, None] + _mix((index_N + (int(stream) << 56) + 1) * _GOLDEN))


def keyed_uniform(key_B: NDArray[np.int64], count: int, stream: Stream) -> NDArray[np.float32]:
    """Uniform values (B, count) in [0, 1), multiples of 2^-24."""
    bits = keyed_bits(key_B, np.arange(count), stream)
    return ((bits >> 40) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)
