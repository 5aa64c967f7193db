"""Finds copies among the admitted rows of all shards, and what the kept row takes over from its copies.

The search needs all rows at once, so it runs in one process, some BYTES_PER_ROW for each row. Its result is kept in
files, from which each shard reads its part.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.records import COPIES, IMAGES, OTHER_MD5
from pipeline.curation.admission import TAG_COLUMNS, Refusal
from pipeline.curation.dedup import NEAR_BITS, Pictures, Rows, groups, keepers, page_links
from pipeline.pictures.thumbnails import BYTES
from pipeline.storage.fingerprints import Provenance, digest
from pipeline.storage.posts import read_images
from pipeline.storage.scan import map_in_order
from pipeline.storage.shards import Store

# Increment when the search finds other copies in the same rows: it is then made again, and shards whose copies changed.
CODE_VERSION: Final = "3"
BYTES_PER_ROW: Final = 200  # estimated from a search over four million simulated rows, one in a hundred a copy

# Meta tags of posts whose file is not the original: such a copy is kept only if there is no other.
NOT_ORIGINAL: Final = (
    "upscaled", "ai-upscaled", "waifu2x", "resized", "downscaled", "md5_mismatch", "source_larger", "lossy-lossless",
    "jpeg_artifacts", "duplicate", "pixel-perfect_duplicate",
)  # fmt: skip
_MANY_COPIES: Final = 0.02
_LARGE_GROUP: Final = 10
_VARIANT = "variant_set"  # meta tag of posts that are variants of one picture, such as another expression

_READERS = 4
_KEYS = ["id", "sha256", "phash", "width", "height", "page", "pixiv_id"]
_RANKED_BY = ["id", "width", "height", "notes", "favourites", "score", "parent", "tags_meta"]

Place = NDArray[np.int32]  # (rows, 2): number of the shard, row in the shard


@dataclass(frozen=True)
class Copies:
    """What the search for copies found out about the rows of one shard. Keys are row numbers."""

    refused: dict[int, Refusal] = field(default_factory=dict)  # copies of another row, which is kept
    # Kept Danbooru rows: bookmarks and views of the same picture on Pixiv.
    numbers: dict[int, tuple[int | None, int | None]] = field(default_factory=dict)
    # Kept Pixiv rows: TAG_COLUMNS of the same picture on Danbooru.
    tags: dict[int, dict[str, list[str]]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return digest([sorted(found.items()) for found in (self.refused, self.numbers, self.tags)])

    def to_table(self) -> pa.Table:
        """A table of COPIES."""
        rows: dict[int, dict[str, Any]] = {}
        for row, (reason, detail) in self.refused.items():
            rows.setdefault(row, {}).update(reason=reason, detail=detail)
        for row, (bookmarks, views) in self.numbers.items():
            rows.setdefault(row, {}).update(has_numbers=True, bookmarks=bookmarks, views=views)
        for row, tags in self.tags.items():
            rows.setdefault(row, {}).update(tags)
        defaults = {"has_numbers": False}
        return pa.Table.from_pylist([defaults | {"row": row} | found for row, found in sorted(rows.items())], COPIES)

    @classmethod
    def from_table(cls, table: pa.Table) -> "Copies":
        copies = cls()
        for found in table.to_pylist():
            row = found["row"]
            if found["reason"] is not None:
                copies.refused[row] = found["reason"], found["detail"]
            if found["has_numbers"]:
                copies.numbers[row] = found["bookmarks"], found["views"]
            if found["tags_meta"] is not None:
                copies.tags[row] = {column: found[column] for column in TAG_COLUMNS}
        return copies


NO_COPIES: Final = Copies()


@dataclass
class NearCopies:
    """How many rows are refused as near copies, whose bytes differ from those of the kept row."""

    admitted: int = 0  # rows that were compared
    copies: int = 0
    largest: int = 0  # near copies of one row
    of: str = ""  # that row

    def count(self, admitted: int, keeper: Rows, ids: pa.ChunkedArray) -> None:
        """keeper: the kept row, as a place in `ids`, of each near copy."""
        self.admitted, self.copies = admitted, len(keeper)
        if len(keeper):
            rows, counts = np.unique(keeper, return_counts=True)
            self.largest, self.of = int(counts.max()), ids[int(rows[counts.argmax()])].as_py()

    def warnings(self) -> list[str]:
        """What is unusual about the counts."""
        share, found = self.copies / max(1, self.admitted), []
        if share > _MANY_COPIES:
            found.append(f"{share:.1%} of the rows ({self.copies:,}) are near copies of others")
        if self.largest > _LARGE_GROUP:
            found.append(f"{self.largest} rows are near copies of {self.of}")
        return found


def near_copies(store: Store, selection: str) -> NearCopies:
    """The counts of the search that a selection (its folder) was made with; zeros if it has none."""
    try:
        return NearCopies(**json.loads(store.read(f"{selection}/copies.json"))["near"])
    except (OSError, ValueError, KeyError, TypeError):
        return NearCopies()


# --- The files of a selection that keep the result -------------------------------------------------------------------


def search_digest(judged: Mapping[str, Provenance]) -> str:
    """Digest of everything that the result of a search depends on, given the provenance of judged/<shard>."""
    return digest([CODE_VERSION, judged])


def saved_digests(store: Store, selection: str, made_from: str) -> dict[str, str] | None:
    """The digest of the copies of each shard that has any, or None if no search with this digest was completed."""
    file = f"{selection}/copies.json"
    try:
        record = json.loads(store.read(file)) if store.exists(file) else {}
    except ValueError:
        return None
    if record.get("made_from") != made_from or record["shards"].keys() - set(store.shards(f"{selection}/copies")):
        return None
    found: dict[str, str] = record["shards"]
    return found


def save_copies(dataset: str, selection: str, shards: list[str], made_from: str, near_bits: int) -> None:
    """Searches the admitted rows of a selection (its folder) and writes copies/<shard> of every shard with copies.

    copies.json is written last: where it exists, the search was completed. near_bits: see `Pictures.are_copies`.
    """
    store = Store(dataset)
    store.remove(f"{selection}/copies.json")
    digests: dict[str, str] = {}

    def save(item: tuple[str, Copies]) -> None:
        shard, copies = item
        if copies != NO_COPIES:
            digests[shard] = copies.digest
            store.write_table(f"{selection}/copies/{shard}.parquet", copies.to_table(), COPIES)

    counts = NearCopies()
    for _ in map_in_order(save, find_copies(store, selection, shards, near_bits, counts)):
        pass
    for shard in set(store.shards(f"{selection}/copies")) - digests.keys():
        store.remove(f"{selection}/copies/{shard}.parquet")
    record = {"made_from": made_from, "shards": digests, "near": asdict(counts)}
    store.write(f"{selection}/copies.json", json.dumps(record).encode())


def read_copies(store: Store, selection: str, shard: str, expected: str) -> Copies:
    """The copies of a shard. Raises ValueError if they do not have the expected digest."""
    if expected == NO_COPIES.digest:
        return NO_COPIES
    copies = Copies.from_table(store.read_table(f"{selection}/copies/{shard}.parquet"))
    if copies.digest != expected:
        raise ValueError(f"{selection}/copies/{shard}.parquet was made by another run; run pipeline/curate.py again")
    return copies


# --- The search ------------------------------------------------------------------------------------------------------


def find_copies(
    store: Store, selection: str, shards: Sequence[str], near_bits: int = NEAR_BITS, near: NearCopies | None = None
) -> Iterator[tuple[str, Copies]]:
    """Each shard with the copies among the admitted rows of a selection (its folder).

    Of a group of copies the one that `ranked` puts first is kept. A kept row of one site takes over data from its best
    copy on the other site: Pixiv's numbers or Danbooru's tags. Of several rows with one id the first is kept, in the
    order of the shards' names. `near` is filled with counts.
    """
    place_N2, id_N, keys = _admitted(store, selection, shards)
    repeated = _repeated(store, shards, place_N2, id_N)
    del id_N
    refused = _Found(place_N2[repeated], lambda rows: [("duplicate id", "of a row before it")] * len(rows))
    if len(repeated):
        place_N2, keys = np.delete(place_N2, repeated, axis=0), [np.delete(column, repeated) for column in keys]
    admitted = len(place_N2)
    place_C2, pictures = _shared(place_N2, *keys)
    del place_N2, keys
    pictures.thumbnail[:], pictures.has_thumbnail[:] = _thumbnails(store, shards, place_C2)

    posts = _read_rows(store, shards, place_C2, _RANKED_BY)
    best_first = ranked(posts)
    kept = keepers(_with_variants(pictures, posts), best_first, near_bits)
    ids = posts["id"]
    copy = best_first[kept[best_first] != best_first]
    keeper = kept[copy]
    if near is not None:
        near.count(admitted, keeper[pictures.content[copy] != pictures.content[keeper]], ids)
    of_pixiv = pc.starts_with(ids, "pixiv:").to_numpy()
    names = ids.take(pa.array(keeper))
    duplicates = _Found(
        place_C2[copy], lambda rows: [("duplicate", f"of {name}") for name in names.take(pa.array(rows)).to_pylist()]
    )

    donor, taker = _first_of_each(copy, keeper, of_pixiv[copy] & ~of_pixiv[keeper])
    counts = posts.select(["favourites", "score"]).take(pa.array(donor))
    numbers = _Found(place_C2[taker], lambda rows: [tuple(each.values()) for each in _listed(counts, rows)])
    donor, taker = _first_of_each(copy, keeper, ~of_pixiv[copy] & of_pixiv[keeper])
    donated = _read_rows(store, shards, place_C2[donor], TAG_COLUMNS)
    tags = _Found(place_C2[taker], lambda rows: _listed(donated, rows))
    for number, shard in enumerate(shards):
        yield shard, Copies(refused.of(number) | duplicates.of(number), numbers.of(number), tags.of(number))


class _Found:
    """Values for some rows, listed by shard. `values` lists those of some of the places."""

    def __init__(self, place_X2: Place, values: Any) -> None:
        self._order = np.lexsort((place_X2[:, 1], place_X2[:, 0]))
        self._place_X2, self._values = place_X2[self._order], values

    def of(self, shard: int) -> dict[int, Any]:
        start, end = np.searchsorted(self._place_X2[:, 0], [shard, shard + 1])
        rows = self._place_X2[start:end, 1].tolist()
        return dict(zip(rows, self._values(self._order[start:end]), strict=True)) if rows else {}


def _listed(table: pa.Table, rows: Rows) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table.take(pa.array(rows)).to_pylist()
    return found


def _first_of_each(copy: Rows, keeper: Rows, wanted: NDArray[np.bool_]) -> tuple[Rows, Rows]:
    """For each keeper its first wanted copy, as (copies, keepers)."""
    copy, keeper = copy[wanted], keeper[wanted]
    found, at = np.unique(keeper, return_index=True)
    return copy[at], found


def ranked(posts: pa.Table) -> Rows:
    """The rows of a table of _RANKED_BY in the order in which to keep them.

    First the files that are originals as far as their tags and their md5 say, then those with most pixels, then
    Danbooru's (its tags are better), then posts rather than their children, then the lowest id.
    """
    tags = posts["tags_meta"].combine_chunks()
    altered = np.zeros(len(posts), bool)
    altered[_rows_with(tags, NOT_ORIGINAL)] = True
    altered |= pc.match_substring(posts["notes"], OTHER_MD5).fill_null(False).to_numpy()
    ids = posts["id"].combine_chunks()
    parts = pc.extract_regex(ids, r"^(?P<source>[^:]*):(?P<number>\d{1,18})(?:_p(?P<page>\d{1,9}))?$")
    number, page = (pc.struct_field(parts, name) for name in ("number", "page"))
    columns = {
        "altered": altered,
        "pixels": pc.multiply(posts["width"].cast(pa.int64()), posts["height"].cast(pa.int64())),
        "elsewhere": pc.invert(pc.starts_with(ids, "danbooru:")),
        "child": pc.is_in(posts["parent"], ids.drop_null()),
        "number": pc.fill_null(number.cast(pa.int64()), np.iinfo(np.int64).max),
        "page": pc.fill_null(pc.if_else(pc.equal(page, ""), "0", page), "0").cast(pa.int64()),
        "id": ids,
    }
    order = [(name, "descending" if name == "pixels" else "ascending") for name in columns]
    found: Rows = pc.sort_indices(pa.table(columns), sort_keys=order).to_numpy().astype(np.int64)
    return found


def _rows_with(lists: pa.ListArray, wanted: Iterable[str]) -> Rows:
    """The rows whose lists have one of these texts, perhaps several times."""
    found = pc.is_in(lists.flatten(), pa.array(wanted, pa.string())).to_numpy(zero_copy_only=False)
    rows: Rows = pc.list_parent_indices(lists).to_numpy()[found]
    return rows


def _with_variants(pictures: Pictures, posts: pa.Table) -> Pictures:
    """Rows tagged as variants, and Danbooru's parents and children, get the number of their family, which is that of
    the parent's id. Posts that are tagged as copies of another file get none."""
    ids, tags = posts["id"].combine_chunks(), posts["tags_meta"].combine_chunks()
    of_danbooru = pc.starts_with(ids, "danbooru:").to_numpy(zero_copy_only=False)
    family = pc.coalesce(posts["parent"], posts["id"]).combine_chunks().dictionary_encode().indices.to_numpy()
    is_variant = of_danbooru & (np.bincount(family)[family] > 1)
    is_variant[_rows_with(tags, [_VARIANT])] = True
    is_variant[_rows_with(tags, NOT_ORIGINAL)] = False
    pictures.variant[is_variant] = family[is_variant]
    return pictures


