"""Metadata of posts, read again from their site -> posts/<shard>, in three passes.

`match_rows` finds, for some rows of a metadata file, the pictures that they are about, and keeps their values in a file
sorted by shard. `gather_updates` joins what all such files hold for a range of shards. `update_posts` makes the posts
of one shard, and thus opens one file however large the metadata is. Knows nothing of Ray.

Axes: N pictures of the dataset.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.core.records import POSTS, TAG_CATEGORIES, Post, Rejected
from pipeline.ingestion.raw_profiles import name_columns
from pipeline.ingestion.rules import IngestRules
from pipeline.sources import ADMISSIBLE, SITES
from pipeline.sources.pictures import IMAGE_COLUMNS
from pipeline.sources.reading import Reading
from pipeline.sources.values import UnreadableField
from pipeline.storage.content import content_digest
from pipeline.storage.shards import Store

BYTES_PER_PICTURE: Final = 90  # of the index of all pictures, while it is made

_READERS = 8
_BATCH_ROWS = 8_192
_GROUP_ROWS = 4_096  # a reader wants the rows of few shards
_PAGE = re.compile(r"_p(\d+)$")
_VALUES: Final = [name for name in POSTS.names if name != "id"]

# What a metadata file says about pictures, sorted by shard. Null: nothing, the value stays as it was.
UPDATES: Final = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),  # number of the image shard
        pa.field("row", pa.int32(), nullable=False),
        *[POSTS.field(name).with_nullable(name != "id") for name in POSTS.names],
    ]
)


@dataclass(frozen=True, kw_only=True)
class MetadataPart:
    """Some row groups of a metadata file."""

    path: str
    source: str
    reading: Reading
    first_group: int
    groups: int
    rows: int
    file: str  # to write, within the dataset
    images: str  # digest of all image shards


@dataclass(frozen=True, kw_only=True)
class UpdateRange:
    """A range of image shards to which the same metadata applies."""

    first: int  # number of the first shard
    last: int
    rows: int  # pictures
    parts: tuple[str, ...]  # written by match_rows, in the order in which they apply
    file: str  # to write, within the dataset


@dataclass(frozen=True, kw_only=True)
class PostShard:
    """The posts to make for an image shard."""

    shard: str
    number: int
    rows: int
    updates: str  # file written by gather_updates
    made_from: Mapping[str, str]  # "images", and "metadata": digests of the files

    @property
    def name(self) -> str:
        return f"posts/{self.shard}.parquet"


# --- First pass -------------------------------------------------------------------------------------------------------


def match_rows(part: MetadataPart, dataset: str, shards: Sequence[str], rules: IngestRules) -> dict[str, int]:
    """Writes `part.file`. Its metadata has the number of rows by outcome, which is also returned: "matched", or why a
    row is about no picture."""
    store = Store(dataset)
    pictures = _pictures(dataset, tuple(shards), part.images)
    counts = Counter[str]()
    found: list[dict[str, Any]] = []
    for row, columns in _rows(part, rules):
        outcome = _update(row, part, columns, pictures, rules)
        counts["matched" if isinstance(outcome, list) else outcome] += 1
        found += outcome if isinstance(outcome, list) else []
    found.sort(key=lambda update: update["shard"])  # stable: of several rows about a picture the last one counts
    _write_updates(store, part.file, pa.Table.from_pylist(found, UPDATES), counts=json.dumps(counts))
    return counts


def _write_updates(store: Store, name: str, updates: pa.Table, **metadata: str) -> None:
    with store.writing_table(name, UPDATES, **metadata) as write:
        for start in range(0, max(1, len(updates)), _GROUP_ROWS):
            write(updates.slice(start, _GROUP_ROWS))


def _read_updates(store: Store, name: str, first: int, last: int) -> pa.Table:
    """The updates of a range of shards. Reads only row groups with some."""
    with store.open(name) as opened:
        return pq.read_table(opened, filters=[("shard", ">=", first), ("shard", "<=", last)], schema=UPDATES)


def _rows(part: MetadataPart, rules: IngestRules) -> Iterator[tuple[dict[str, Any] | None, frozenset[str]]]:
    """Each row with its fields, None if it cannot be read, and the columns of POSTS that the file has values for."""
    with Store(part.path).open() as file:
        parquet = pq.ParquetFile(file)
        named = rules.columns(parquet.schema_arrow.names)
        columns = [column for column, field in named.items() if field not in IMAGE_COLUMNS]
        given = [name for name, _ in part.reading.constants]
        refreshes = SITES[part.source].refreshes([*(named[column] for column in columns), *given])
        columns += name_columns(parquet.schema_arrow, named)
        groups = range(part.first_group, part.first_group + part.groups)
        for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns, use_threads=False):
            for row in _as_rows(rules.named(batch)):
                yield row, refreshes


def _as_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    try:
        rows: list[dict[str, Any] | None] = batch.to_pylist()
        return rows
    except Exception:  # of many types, from invalid UTF-8 to times out of range
        if batch.num_rows == 1:
            return [None]
        return [row for number in range(batch.num_rows) for row in _as_rows(batch.slice(number, 1))]


def _update(
    row: dict[str, Any] | None, part: MetadataPart, columns: frozenset[str], pictures: "_Pictures", rules: IngestRules
) -> list[dict[str, Any]] | str:
    """Rows of UPDATES for the pictures that a row of metadata is about, or why there are none."""
    if row is None:
        return "unreadable row"
    site = SITES[part.source]
    try:
        row = part.reading.row(row)
        name, page = site.row_id(row), site.named_page(row)
    except ValueError:
        return "no id"
    except UnreadableField:
        return "unreadable row"
    places = pictures.find(name, page)
    if not places:
        return "not in the dataset"
    try:
        post: Post | Rejected = site.read_row(row, ADMISSIBLE[part.source])
        removal = site.removal(row)
    except Exception:  # a field of an unexpected type
        return "unreadable row"
    if isinstance(post, Rejected):
        return post.reason
    values: dict[str, Any] = {"rating": post.rating, "score": post.score, "favourites": post.favourites}
    values["deleted"] = bool(removal) and removal not in rules.admit
    if any(post.tags.values()):
        values |= {f"tags_{category}": post.tags[category] for category in TAG_CATEGORIES}
    told = {column: value for column, value in values.items() if column in columns}
    return [{"shard": shard, "row": at, "id": _work(name)} | told for shard, at in places]


def _work(name: str) -> str:
    """The id of a picture's post or work: its id without the page."""
    return _PAGE.sub("", name)


