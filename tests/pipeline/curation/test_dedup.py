from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from pipeline.core.records import IMAGES, OTHER_MD5
from pipeline.curation import dedup
from pipeline.curation.copies import NOT_ORIGINAL, ranked
from pipeline.curation.dedup import LINKED_BITS, NEAR_BITS, Pictures, groups, near_pairs, page_links
from pipeline.pictures.perceptual_hash import FLAT
from pipeline.pictures.thumbnails import BYTES

Hashes = NDArray[np.uint64]


def random_hashes(count: int, seed: int) -> Hashes:
    return np.random.default_rng(seed).integers(1, 2**64, count, dtype=np.uint64)


def flipped(hashes: Hashes, bits: int, seed: int) -> Hashes:
    """Each hash with `bits` random bits flipped."""
    rng = np.random.default_rng(seed)
    masks = [sum(1 << bit for bit in rng.choice(64, bits, replace=False).tolist()) for _ in hashes]
    return hashes ^ np.array(masks, np.uint64)


def post(name: str, **columns: Any) -> dict[str, Any]:
    """What a picture is ranked by."""
    return {"id": name, "width": 10, "height": 10, "notes": None, "parent": None, "tags_meta": []} | columns


def ranked_ids(*posts: dict[str, Any]) -> list[str]:
    """The ids in the order in which to keep them, whatever the order of the rows."""
    orders = [[rows[row]["id"] for row in ranked(table_of(*rows)).tolist()] for rows in (posts, posts[::-1])]
    assert orders[0] == orders[1]
    return orders[0]


def table_of(*posts: dict[str, Any]) -> pa.Table:
    names = ("id", "width", "height", "notes", "parent", "tags_meta")
    return pa.Table.from_pylist(list(posts), pa.schema([IMAGES.field(name) for name in names]))


def keepers(
    ids: Sequence[str],
    content: Sequence[Hashable],
    phash: Hashes,
    pixels: NDArray[np.int64],
    aspect: NDArray[np.float64] | None = None,
    variant: Sequence[int] = (),
    thumbnail: NDArray[np.uint8] | None = None,
    near_bits: int = NEAR_BITS,
) -> list[str | None]:
    """For each row the id of the row that is kept instead, None if the row itself is kept."""
    number: dict[Hashable, int] = {}
    numbers = np.array([number.setdefault(each, len(number)) for each in content], np.uint64)
    none = np.full(len(ids), -1)
    aspect = np.ones(len(ids)) if aspect is None else aspect
    pictures = Pictures(
        content=numbers,
        phash=phash,
        aspect=aspect,
        linked_page=none,
        variant=np.array(variant) if len(variant) else none,
        thumbnail=np.zeros((len(ids), BYTES), np.uint8) if thumbnail is None else thumbnail,
        has_thumbnail=np.full(len(ids), thumbnail is not None),
    )
    posts = [post(name, width=count, height=1) for name, count in zip(ids, pixels.tolist(), strict=True)]
    kept = dedup.keepers(pictures, ranked(table_of(*posts)), near_bits)
    return [None if keeper == row else ids[keeper] for row, keeper in enumerate(kept.tolist())]


def kept_instead(phash: Hashes) -> list[str | None]:
    """The kept rows of rows that differ only in their perceptual hashes: of copies the lowest id."""
    ids = [f"danbooru:{row}" for row in range(len(phash))]
    return keepers(ids, range(len(phash)), phash, np.ones(len(phash), np.int64))


def brute_force(phash: Hashes) -> list[str | None]:
    """The same by comparing every pair: a row is refused if it is near a row that is kept, the first of several."""
    near = np.bitwise_count(phash[:, None] ^ phash[None, :]) <= NEAR_BITS
    kept: list[int] = []
    keeper: list[str | None] = []
    for row in range(len(phash)):
        first = next((other for other in kept if near[row, other]), None)
        if first is None:
            kept.append(row)
        keeper.append(None if first is None else f"danbooru:{first}")
    return keeper


def test_near_duplicates_equal_those_of_comparing_all_pairs() -> None:
    base = random_hashes(1900, seed=0)
    planted = [flipped(base[20 * bits : 20 * bits + 14], bits, seed=bits) for bits in range(7)]
    chained = flipped(planted[3][:2], 4, seed=9)
    phash = np.random.default_rng(1).permutation(np.concatenate([base, *planted, chained]))
    expected = brute_force(phash)
    assert kept_instead(phash) == expected
    # The far ends of the two chains are not near the rows that are kept.
    assert sum(kept is not None for kept in expected) == 5 * 14


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