def _shared(
    place_N2: Place,
    content_N: NDArray[np.uint64],
    phash_N: NDArray[np.uint64],
    aspect_N: NDArray[np.float64],
    work_N: Rows,
    page_N: NDArray[np.int32],
) -> tuple[Place, Pictures]:
    """The rows that may be copies of another row: places and pictures, without variants and thumbnails."""
    row_W = np.flatnonzero(work_N >= 0)
    work_W, page_W = work_N[row_W], page_N[row_W]
    is_page = page_W >= 0
    linked_work_W, page_of_W = np.where(is_page, -1, work_W), np.where(is_page, work_W, -1)
    posts, pages = page_links(linked_work_W, page_of_W, page_W.astype(np.int64), phash_N[row_W], aspect_N[row_W])
    posts, pages = row_W[posts], row_W[pages]
    group_N = groups(content_N, phash_N, aspect_N, (posts, pages))
    shared = np.flatnonzero((np.bincount(group_N, minlength=len(group_N)) > 1)[group_N])
    linked_page = np.full(len(shared), -1)
    linked_page[np.searchsorted(shared, posts)] = pages
    linked_page[np.searchsorted(shared, pages)] = pages
    pictures = Pictures(
        content=content_N[shared],
        phash=phash_N[shared],
        aspect=aspect_N[shared],
        linked_page=linked_page,
        variant=np.full(len(shared), -1),
        thumbnail=np.zeros((len(shared), BYTES), np.uint8),
        has_thumbnail=np.zeros(len(shared), bool),
    )
    return place_N2[shared], pictures


