"""Which pictures are the same picture, and which one of them stays. Pure: columns in, one answer a row out.

Two rows are the same where their bytes have one content hash; where their 64-bit perceptual hashes differ in at most
four bits and their shapes are alike; or where a Danbooru post names the Pixiv work, they differ in at most eight bits
and no other page of the work is nearer. Groups are joined transitively. The answer depends on the rows, never on their
order.

Axes: N rows, U rows that differ in perceptual hash or shape, P rows of Pixiv.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipeline.images import FLAT

NEAR_BITS: Final = 4
# Of a picture that its post links to: saved anew and resized it may have moved a little further. Of two random pictures
# one in three billion is so near; the pages of a work are often variants of one another, hence the nearest alone.
LINKED_BITS: Final = 8
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


def groups(
    content_N: NDArray[np.uint64],
    phash_N: NDArray[np.uint64],
    aspect_N: NDArray[np.float64],
    links: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> NDArray[np.int64]:
    """Each row's group, named by its lowest row: (N,).

    content is any hash of the bytes, aspect is width / height; links are pairs of rows that are known to be the same
    picture. A flat picture (images.FLAT) is only ever like another by its bytes or a link.
    """
    lengths = {len(column) for column in (content_N, phash_N, aspect_N)}
    assert len(lengths) == 1, lengths
    parent_N, log_aspect_N = np.arange(len(content_N)), np.log(aspect_N)
    _, first, same_N = np.unique(content_N, return_index=True, return_inverse=True)
    _join(parent_N, np.arange(len(content_N)), first[same_N])
    if links:
        _join(parent_N, *links)

    structured = np.lexsort((log_aspect_N, phash_N))
    structured = structured[phash_N[structured] != FLAT]
    new = np.ones(len(structured), bool)
    new[1:] = (np.diff(phash_N[structured]) != 0) | (np.diff(log_aspect_N[structured]) != 0)
    row_U = structured[new]
    _join(parent_N, structured, row_U[np.cumsum(new) - 1])
    for left, right in near_pairs(phash_N[row_U]):
        left, right = row_U[left], row_U[right]
        alike = _same_shape(log_aspect_N, left, right)
        _join(parent_N, left[alike], right[alike])
    return parent_N


def best_first(ids: Sequence[str], pixels: Sequence[int]) -> list[int]:
    """These rows, the one to keep first: the one with most pixels, else Danbooru's (its tags are better), else the
    lowest id. ids are <source>:<number> or <source>:<number>_p<page>, pixels is width x height."""
    return sorted(range(len(ids)), key=lambda row: _rank(ids[row], pixels[row]))


def _rank(name: str, pixels: int) -> tuple[int, bool, list[int], str]:
    source, _, number = name.partition(":")
    return -pixels, source != "danbooru", [int(digits) for digits in re.findall(r"\d+", number)], name


def page_links(
    linked_work_N: NDArray[np.int64],
    work_N: NDArray[np.int64],
    page_N: NDArray[np.int64],
    phash_N: NDArray[np.uint64],
    aspect_N: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of Danbooru and of Pixiv, left and right, that are the same picture by the post's own word.

    linked_work is the Pixiv work that a row was taken from, work the one that a row is a page of; -1 for none. Which
    page it was posts do not say reliably: it is the one that looks most like the post, of equals the first.
    """
    row_P = np.lexsort((page_N, work_N))
    row_P = row_P[np.searchsorted(work_N[row_P], 0) :]
    posts = np.flatnonzero(linked_work_N >= 0)
    start = np.searchsorted(work_N[row_P], linked_work_N[posts])
    count = np.searchsorted(work_N[row_P], linked_work_N[posts], side="right") - start
    left = np.repeat(posts, count)
    right = row_P[np.repeat(start - (np.cumsum(count) - count), count) + np.arange(count.sum())]
    bits = np.bitwise_count(phash_N[left] ^ phash_N[right])
    linked = (bits <= LINKED_BITS) & _same_shape(np.log(aspect_N), left, right)
    left, right, bits = left[linked], right[linked], bits[linked]
    nearest = np.lexsort((page_N[right], bits, left))
    nearest = nearest[np.unique(left[nearest], return_index=True)[1]]
    return left[nearest], right[nearest]


def _same_shape(
    log_aspect_N: NDArray[np.float64], left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.bool_]:
    alike: NDArray[np.bool_] = np.abs(log_aspect_N[left] - log_aspect_N[right]) <= np.log(NEAR_ASPECT)
    return alike


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
