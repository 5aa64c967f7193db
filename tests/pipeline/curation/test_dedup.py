from collections.abc import Hashable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.curation.dedup import LINKED_BITS, NEAR_BITS, best_first, groups, near_pairs, page_links
from pipeline.pictures.perceptual_hash import FLAT

Hashes = NDArray[np.uint64]


def random_hashes(count: int, seed: int) -> Hashes:
    return np.random.default_rng(seed).integers(1, 2**64, count, dtype=np.uint64)


def flipped(hashes: Hashes, bits: int, seed: int) -> Hashes:
    """Each hash with `bits` random bits flipped."""
    rng = np.random.default_rng(seed)
    masks = [sum(1 << bit for bit in rng.choice(64, bits, replace=False).tolist()) for _ in hashes]
    return hashes ^ np.array(masks, np.uint64)


def keepers(
    ids: Sequence[str],
    content: Sequence[Hashable],
    phash: Hashes,
    pixels: NDArray[np.int64],
    aspect: NDArray[np.float64] | None = None,
) -> list[str | None]:
    """For each row the id of the row that is kept instead, None if the row itself is kept."""
    number: dict[Hashable, int] = {}
    numbers = np.array([number.setdefault(each, len(number)) for each in content], np.uint64)
    group = groups(numbers, phash, np.ones(len(ids)) if aspect is None else aspect).tolist()
    kept: dict[int, int] = {}
    for row in best_first(ids, pixels.tolist()):
        kept.setdefault(group[row], row)
    return [None if kept[name] == row else ids[kept[name]] for row, name in enumerate(group)]


def kept_instead(phash: Hashes) -> list[str | None]:
    """The kept rows of rows that differ only in their perceptual hashes: of copies the lowest id."""
    ids = [f"danbooru:{row}" for row in range(len(phash))]
    return keepers(ids, range(len(phash)), phash, np.ones(len(phash), np.int64))


def brute_force(phash: Hashes) -> list[str | None]:
    """The same by comparing every pair."""
    group = list(range(len(phash)))
    near = np.bitwise_count(phash[:, None] ^ phash[None, :]) <= NEAR_BITS
    for left, right in np.argwhere(np.triu(near, 1)).tolist():
        low, high = sorted((group[left], group[right]))
        group = [low if name == high else name for name in group]
    return [None if name == row else f"danbooru:{name}" for row, name in enumerate(group)]


def test_near_duplicates_equal_those_of_comparing_all_pairs() -> None:
    base = random_hashes(1900, seed=0)
    planted = [flipped(base[20 * bits : 20 * bits + 14], bits, seed=bits) for bits in range(7)]
    chained = flipped(planted[3][:2], 4, seed=9)
    phash = np.random.default_rng(1).permutation(np.concatenate([base, *planted, chained]))
    expected = brute_force(phash)
    assert kept_instead(phash) == expected
    assert sum(kept is not None for kept in expected) == 5 * 14 + 2


def test_crowded_hashes_are_compared_as_well() -> None:
    """Simple pictures have few bits set, so that many of them agree in some blocks."""
    rng = np.random.default_rng(0)
    sparse = [sum(1 << bit for bit in rng.choice(64, 7, replace=False).tolist()) for _ in range(1000)]
    phash = np.array(sparse, np.uint64)
    assert kept_instead(phash) == brute_force(phash)


@pytest.mark.parametrize("bits", range(1, NEAR_BITS + 2))
def test_pairs_with_any_four_differing_bits_are_found_and_none_with_five(bits: int) -> None:
    one = random_hashes(1, seed=3)
    rng = np.random.default_rng(bits)
    for _ in range(200):
        mask = np.uint64(sum(1 << bit for bit in rng.choice(64, bits, replace=False).tolist()))
        pair = np.sort(np.concatenate([one, one ^ mask]))
        found = sum(len(left) for left, _ in near_pairs(pair))
        assert (found > 0) == (bits <= NEAR_BITS)


def test_a_chain_is_one_group() -> None:
    steps = [0, 0b1111, 0b1111_1111, 0b1111_1111_1111]
    phash = np.array([1 << 40 | step for step in steps], np.uint64)
    assert kept_instead(phash) == [None, "danbooru:0", "danbooru:0", "danbooru:0"]
    assert kept_instead(phash[[0, 2, 3]]) == [None, None, "danbooru:1"]


def test_equal_bytes_are_duplicates_whatever_their_hash() -> None:
    phash = np.array([FLAT, FLAT, FLAT], np.uint64)
    kept = keepers(["danbooru:1", "danbooru:2", "danbooru:3"], ["a", "b", "a"], phash, np.ones(3, np.int64))
    assert kept == [None, None, "danbooru:1"]


def test_flat_pictures_are_no_copies_of_each_other() -> None:
    assert kept_instead(np.array([FLAT, FLAT, FLAT | 1, FLAT | 1], np.uint64)) == [None, None, None, "danbooru:2"]


