"""Finds the pictures that are copies of one another, and which copy to keep. Pure functions over columns.

Two rows are copies if their bytes have the same content hash; if their 64-bit perceptual hashes differ in at most four
bits, their shapes are alike and their thumbnails look alike; or likewise, with eight bits, if a Danbooru post names the
Pixiv work and no other page of the work is nearer. Groups of candidates are transitive, but a row is refused only if it
is a copy of the kept row itself. The result does not depend on the order of the rows.

Axes: N rows, C rows that have copies, U rows with distinct (perceptual hash, shape), P rows from Pixiv, B blocks of
bits.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.curation.look_alike import look_alike
from pipeline.pictures.perceptual_hash import FLAT

NEAR_BITS: Final = 4
# For a picture and the post that links to it: resizing and saving again may have changed more bits. Two random pictures
# are this near with a probability of one in three billion. The pages of a work are often variants of one another, hence
# only the nearest page counts.
LINKED_BITS: Final = 8
# A copy keeps its width / height, apart from rounding and trimmed edges. Among 4,000 drawings of one object on a plain
# background 122 pairs were near by chance; only 32 of them also had the same shape.
NEAR_ASPECT: Final = 1.05

# Four differing bits leave at least two of six blocks unchanged. Every near pair therefore agrees in all bits of some
# two blocks, 21 or 22 bits: 15 sorts, with a quarter million chance pairs to compare after each among a million hashes.
# Five blocks of which one must agree, the minimum that finds every pair, gave 60 million.
_BLOCKS = 6

# A hash is compared with up to this many successors that agree with it in two blocks. Longer runs occur only where many
# simple pictures are alike: there some near pairs may be missed, but the work stays bounded.
_LONGEST_RUN = 1024
_PAIRS_AT_ONCE = 1 << 22
_ROWS_AT_ONCE = 1 << 18
_THREADS = 2
_PARTS_AHEAD = 64

Rows = NDArray[np.int64]


def groups(
    content_N: NDArray[np.uint64],
    phash_N: NDArray[np.uint64],
    aspect_N: NDArray[np.float64],
    links: tuple[Rows, Rows] | None = None,
) -> Rows:
    """The group of each row, named by the lowest row in it: (N,).

    `content` is any hash of the bytes, `aspect` is width / height, `links` are pairs of rows known to be copies. Flat
    pictures (perceptual_hash.FLAT) are copies only by their bytes or a link.
    """
    lengths = {len(column) for column in (content_N, phash_N, aspect_N)}
    assert len(lengths) == 1, lengths
    parent_N, log_aspect_N = np.arange(len(content_N)), np.log(aspect_N)
    _join_equal(parent_N, np.argsort(content_N, kind="stable"), content_N)
    if links:
        _join(parent_N, *links)

    sorted_N = np.lexsort((log_aspect_N, phash_N))
    row_U = _join_equal(parent_N, sorted_N[phash_N[sorted_N] != FLAT], phash_N, log_aspect_N)
    for left, right in near_pairs(phash_N[row_U]):
        left, right = row_U[left], row_U[right]
        alike = _same_shape(log_aspect_N, left, right)
        _join(parent_N, left[alike], right[alike])
    return parent_N


@dataclass(frozen=True)
class Pictures:
    """What decides whether rows are copies. Rows with the same `variant` differ on purpose: only equal bytes make them
    copies."""

    content: NDArray[np.uint64]  # any hash of the bytes
    phash: NDArray[np.uint64]
    aspect: NDArray[np.float64]  # width / height
    linked_page: Rows  # number of the Pixiv page that a row is, or was taken from; -1 for none
    variant: Rows  # number of the set of variants that a row belongs to; -1 for none
    thumbnail: NDArray[np.uint8]  # (C, BYTES)
    has_thumbnail: NDArray[np.bool_]  # rows without one are compared by their hashes alone

    def are_copies(self, left: Rows, right: Rows, near_bits: int = NEAR_BITS) -> NDArray[np.bool_]:
        """For each pair of rows, whether they are copies of one another. near_bits below 0: only by equal bytes."""
        bits = np.bitwise_count(self.phash[left] ^ self.phash[right])
        near = (bits <= min(near_bits, NEAR_BITS)) & (self.phash[left] != FLAT) & (self.phash[right] != FLAT)
        page, variant = self.linked_page, self.variant
        near |= (near_bits >= 0) & (bits <= LINKED_BITS) & (page[left] >= 0) & (page[left] == page[right])
        near &= _same_shape(np.log(self.aspect), left, right)
        near &= (variant[left] < 0) | (variant[left] != variant[right])
        same: NDArray[np.bool_] = self.content[left] == self.content[right]
        unsure = np.flatnonzero(near & ~same & self.has_thumbnail[left] & self.has_thumbnail[right])
        near[unsure] = look_alike(self.thumbnail[left[unsure]], self.thumbnail[right[unsure]])
        same |= near
        return same


def keepers(pictures: Pictures, best_first: Rows, near_bits: int = NEAR_BITS) -> Rows:
    """For each row the row to keep instead of it, itself if it is kept: (C,). `best_first` are all rows, best first.

    Of each group the best row is kept. Rows of the group that are not copies of it, but only of copies of it, are
    grouped again.
    """
    kept_C, waiting = np.arange(len(best_first)), best_first
    while len(waiting):
        content, phash, aspect = pictures.content[waiting], pictures.phash[waiting], pictures.aspect[waiting]
        group = groups(content, phash, aspect, _links(pictures.linked_page[waiting]))
        best = np.unique(group, return_index=True)[1]  # `waiting` is best first
        keeper = waiting[best[np.searchsorted(group[best], group)]]
        copies = pictures.are_copies(waiting, keeper, near_bits) | (waiting == keeper)
        kept_C[waiting[copies]] = keeper[copies]
        waiting = waiting[~copies]
    return kept_C


def _links(linked_page: Rows) -> tuple[Rows, Rows]:
    """Pairs of rows with the same linked page."""
    order = np.argsort(linked_page, kind="stable")
    page = linked_page[order]
    same = (page[1:] == page[:-1]) & (page[1:] >= 0)
    return order[1:][same], order[:-1][same]


def page_links(
    linked_work_N: NDArray[np.int64],
    work_N: NDArray[np.int64],
    page_N: NDArray[np.int64],
    phash_N: NDArray[np.uint64],
    aspect_N: NDArray[np.float64],
) -> tuple[Rows, Rows]:
    """Pairs of a Danbooru row and the row of the Pixiv page that it was taken from, as two arrays.

    `linked_work` is the Pixiv work that a row was taken from, `work` the work that a row is a page of; -1 for none.
    Posts do not reliably name the page: it is the page that looks most like the post, the first one among equals.
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