def _admitted(
    store: Store, selection: str, shards: Sequence[str]
) -> tuple[Place, NDArray[np.int64], list[NDArray[Any]]]:
    """Of all admitted rows: places, hashes of the ids, and the columns that identify the pictures as for `_shared`."""
    with ThreadPoolExecutor(_READERS) as readers:
        parts = list(readers.map(lambda shard: _admitted_of(store, selection, shard), shards))
    shard_N = np.repeat(np.arange(len(shards), dtype=np.int32), [len(part[0]) for part in parts])
    # Each part is dropped once it is copied: all parts and all columns together would take twice the memory.
    columns = []
    for _ in range(7):
        columns.append(np.concatenate([part.pop(0) for part in parts] or [np.zeros(0, np.int64)]))
    return np.stack([shard_N, columns.pop(0)], axis=1), columns.pop(0), columns


def _admitted_of(store: Store, selection: str, shard: str) -> list[NDArray[Any]]:
    """The columns of `_admitted` for one shard: row, id, content, phash, aspect, work, page."""
    reasons = store.read_table(f"{selection}/judged/{shard}.parquet", ["reason"])["reason"]
    images = store.read_table(f"images/{shard}.parquet", _KEYS)
    if reasons.null_count < len(reasons):
        images = images.filter(reasons.is_null())
    # 64 bits of the SHA-256: enough for 1e12 times as many pictures as there are.
    content = bytes.fromhex("".join(pc.utf8_slice_codeunits(images["sha256"], 0, 16).to_pylist()))
    work = pc.struct_field(pc.extract_regex(images["id"], r"^pixiv:(?P<work>\d+)_p"), "work").cast(pa.int64())
    width, height = (images[side].to_numpy() for side in ("width", "height"))
    return [
        np.flatnonzero(reasons.is_null().to_numpy()).astype(np.int32),
        np.fromiter(map(hash, images["id"].to_pylist()), np.int64, len(images)),
        np.frombuffer(content, ">u8").astype(np.uint64),
        images["phash"].to_numpy(),
        width / height,
        pc.coalesce(work, images["pixiv_id"]).fill_null(-1).to_numpy(),  # of a page, or linked to by a post
        pc.if_else(work.is_null(), -1, images["page"]).to_numpy(),  # -1 for posts
    ]