def test_pictures_of_different_shapes_are_no_copies() -> None:
    """Near hashes. Shapes: 3:2 in full size, halved and trimmed; 1:1; 2:3."""
    phash = np.full(5, 1 << 40 | 1 << 7, np.uint64) ^ np.array([0, 0, 1, 1, 0], np.uint64)
    pixels, aspect = np.array([240, 60, 58, 40, 240]), np.array([1.5, 1.5, 1.45, 1, 2 / 3])
    ids = [f"danbooru:{row}" for row in range(5)]
    assert keepers(ids, range(5), phash, pixels, aspect) == [None, "danbooru:0", "danbooru:0", None, None]
    assert keepers(ids, range(5), phash, pixels) == [None] + ["danbooru:0"] * 4
    assert keepers(ids, ["a"] * 5, phash, pixels, aspect) == [None] + ["danbooru:0"] * 4


def test_equal_bytes_and_near_hashes_join_one_group() -> None:
    phash = np.array([1 << 50, 1 << 50 | 1, 1 << 20], np.uint64)
    phash[2] = random_hashes(1, seed=0)[0]
    kept = keepers(["danbooru:3", "danbooru:2", "danbooru:1"], ["a", "b", "b"], phash, np.ones(3, np.int64))
    assert kept == ["danbooru:1", "danbooru:1", None]


@pytest.mark.parametrize(
    ("ids", "pixels", "best"),
    [
        (["danbooru:1", "pixiv:5_p0"], [100, 101], "pixiv:5_p0"),
        (["pixiv:1_p0", "danbooru:9"], [100, 100], "danbooru:9"),
        (["danbooru:10", "danbooru:9"], [100, 100], "danbooru:9"),
        (["pixiv:9_p10", "pixiv:9_p2"], [100, 100], "pixiv:9_p2"),
        (["pixiv:10_p0", "pixiv:9_p2"], [100, 100], "pixiv:9_p2"),
    ],
)
def test_the_kept_copy_has_most_pixels_then_source_then_number(ids: list[str], pixels: list[int], best: str) -> None:
    kept = keepers(ids, ["a", "a"], random_hashes(2, seed=0), np.array(pixels))
    assert kept == [None if name == best else best for name in ids]


def test_the_result_does_not_depend_on_the_order_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    base = random_hashes(500, seed=1)
    phash = np.concatenate(
        [base, flipped(base[:200], 3, seed=2), flipped(base[:100], 4, seed=3), np.zeros(20, np.uint64)]
    )
    ids = [f"{rng.choice(['danbooru', 'pixiv'])}:{row}" for row in rng.permutation(len(phash)).tolist()]
    content = rng.integers(0, 700, len(phash)).tolist()
    pixels, aspect = rng.integers(1, 4, len(phash)), rng.uniform(0.97, 1.03, len(phash))
    expected = dict(zip(ids, keepers(ids, content, phash, pixels, aspect), strict=True))
    assert sum(kept is not None for kept in expected.values()) > 300
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(phash))
        shuffled = [ids[row] for row in order]
        kept = keepers(shuffled, [content[row] for row in order], phash[order], pixels[order], aspect[order])
        assert dict(zip(shuffled, kept, strict=True)) == expected


def test_a_kept_row_is_a_copy_of_no_other_row() -> None:
    kept = kept_instead(random_hashes(3000, seed=0) & random_hashes(3000, seed=1) & random_hashes(3000, seed=2))
    for name in set(kept) - {None}:
        assert kept[int(str(name).split(":")[1])] is None


def test_an_empty_dataset_has_no_copies() -> None:
    assert keepers([], [], np.zeros(0, np.uint64), np.zeros(0, np.int64)) == []


def links(
    posts: list[tuple[int, int]], pages: list[tuple[int, int, int]], aspect: float = 1.0
) -> list[tuple[int, int]]:
    """Rows are posts (linked work, hash), then pages (work, page, hash). `aspect` is that of the posts."""
    rows = len(posts) + len(pages)
    linked, work, page = np.full((3, rows), -1)
    linked[: len(posts)] = [post[0] for post in posts]
    work[len(posts) :], page[len(posts) :] = zip(*[each[:2] for each in pages], strict=True)
    phash = np.array([post[1] for post in posts] + [each[2] for each in pages], np.uint64)
    aspects = np.where(np.arange(rows) < len(posts), aspect, 1.0)
    left, right = page_links(linked, work, page, phash, aspects)
    return list(zip(left.tolist(), right.tolist(), strict=True))


def test_a_post_is_linked_to_the_page_of_its_work_that_looks_most_like_it() -> None:
    pages = [(7, 0, 0b11111), (7, 1, 0b1), (8, 0, 0), (7, 2, 0b10)]
    assert links([(7, 0)], pages) == [(0, 2)]  # pages 1 and 2 are equally near: the first; work 8 is another one
    assert links([(8, 0b1), (7, 0b11011), (9, 0), (-1, 0)], pages) == [(0, 6), (1, 4)]


def test_a_link_to_a_picture_of_another_look_or_shape_is_ignored() -> None:
    far, near = 2 ** (LINKED_BITS + 1) - 1, 2**LINKED_BITS - 1
    assert links([(7, 0), (8, 0)], [(7, 0, far), (8, 0, near)]) == [(1, 3)]
    assert links([(7, 0)], [(7, 0, 0)], aspect=1.2) == []


def test_links_join_flat_pictures_as_well() -> None:
    phash, pair = np.array([FLAT, FLAT, FLAT], np.uint64), (np.array([0]), np.array([2]))
    assert groups(np.arange(3, dtype=np.uint64), phash, np.ones(3), pair).tolist() == [0, 1, 0]
