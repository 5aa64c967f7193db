"""Which pictures are the same picture, and which one of them stays. Pure: columns in, one answer a row out.

Two rows are the same where their bytes have one content hash, or where their 64-bit perceptual hashes differ in at most
four bits and their shapes are alike; groups are joined transitively. The answer depends on the rows, never on their
order.

Axes: N rows, U rows that differ in perceptual hash or shape.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.images import FLAT

NEAR_BITS: Final = 4
# A copy keeps its width / height, but for rounding and a trimmed edge. Of 4,000 drawings of one object on a plain
# ground, 122 pairs were near by chance, 32 of them of one shape.
NEAR_ASPECT: Final = 1.05

# Four differing bits leave at least two of six blocks untouched. So every near pair agrees in all bits of some two
# blocks, 21 or 22 bits: 15 sorts, and among a million hashes a quarter million chance pairs to look at after each. With
# five blocks of which one must agree, the least that would do, these were 60 million.
_BLOCKS = 6
_INTACT = _BLOCKS - NEAR_BITS

# Hashes that agree in two blocks are compared with the next so many of their kind, by number. More than that are only
# found where simple pictures crowd together; there near pairs may be missed, but the work stays bounded.
_LONGEST_LOOK = 1024
_PAIRS_AT_ONCE = 1 << 22


def keepers(
    ids: Sequence[str],
    content: Sequence[Hashable],
    phash: NDArray[np.uint64],
    pixels: NDArray[np.int64],
    aspect: NDArray[np.float64] | None = None,
) -> list[str | None]:
    """For each row the id of the row that is kept in its place, None where it is kept itself.

    ids are <source>:<number> or <source>:<number>_p<page>, content is any hash of the bytes, pixels is width x height,
    aspect is width / height; without it, pictures of different shapes count as alike. Of a group the one with most
    pixels is kept, else Danbooru's (its tags are better), else the lowest id. A flat picture (images.FLAT) is only ever
    like another by its bytes. ValueError where an id occurs twice.
    """
    aspect = np.ones(len(ids)) if aspect is None else aspect
    lengths = {len(column) for column in (ids, content, phash, pixels, aspect)}
    assert len(lengths) == 1, lengths
    if len(set(ids)) < len(ids):
        name, times = Counter(ids).most_common(1)[0]
        raise ValueError(f"id {name} occurs {times} times; give every picture an id of its own")
    group_N = _groups(content, phash, np.log(aspect))
    shared_N = np.bincount(group_N, minlength=len(ids))[group_N] > 1
    kept: dict[int, int] = {}
    for row in sorted(np.flatnonzero(shared_N).tolist(), key=lambda row: _rank(ids[row], int(pixels[row]))):
        kept.setdefault(int(group_N[row]), row)
    return [
        ids[kept[group]] if shared and kept[group] != row else None
        for row, (group, shared) in enumerate(zip(group_N.tolist(), shared_N.tolist(), strict=True))
    ]


def _rank(name: str, pixels: int) -> tuple[int, bool, list[int], str]:
    """Sorts the one to keep first."""
    source, _, number = name.partition(":")
    return -pixels, source != "danbooru", [int(digits) for digits in re.findall(r"\d+", number)], name


def near_pairs(hash_U: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The places, left and right, of the pairs of these sorted hashes that differ in at most NEAR_BITS bits; in pieces,
    a pair possibly more than once."""
    for intact in combinations(range(_BLOCKS), _INTACT):
        key_U = hash_U & _bits_of(intact)
        order_U = np.argsort(key_U, kind="stable")
        for left, right in _near_neighbours(key_U[order_U], hash_U[order_U]):
            yield order_U[left], order_U[right]


def _near_neighbours(
    key_U: NDArray[np.uint64], hash_U: NDArray[np.uint64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The near pairs among hashes of equal key, in large pieces; both sorted by key."""
    found: list[NDArray[np.int64]] = []
    left = np.arange(len(key_U))
    for distance in range(1, _LONGEST_LOOK + 1):
        left = left[: np.searchsorted(left, len(key_U) - distance)]
        # Where a hash and the one at this distance have different keys, so have all beyond.
        left = left[key_U[left] == key_U[left + distance]]
        near = left[np.bitwise_count(hash_U[left] ^ hash_U[left + distance]) <= NEAR_BITS]
        found.append(np.stack([near, near + distance]))
        if not len(left) or distance == _LONGEST_LOOK or sum(map(np.size, found)) > 2 * _PAIRS_AT_ONCE:
            first, second = np.concatenate(found, axis=1)
            yield first, second
            found.clear()
        if not len(left):
            return


def _bits_of(blocks: tuple[int, ...]) -> np.uint64:
    """A mask. A block is every sixth bit, so that each has its share of the low frequencies, in which pictures vary,
    and of the high ones, in which simple pictures are alike."""
    return np.uint64(sum(1 << bit for bit in range(64) if bit % _BLOCKS in blocks))


def _groups(
    content: Sequence[Hashable], phash: NDArray[np.uint64], log_aspect: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Each row's group, named by its lowest row: (N,)."""
    parent_N = np.arange(len(content))
    first: dict[Hashable, int] = {}
    same_N = np.fromiter((first.setdefault(digest, row) for row, digest in enumerate(content)), np.int64, len(content))
    _join(parent_N, np.arange(len(content)), same_N)

    structured = np.lexsort((log_aspect, phash))
    structured = structured[phash[structured] != FLAT]
    new = np.ones(len(structured), bool)
    new[1:] = (np.diff(phash[structured]) != 0) | (np.diff(log_aspect[structured]) != 0)
    row_U = structured[new]
    _join(parent_N, structured, row_U[np.cumsum(new) - 1])
    for left, right in near_pairs(phash[row_U]):
        left, right = row_U[left], row_U[right]
        alike = np.abs(log_aspect[left] - log_aspect[right]) <= np.log(NEAR_ASPECT)
        _join(parent_N, left[alike], right[alike])
    return parent_N


def _join(parent_N: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
    """Join the groups of each left and right row, in place. Before and after, each row's parent is the lowest row of
    its group."""
    while True:
        left, right = parent_N[left], parent_N[right]
        apart = left != right
        if not apart.any():
            return
        left, right = left[apart], right[apart]
        np.minimum.at(parent_N, np.maximum(left, right), np.minimum(left, right))
        while ((grandparent_N := parent_N[parent_N]) != parent_N).any():
            parent_N[:] = grandparent_N