class _Pictures:
    """Finds the pictures of a post. Ids are kept as 64-bit hashes, which are compared later (see _overlaid)."""

    def __init__(self, ids: Iterator[pa.ChunkedArray]) -> None:
        hashes, pages, places = [], [], []
        for number, column in enumerate(ids):
            names = column.to_pylist()
            works = [_work(name) for name in names]
            hashes.append(np.fromiter(map(hash, works), np.int64, len(works)))
            named = [_PAGE.search(name) for name in names]
            pages.append(np.array([int(found[1]) if found else -1 for found in named], np.int32))
            rows = np.arange(len(names), dtype=np.int32)
            places.append(np.stack([np.full_like(rows, number), rows], axis=1))
        hash_N = np.concatenate([np.zeros(0, np.int64), *hashes])
        order = np.argsort(hash_N, kind="stable")
        self._hash_N: NDArray[np.int64] = hash_N[order]
        self._page_N = np.concatenate([np.zeros(0, np.int32), *pages])[order]
        self._place_N2 = np.concatenate([np.zeros((0, 2), np.int32), *places])[order]

    def find(self, name: str, page: int | None) -> list[list[int]]:
        """[shard, row] of each picture of a post, or of one page of a work."""
        key = hash(_work(name))
        start, end = np.searchsorted(self._hash_N, key), np.searchsorted(self._hash_N, key, side="right")
        here = slice(start, end)
        places = self._place_N2[here] if page is None else self._place_N2[here][self._page_N[here] == page]
        found: list[list[int]] = places.tolist()
        return found


@lru_cache(maxsize=1)
def _pictures(dataset: str, shards: tuple[str, ...], images: str) -> _Pictures:
    """All pictures of the dataset; `images` is the digest of their shards. Made once in each process."""
    store = Store(dataset)
    with ThreadPoolExecutor(_READERS) as readers:
        return _Pictures(readers.map(lambda shard: store.read_table(f"images/{shard}.parquet", ["id"])["id"], shards))