def _repeated(store: Store, shards: Sequence[str], place_N2: Place, id_N: NDArray[np.int64]) -> Rows:
    """The rows whose id occurs in an earlier row."""
    # Only ids with equal hashes are compared: ten million texts would take gigabytes.
    order = np.argsort(id_N, kind="stable")
    alike = np.flatnonzero(id_N[order[1:]] == id_N[order[:-1]])
    rows = np.unique(order[np.concatenate([alike, alike + 1])])
    names = _read_rows(store, shards, place_N2[rows], ["id"])["id"].to_pylist()
    first: dict[str, int] = {}
    found = [row for row, name in zip(rows.tolist(), names, strict=True) if first.setdefault(name, row) != row]
    return np.array(found, np.int64)


def _thumbnails(store: Store, shards: Sequence[str], place_C2: Place) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Thumbnails (C, BYTES) of some rows, and whether each has one: shards of earlier versions lack the column."""
    column = _read_rows(store, shards, place_C2, ["thumbnail"])["thumbnail"].combine_chunks()
    filled = column.fill_null(bytes(BYTES))
    values = np.frombuffer(filled.buffers()[1] or b"", np.uint8, len(filled) * BYTES, filled.offset * BYTES)
    return values.reshape(-1, BYTES), column.is_valid().to_numpy(zero_copy_only=False)


def _read_rows(store: Store, shards: Sequence[str], place_C2: Place, columns: list[str]) -> pa.Table:
    """Columns of images/ of some rows, in their order. Thumbnails are null for shards without any."""
    order = np.argsort(place_C2[:, 0], kind="stable")
    bounds = np.searchsorted(place_C2[order, 0], np.arange(len(shards) + 1))

    def read(part: tuple[int, tuple[int, int]]) -> pa.Table:
        number, (start, end) = part
        rows = pa.array(place_C2[order[start:end], 1])
        try:
            return read_images(store, shards[number], columns).select(columns).take(rows)
        except KeyError:
            if columns != ["thumbnail"]:
                raise
            return pa.table({"thumbnail": pa.nulls(len(rows), IMAGES.field("thumbnail").type)})

    wanted = [part for part in enumerate(pairwise(bounds.tolist())) if part[1][0] < part[1][1]]
    with ThreadPoolExecutor(_READERS) as readers:
        parts = list(readers.map(read, wanted))
    if not parts:
        return pa.table({column: pa.array([], IMAGES.field(column).type) for column in columns})
    table = pa.concat_tables(parts).combine_chunks()
    return table.take(pa.array(np.argsort(order)))
