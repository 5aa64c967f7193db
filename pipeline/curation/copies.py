"""Finds copies among the admitted rows of all shards, and what the kept row takes over from its copies."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.curation.admission import TAG_COLUMNS, Refusal
from pipeline.curation.dedup import best_first, groups, page_links
from pipeline.storage.fingerprints import digest
from pipeline.storage.shards import Store

_COLUMNS = ["id", "sha256", "phash", "width", "height", "page", "pixiv_id", "score", "favourites"]


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


def find_copies(dataset: str, name: str, shards: list[str]) -> dict[str, Copies]:
    """The copies among the admitted rows of the selection `name`, by shard.

    Of a group of copies the one that `dedup.best_first` puts first is kept. A kept row of one site takes over data from
    its best copy on the other site: Pixiv's numbers or Danbooru's tags. Of several rows with one id the first is kept,
    in the order of the shards' names.
    """
    store = Store(dataset)
    copies = {shard: Copies() for shard in shards}
    if not shards:
        return copies
    with ThreadPoolExecutor(4) as readers:
        table = pa.concat_tables(readers.map(lambda place: _admitted(store, name, *place), enumerate(shards)))
    if not table.num_rows:
        return copies
    place_N2 = np.stack([table["shard"].to_numpy(), table["row"].to_numpy()], axis=1)
    first_N = np.ones(table.num_rows, bool)
    first_N[_repeated(table["id"])] = False
    for shard, row in place_N2[~first_N].tolist():
        copies[shards[shard]].refused[row] = "duplicate id", "of a row before it"

    columns = _group_columns(table, first_N)
    table = table.select(["id", "width", "height", "favourites", "score"])  # frees half of its memory
    pa.default_memory_pool().release_unused()
    group_N = groups(*columns)
    shared = np.flatnonzero(np.bincount(group_N, minlength=len(group_N))[group_N] > 1)
    group_C, row_C = group_N[shared].tolist(), np.flatnonzero(first_N)[shared]
    pictures, place_C2 = table.take(pa.array(row_C)).to_pylist(), place_N2[row_C]

    kept: dict[int, int] = {}  # group -> the kept row
    tagged: dict[int, int] = {}  # kept row of Pixiv -> its best copy on Danbooru
    for copy in best_first([each["id"] for each in pictures], [each["width"] * each["height"] for each in pictures]):
        keeper = kept.setdefault(group_C[copy], copy)
        if copy == keeper:
            continue
        (shard, row), (kept_shard, kept_row) = place_C2[copy].tolist(), place_C2[keeper].tolist()
        copies[shards[shard]].refused[row] = "duplicate", f"of {pictures[keeper]['id']}"
        of_pixiv = [pictures[each]["id"].startswith("pixiv:") for each in (copy, keeper)]
        if of_pixiv == [False, True]:
            tagged.setdefault(keeper, copy)
        elif of_pixiv == [True, False]:
            numbers = pictures[copy]["favourites"], pictures[copy]["score"]
            copies[shards[kept_shard]].numbers.setdefault(kept_row, numbers)
    _copy_tags(store, shards, place_C2[list(tagged.values())], place_C2[list(tagged)], copies)
    return copies


def _admitted(store: Store, name: str, number: int, shard: str) -> pa.Table:
    """The admitted rows of a shard with the columns that identify their pictures."""
    reasons = store.read_table(f"selections/{name}/judged/{shard}.parquet", ["reason"])["reason"]
    images = store.read_table(f"images/{shard}.parquet", _COLUMNS)
    row_N = np.flatnonzero(reasons.is_null().to_numpy())
    images = images.take(pa.array(row_N))
    # 64 bits of the SHA-256: enough for 1e12 times as many pictures as there are.
    content = bytes.fromhex("".join(pc.utf8_slice_codeunits(images["sha256"], 0, 16).to_pylist()))
    work = pc.struct_field(pc.extract_regex(images["id"], r"^pixiv:(?P<work>\d+)_p"), "work").cast(pa.int64())
    columns = {
        "shard": np.full(len(row_N), number, np.int32),
        "row": row_N.astype(np.int32),
        "content": np.frombuffer(content, ">u8").astype(np.uint64),
        "work": work.fill_null(-1),
        "linked_work": images["pixiv_id"].fill_null(-1),
    }
    return pa.table(columns | {column: images[column] for column in _COLUMNS if column not in ("sha256", "pixiv_id")})


def _repeated(ids: pa.ChunkedArray) -> list[int]:
    """The rows whose id occurs in an earlier row."""
    # Only ids with equal hashes are compared: a hash table of ten million texts would take gigabytes.
    hash_N = np.concatenate([np.fromiter(map(hash, part.to_pylist()), np.int64, len(part)) for part in ids.chunks])
    order = np.argsort(hash_N, kind="stable")
    alike = np.flatnonzero(hash_N[order[1:]] == hash_N[order[:-1]])
    rows = np.unique(order[np.concatenate([alike, alike + 1])])
    first: dict[str, int] = {}
    names = zip(rows.tolist(), ids.take(pa.array(rows)).to_pylist(), strict=True)
    return [row for row, name in names if first.setdefault(name, row) != row]


def _group_columns(
    table: pa.Table, among: NDArray[np.bool_]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.float64], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The arguments of `dedup.groups` for some of the rows."""
    names = ("content", "phash", "width", "height", "linked_work", "work", "page")
    content, phash, width, height, linked_work, work, page = (table[name].to_numpy()[among] for name in names)
    aspect = width / height
    return content, phash, aspect, page_links(linked_work, work, page, phash, aspect)


def _copy_tags(
    store: Store, shards: Sequence[str], from_C2: NDArray[np.int32], to_C2: NDArray[np.int32], copies: dict[str, Copies]
) -> None:
    """Copies the tags of some rows to others. Rows are given as (number of the shard, row)."""
    for number in np.unique(from_C2[:, 0]).tolist():
        here = from_C2[:, 0] == number
        table = store.read_table(f"images/{shards[number]}.parquet", TAG_COLUMNS).take(pa.array(from_C2[here, 1]))
        for (shard, row), tags in zip(to_C2[here].tolist(), table.to_pylist(), strict=True):
            copies[shards[shard]].tags[row] = tags