# --- Second pass ------------------------------------------------------------------------------------------------------


def gather_updates(part: UpdateRange, dataset: str) -> None:
    """Writes `part.file`: the updates of these shards from all parts, by shard, then in the order of the parts."""
    store = Store(dataset)
    with ThreadPoolExecutor(_READERS) as readers:
        found = list(readers.map(lambda name: _read_updates(store, name, part.first, part.last), part.parts))
    updates = pa.concat_tables([UPDATES.empty_table(), *found]).combine_chunks()
    by_shard = np.argsort(updates["shard"].to_numpy(), kind="stable")
    _write_updates(store, part.file, updates.take(pa.array(by_shard)))


# --- Third pass -------------------------------------------------------------------------------------------------------


def update_posts(part: PostShard, dataset: str) -> dict[str, int]:
    """Writes posts/<shard> if it exists or if rows match; removes it if it was made from other images and none match.

    Returns the pictures that are "matched", of which "changed", and the "deleted" ones of the shard.
    """
    store = Store(dataset)
    before = _posts_before(store, part)
    base = before or _from_images(store, part.shard)
    matched_N = np.zeros(base.num_rows, bool)
    after = _overlaid(base, _read_updates(store, part.updates, part.number, part.number), matched_N)
    counts = {
        "matched": int(matched_N.sum()),
        "changed": int(_changed(base, after).sum()),
        "deleted": pc.sum(after["deleted"]).as_py() or 0,
    }
    if before is not None or counts["matched"]:
        about = {"made_from": json.dumps(part.made_from), "digest": content_digest(after), "counts": json.dumps(counts)}
        store.write_table(part.name, after, POSTS, **about)
    else:
        store.remove(part.name)
    return counts


def _posts_before(store: Store, part: PostShard) -> pa.Table | None:
    """The posts of an earlier refresh, if they are of the same images."""
    if not store.exists(part.name):
        return None
    made_from = json.loads(store.metadata(part.name).get("made_from", "{}"))
    return store.read_table(part.name) if made_from.get("images") == part.made_from["images"] else None


def _from_images(store: Store, shard: str) -> pa.Table:
    images = store.read_table(f"images/{shard}.parquet", [name for name in POSTS.names if name != "deleted"])
    return images.append_column(POSTS.field("deleted"), pa.repeat(False, images.num_rows)).cast(POSTS)


def _overlaid(posts: pa.Table, updates: pa.Table, matched_N: NDArray[np.bool_]) -> pa.Table:
    """The posts with the values that are not null in the updates. Sets `matched` of their rows."""
    works = pc.replace_substring_regex(posts["id"], r"_p\d+$", "")
    same = pc.equal(works.take(updates["row"]), updates["id"])  # two ids with one hash
    updates = updates.filter(same)
    row_M = updates["row"].to_numpy()
    matched_N[row_M] = True
    for name in _VALUES:
        told_M = np.flatnonzero(updates[name].is_valid().to_numpy())
        place_N = np.arange(posts.num_rows)
        place_N[row_M[told_M]] = posts.num_rows + told_M  # of several updates of a row the last assignment stays
        if len(told_M):
            kind = posts.schema.field(name).type
            both = pa.chunked_array([*posts[name].chunks, *updates[name].cast(kind).chunks], kind)
            posts = posts.set_column(
                posts.schema.get_field_index(name), POSTS.field(name), both.take(pa.array(place_N))
            )
    return posts.combine_chunks()


def _changed(before: pa.Table, after: pa.Table) -> NDArray[np.bool_]:
    changed_N = np.zeros(before.num_rows, bool)
    for name in _VALUES:
        left, right = before[name], after[name]
        if pa.types.is_list(left.type):
            left, right = pc.binary_join(left, "\n"), pc.binary_join(right, "\n")
        one_null = pc.xor(left.is_null(), right.is_null())
        changed_N |= pc.or_(pc.fill_null(pc.not_equal(left, right), False), one_null).to_numpy()
    return changed_N
