"""Which pictures are the same picture, and which one of them stays. Pure: columns in, one answer a row out.

Two rows are the same where their bytes have one content hash; where their 64-bit perceptual hashes differ in at most
four bits and their shapes are alike; or where a Danbooru post names the Pixiv work, they differ in at most eight bits
and no other page of the work is nearer. Groups are joined transitively. The answer depends on the rows, never on their
order.

Axes: N rows, U rows that differ in perceptual hash or shape, P rows of Pixiv.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.pictures.decoder import FLAT

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

# Hashes that agree in two blocks are compared with the next so many of their kind, by number. More than that are only
# found where simple pictures crowd together; there near pairs may be missed, but the work stays bounded.
_LONGEST_LOOK = 1024
_PAIRS_AT_ONCE = 1 << 22
_ROWS_AT_ONCE = 1 << 18


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
    _join_equal(parent_N, np.argsort(content_N, kind="stable"), content_N)
    if links:
        _join(parent_N, *links)

    row_U = _join_equal(parent_N, _structured(phash_N, log_aspect_N), phash_N, log_aspect_N)
    for left, right in near_pairs(phash_N[row_U]):
        left, right = row_U[left], row_U[right]
        alike = _same_shape(log_aspect_N, left, right)
        _join(parent_N, left[alike], right[alike])
    return parent_N


def _structured(phash_N: NDArray[np.uint64], log_aspect_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """The rows that are not flat, sorted by hash, then by shape."""
    row_N = np.lexsort((log_aspect_N, phash_N))
    structured: NDArray[np.int64] = row_N[phash_N[row_N] != FLAT]
    return structured


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
    row_P = np.flatnonzero(work_N >= 0)
    row_P = row_P[np.lexsort((page_N[row_P], work_N[row_P]))]
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
    """The places, left and right, of the pairs of these sorted hashes that differ in at most NEAR_BITS bits; in large
    pieces, a pair possibly more than once."""
    found: list[NDArray[np.int32]] = []
    count = 0
    for pairs in _near_neighbours(hash_U):
        found.append(pairs)
        count += pairs.shape[1]
        if count > _PAIRS_AT_ONCE:
            yield _sides(found)
            found, count = [], 0
    yield _sides(found)


def _sides(found: list[NDArray[np.int32]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    left, right = np.concatenate([np.zeros((2, 0), np.int64), *found], axis=1)
    return left, right


def _near_neighbours(hash_U: NDArray[np.uint64]) -> Iterator[NDArray[np.int32]]:
    """As near_pairs, in small pieces, (2, pairs)."""
    for key, order_U in _sorted_by_two_blocks(hash_U):
        # In parts that a processor's cache holds: several times as fast.
        for start in range(0, len(order_U), _ROWS_AT_ONCE):
            place_U = order_U[start : start + _ROWS_AT_ONCE + _LONGEST_LOOK]
            part_U = hash_U[place_U]
            key_U = part_U & key
            left = np.arange(len(part_U))
            for distance in range(1, _LONGEST_LOOK + 1):
                left = left[: np.searchsorted(left, len(part_U) - distance)]
                # Where a hash and the one at this distance have different keys, so have all beyond.
                left = left[key_U[left] == key_U[left + distance]]
                if not len(left):
                    break
                near = left[np.bitwise_count(part_U[left] ^ part_U[left + distance]) <= NEAR_BITS]
                if len(near):
                    yield place_U[np.stack([near, near + distance])]


def _sorted_by_two_blocks(hash_U: NDArray[np.uint64]) -> Iterator[tuple[np.uint64, NDArray[np.int32]]]:
    """For every two blocks: a mask of their bits, and the places of the hashes sorted by these, then by number."""
    blocks = _blocks(hash_U)
    for first, block_U in enumerate(blocks):
        # Half the memory; of more than two thousand million pictures the other columns would not fit either.
        by_first_U = np.argsort(block_U, kind="stable").astype(np.int32)
        for second in range(first + 1, _BLOCKS):
            order_U = by_first_U[np.argsort(blocks[second][by_first_U], kind="stable")]
            yield _bits_of(first) | _bits_of(second), order_U


def _bits_of(block: int) -> np.uint64:
    """A mask. A block is every sixth bit, so that each has its share of the low frequencies, in which pictures vary,
    and of the high ones, in which simple pictures are alike."""
    return np.uint64(sum(1 << bit for bit in range(block, 64, _BLOCKS)))


def _blocks(hash_U: NDArray[np.uint64]) -> list[NDArray[np.uint16]]:
    """The bits of each block, close together: numpy sorts numbers of 16 bits ten times as fast as those of 64."""
    block_BU = np.empty((_BLOCKS, len(hash_U)), np.uint16)
    for start in range(0, len(hash_U), _ROWS_AT_ONCE):
        part_U = hash_U[start : start + _ROWS_AT_ONCE].astype("<u8")
        bits_U64 = np.unpackbits(part_U.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        for block in range(_BLOCKS):
            packed_U2 = np.packbits(bits_U64[:, block::_BLOCKS], axis=1, bitorder="little")
            block_BU[block, start : start + _ROWS_AT_ONCE] = packed_U2.view("<u2")[:, 0]
    return list(block_BU)


def _join_equal(
    parent_N: NDArray[np.int64], sorted_N: NDArray[np.int64], *columns_N: NDArray[Any]
) -> NDArray[np.int64]:
    """Join the groups of rows that are equal in all of the columns by which they are sorted; the first of each kind."""
    same = np.ones(max(0, len(sorted_N) - 1), bool)
    for column_N in columns_N:
        same &= column_N[sorted_N[1:]] == column_N[sorted_N[:-1]]
    _join(parent_N, sorted_N[1:][same], sorted_N[:-1][same])
    return np.concatenate([sorted_N[:1], sorted_N[1:][~same]])


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