def _same_shape(log_aspect_N: NDArray[np.float64], left: Rows, right: Rows) -> NDArray[np.bool_]:
    alike: NDArray[np.bool_] = np.abs(log_aspect_N[left] - log_aspect_N[right]) <= np.log(NEAR_ASPECT)
    return alike


def near_pairs(hash_U: NDArray[np.uint64]) -> Iterator[tuple[Rows, Rows]]:
    """Places in the sorted hashes of all pairs that differ in at most NEAR_BITS bits, as two arrays.

    Yields large pieces: joining groups costs a pass over all rows. A pair may occur more than once.
    """
    found: list[NDArray[Any]] = [np.zeros((2, 0), np.int64)]
    count = 0
    for pairs in _near_neighbours(hash_U):
        found.append(pairs)
        count += pairs.shape[1]
        if count > _PAIRS_AT_ONCE:
            left, right = np.concatenate(found, axis=1)
            yield left, right
            del found[1:]
            count = 0
    left, right = np.concatenate(found, axis=1)
    yield left, right


def _near_neighbours(hash_U: NDArray[np.uint64]) -> Iterator[NDArray[np.int32]]:
    """The pairs of near_pairs in small pieces, (2, pairs).

    numpy releases the interpreter lock: threads compare while this one sorts.
    """
    ahead: deque[Future[list[NDArray[np.int32]]]] = deque()
    with ThreadPoolExecutor(_THREADS) as threads:
        for key, order_U in _sorted_by_two_blocks(hash_U):
            # Parts that fit into the processor's cache are several times as fast.
            for start in range(0, len(order_U), _ROWS_AT_ONCE):
                place_U = order_U[start : start + _ROWS_AT_ONCE + _LONGEST_RUN]
                ahead.append(threads.submit(_compare, hash_U, place_U, key))
                if len(ahead) > _PARTS_AHEAD:
                    yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def _compare(hash_U: NDArray[np.uint64], place_U: NDArray[np.int32], key: np.uint64) -> list[NDArray[np.int32]]:
    """The near pairs among some rows that are sorted by the bits of the key."""
    part_U = hash_U[place_U]
    key_U = part_U & key
    left = np.arange(len(part_U))
    found = []
    for distance in range(1, _LONGEST_RUN + 1):
        left = left[: np.searchsorted(left, len(part_U) - distance)]
        # If the keys differ at this distance, they differ at every larger one.
        left = left[key_U[left] == key_U[left + distance]]
        if not len(left):
            break
        near = left[np.bitwise_count(part_U[left] ^ part_U[left + distance]) <= NEAR_BITS]
        if len(near):
            found.append(place_U[np.stack([near, near + distance])])
    return found