def test_the_end_of_a_chain_is_kept_where_it_is_no_copy_of_the_kept_row() -> None:
    """Each row differs from the next in four bits, from the one after it in eight."""
    steps = [0, 0b1111, 0b1111_1111, 0b1111_1111_1111]
    phash = np.array([1 << 40 | step for step in steps], np.uint64)
    assert kept_instead(phash) == [None, "danbooru:0", None, "danbooru:2"]
    assert kept_instead(phash[[1, 0, 2, 3]]) == [None, "danbooru:0", "danbooru:0", None]
    assert kept_instead(phash[[0, 2, 3]]) == [None, None, "danbooru:1"]
    assert len(set(groups(np.arange(4, dtype=np.uint64), phash, np.ones(4)).tolist())) == 1


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


def test_equal_bytes_and_near_hashes_are_both_copies() -> None:
    phash = np.array([1 << 50, 1 << 50 | 1, 1 << 50], np.uint64)
    phash[2] = random_hashes(1, seed=0)[0]
    ids = ["danbooru:3", "danbooru:2", "danbooru:1"]
    assert keepers(ids, ["a", "b", "b"], phash, np.array([1, 2, 1])) == ["danbooru:2", None, "danbooru:2"]
    # The row that is kept for its size has the bytes of one row and is near neither.
    assert keepers(ids, ["a", "b", "b"], phash, np.array([1, 1, 2])) == [None, "danbooru:1", None]


def test_variants_of_one_picture_are_copies_only_if_their_bytes_are_equal() -> None:
    phash = np.array([1 << 50, 1 << 50 | 1, 1 << 50 | 2, 1 << 50 | 3], np.uint64)
    ids, pixels = [f"danbooru:{row}" for row in range(4)], np.ones(4, np.int64)
    assert keepers(ids, "abcd", phash, pixels) == [None] + ["danbooru:0"] * 3
    assert keepers(ids, "abcd", phash, pixels, variant=[7, 7, -1, 8]) == [None, None, "danbooru:0", "danbooru:0"]
    assert keepers(ids, "abcb", phash, pixels, variant=[7, 7, 7, 7]) == [None, None, None, "danbooru:1"]


@pytest.mark.parametrize("tag", NOT_ORIGINAL)
def test_a_copy_that_was_changed_is_kept_only_if_there_is_no_other(tag: str) -> None:
    altered = post("danbooru:1", width=999, tags_meta=["highres", tag, tag])
    assert ranked_ids(altered, post("pixiv:5_p0", tags_meta=["highres"])) == ["pixiv:5_p0", "danbooru:1"]
    assert ranked_ids(altered, post("danbooru:2", tags_meta=[tag])) == ["danbooru:1", "danbooru:2"]


def test_of_equal_copies_the_parent_is_kept_if_it_is_one_of_them() -> None:
    child = post("danbooru:1", parent="danbooru:2")
    assert ranked_ids(child, post("danbooru:2")) == ["danbooru:2", "danbooru:1"]
    assert ranked_ids(child, post("danbooru:3")) == ["danbooru:1", "danbooru:3"]
    assert ranked_ids(child | {"width": 11}, post("danbooru:2")) == ["danbooru:1", "danbooru:2"]


def test_ids_without_a_number_come_last() -> None:
    ids = ["danbooru:3", "danbooru:20", "danbooru:-4", "danbooru:99999999999999999999", "other"]
    assert ranked_ids(*map(post, ids)) == ids


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


def test_near_hashes_are_copies_only_if_the_thumbnails_look_alike() -> None:
    names, phash, pixels = ["danbooru:1", "danbooru:2", "danbooru:3"], np.full(3, 1 << 40, np.uint64), np.ones(3, int)
    grey = np.full((3, BYTES), 128, np.uint8)
    red = grey.copy()
    red[1, -1] = 200  # a Cr value
    assert keepers(names, range(3), phash, pixels, thumbnail=grey) == [None, "danbooru:1", "danbooru:1"]
    assert keepers(names, range(3), phash, pixels, thumbnail=red) == [None, None, "danbooru:1"]
    assert keepers(names, "aab", phash, pixels, thumbnail=red) == [None, "danbooru:1", "danbooru:1"], "equal bytes"


@pytest.mark.parametrize(("near_bits", "found"), [(4, 3), (1, 1), (0, 0), (-1, 0)])
def test_a_rule_limits_the_bits_in_which_near_copies_differ(near_bits: int, found: int) -> None:
    phash = np.array([1 << 40, 1 << 40 | 1, 1 << 40 | 0b11, 1 << 40 | 0b1111], np.uint64)
    names = [f"danbooru:{number}" for number in range(4)]
    kept = keepers(names, range(4), phash, np.ones(4, int), near_bits=near_bits)
    assert sum(keeper is not None for keeper in kept) == found
    assert keepers(names, "aabb", phash, np.ones(4, int), near_bits=-1) == [None, "danbooru:0", None, "danbooru:2"]


def test_a_file_whose_md5_is_not_that_of_the_post_comes_after_the_original() -> None:
    other = post("danbooru:1", width=99, notes=f"ends without IEND; {OTHER_MD5}")
    assert ranked_ids(other, post("danbooru:2")) == ["danbooru:2", "danbooru:1"]