def _sorted_by_two_blocks(hash_U: NDArray[np.uint64]) -> Iterator[tuple[np.uint64, NDArray[np.int32]]]:
    """For every two blocks: a mask of their bits, and the places of the hashes sorted by these bits, then by hash."""
    blocks = _blocks(hash_U)
    for first, block_U in enumerate(blocks):
        # int32 halves the memory. The other columns of more than two billion pictures would not fit either.
        by_first_U = np.argsort(block_U, kind="stable").astype(np.int32)
        for second in range(first + 1, _BLOCKS):
            order_U = by_first_U[np.argsort(blocks[second][by_first_U], kind="stable")]
            yield _bits_of(first) | _bits_of(second), order_U


def _bits_of(block: int) -> np.uint64:
    """The mask of a block, which is every sixth bit.

    Each block thus has low frequencies, in which pictures vary, and high ones, in which simple pictures are alike.
    """
    return np.uint64(sum(1 << bit for bit in range(block, 64, _BLOCKS)))


def _blocks(hash_U: NDArray[np.uint64]) -> list[NDArray[np.uint16]]:
    """The bits of each block, packed: numpy sorts 16-bit numbers ten times as fast as 64-bit numbers."""
    block_BU = np.empty((_BLOCKS, len(hash_U)), np.uint16)
    for start in range(0, len(hash_U), _ROWS_AT_ONCE):
        part_U = hash_U[start : start + _ROWS_AT_ONCE].astype("<u8")
        bits_U64 = np.unpackbits(part_U.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        for block in range(_BLOCKS):
            packed_U2 = np.packbits(bits_U64[:, block::_BLOCKS], axis=1, bitorder="little")
            block_BU[block, start : start + _ROWS_AT_ONCE] = packed_U2.view("<u2")[:, 0]
    return list(block_BU)


def _join_equal(parent_N: Rows, sorted_N: Rows, *columns_N: NDArray[Any]) -> Rows:
    """Joins the groups of rows with equal columns; sorted_N sorts by the columns. Returns the first row of each run."""
    same = np.ones(max(0, len(sorted_N) - 1), bool)
    for column_N in columns_N:
        same &= column_N[sorted_N[1:]] == column_N[sorted_N[:-1]]
    _join(parent_N, sorted_N[1:][same], sorted_N[:-1][same])
    return np.concatenate([sorted_N[:1], sorted_N[1:][~same]])


def _join(parent_N: Rows, left: Rows, right: Rows) -> None:
    """Joins the groups of each left and right row, in place. The parent of a row is the lowest row of its group."""
    while True:
        left, right = parent_N[left], parent_N[right]
        apart = left != right
        if not apart.any():
            return
        left, right = left[apart], right[apart]
        np.minimum.at(parent_N, np.maximum(left, right), np.minimum(left, right))
        while ((grandparent_N := parent_N[parent_N]) != parent_N).any():
            parent_N[:] = grandparent_N
