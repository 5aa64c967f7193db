"""The selection of one training stage: which rows it uses, and the text parts of each. Knows nothing of Ray.

Three passes, none of which reads a picture: `judge_shard` says which rows the rules admit; `find_copies` looks among
these, of all shards, for the same picture; `select_shard` writes what is left. Judging comes first: a row that the
rules refuse must not take its sound copies along.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.records import JUDGED, REJECTED, SELECTION, TAG_CATEGORIES
from pipeline.curation.admission import JUDGED_COLUMNS, POST_COLUMNS, TAG_COLUMNS, Refusal, checks, judge, posts_of
from pipeline.curation.dedup import best_first, groups, page_links
from pipeline.curation.quality import PRESETS, RATING_WORDS, Posts, QualityTable, era_words
from pipeline.curation.stage_rules import Rules
from pipeline.storage.fingerprints import MadeFrom, digest
from pipeline.storage.shards import Store
from pipeline.tagging.tag_columns import TagColumn, captions_without_separators, text_columns
from pipeline.tagging.tags import TagRules, reader_of

_IDENTITY = ["id", "sha256", "phash", "width", "height", "page", "pixiv_id", "score", "favourites"]


@dataclass(frozen=True)
class Curation:
    """What is the same for all shards of a selection."""

    dataset: str
    name: str
    rules: Rules
    tags: TagRules
    quality: QualityTable
    captions: str = "captions"  # folder

    @property
    def folder(self) -> str:
        return f"selections/{self.name}"


@dataclass(frozen=True)
class Copies:
    """What the other rows of the dataset mean for the rows of one shard."""

    refused: dict[int, Refusal] = field(default_factory=dict)  # rows that are a copy of another one
    # Pixiv's bookmarks and views of the same picture, by row.
    numbers: dict[int, tuple[int | None, int | None]] = field(default_factory=dict)
    # Danbooru's tags of the same picture, by row of Pixiv that stays since it is larger: TAG_COLUMNS.
    tags: dict[int, dict[str, list[str]]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return digest([sorted(found.items()) for found in (self.refused, self.numbers, self.tags)])


@dataclass(frozen=True)
class ShardWork:
    """One shard to be judged or written."""

    shard: str
    rows: int
    made_from: MadeFrom
    copies: Copies = Copies()


def survey(dataset: str, shards: list[str], preset: str) -> QualityTable:
    """How popular is popular: the borders between quality words, from all rows of these shards."""
    store = Store(dataset)
    with ThreadPoolExecutor(4) as readers:
        parts = readers.map(lambda name: posts_of(store.read_table(f"images/{name}.parquet", POST_COLUMNS)), shards)
        posts = Posts.together(list(parts))
    return QualityTable.compute(PRESETS[preset], posts)


# --- Judging ----------------------------------------------------------------------------------------------------------


def judge_shard(part: ShardWork, curation: Curation) -> None:
    """Write judged/<shard>: what the rules say of each row of images/<shard>."""
    store = Store(curation.dataset)
    images = store.read_table(f"images/{part.shard}.parquet", ["id", *JUDGED_COLUMNS])
    scores = read_scores(store, part.shard, images["id"], curation.rules)
    rules = checks(images, scores, curation.rules, curation.quality, reader_of(curation.tags))
    verdicts = judge(rules, images.num_rows)
    columns = [[verdict and verdict[at] for verdict in verdicts] for at in (0, 1)]
    table = pa.Table.from_arrays([pa.array(column, pa.string()) for column in columns], schema=JUDGED)
    store.write_table(f"{curation.folder}/judged/{part.shard}.parquet", table, JUDGED, **_footnote(part))


def read_scores(store: Store, shard: str, ids: pa.ChunkedArray, rules: Rules) -> dict[str, NDArray[np.float32]]:
    """By <scorer>.<label>: the scores of a shard's rows that the rules ask for."""
    found: dict[str, NDArray[np.float32]] = {}
    for name in rules.scores:
        scorer, _, label = name.partition(".")
        scored = store.read_table(f"scores/{scorer}/{shard}.parquet", ["id", label])
        _check_rows(scored["id"], ids, f"scores/{scorer}/{shard}.parquet", "pipeline/score.py")
        found[name] = scored[label].to_numpy().astype(np.float32)  # null is NaN
    return found


def _check_rows(found: pa.ChunkedArray, ids: pa.ChunkedArray, file: str, job: str) -> None:
    if not found.equals(ids):
        raise ValueError(f"{file} is of other rows than its images, made from another ingest; run {job} again")


def _footnote(part: ShardWork) -> dict[str, str]:
    return {"made_from": json.dumps(part.made_from, sort_keys=True)}


# --- Copies -----------------------------------------------------------------------------------------------------------


def find_copies(dataset: str, name: str, shards: list[str]) -> dict[str, Copies]:
    """By shard: which of the admitted rows are copies of another admitted row, and what the row that stays has from
    its copy on the other site: Pixiv's numbers, Danbooru's tags.

    Of rows of one id the first stays, in the order of the shards' names.
    """
    store = Store(dataset)
    copies = {shard: Copies() for shard in shards}
    if not shards:
        return copies
    with ThreadPoolExecutor(4) as readers:
        table = pa.concat_tables(readers.map(lambda place: _admitted(store, name, *place), enumerate(shards)))
    if not table.num_rows:
        return copies
    shard_N, row_N = table["shard"].to_numpy(), table["row"].to_numpy()
    once = np.ones(table.num_rows, bool)
    once[_repeated(table["id"])] = False
    for at in np.flatnonzero(~once).tolist():
        copies[shards[shard_N[at]]].refused[int(row_N[at])] = "duplicate id", "of a row before it"

    looks = _looks(table, once)
    table = table.select(["id", "width", "height", "favourites", "score"])  # the rest is half of its memory
    pa.default_memory_pool().release_unused()
    group_N = groups(*looks)
    shared = np.flatnonzero(np.bincount(group_N, minlength=len(group_N))[group_N] > 1)
    group_N, shared = group_N[shared], np.flatnonzero(once)[shared]
    pictures = table.take(pa.array(shared)).to_pylist()
    order = best_first([each["id"] for each in pictures], [each["width"] * each["height"] for each in pictures])
    kept: dict[int, int] = {}  # group -> the place of the row that stays
    tagged: dict[int, int] = {}  # place of a row of Pixiv that stays -> that of the best of its copies on Danbooru
    for place in order:
        stays = kept.setdefault(int(group_N[place]), place)
        picture, keeper = pictures[place], pictures[stays]
        if place != stays:
            found = copies[shards[shard_N[shared[place]]]]
            found.refused[int(row_N[shared[place]])] = "duplicate", f"of {keeper['id']}"
            of_pixiv = [each["id"].startswith("pixiv:") for each in (picture, keeper)]
            if of_pixiv == [False, True]:
                tagged.setdefault(stays, place)
            elif of_pixiv == [True, False]:
                numbers = copies[shards[shard_N[shared[stays]]]].numbers
                numbers.setdefault(int(row_N[shared[stays]]), (picture["favourites"], picture["score"]))
    rows = np.stack([shard_N, row_N], axis=1)[shared]
    _copy_tags(store, shards, rows[list(tagged.values())], rows[list(tagged)], copies)
    return copies


def _copy_tags(
    store: Store, shards: list[str], from_C2: NDArray[np.int32], to_C2: NDArray[np.int32], copies: dict[str, Copies]
) -> None:
    """Give rows the tags of others; each is the number of its shard and its own in there."""
    for number in np.unique(from_C2[:, 0]).tolist():
        here = from_C2[:, 0] == number
        table = store.read_table(f"images/{shards[number]}.parquet", TAG_COLUMNS).take(pa.array(from_C2[here, 1]))
        for (shard, row), tags in zip(to_C2[here].tolist(), table.to_pylist(), strict=True):
            copies[shards[shard]].tags[row] = tags


def _admitted(store: Store, name: str, number: int, shard: str) -> pa.Table:
    """The admitted rows of a shard, in what tells pictures apart."""
    reasons = store.read_table(f"selections/{name}/judged/{shard}.parquet", ["reason"])["reason"]
    images = store.read_table(f"images/{shard}.parquet", _IDENTITY)
    row_N = np.flatnonzero(reasons.is_null().to_numpy())
    images = images.take(pa.array(row_N))
    # 64 bits of it: a million million times more than there are pictures.
    content = bytes.fromhex("".join(pc.utf8_slice_codeunits(images["sha256"], 0, 16).to_pylist()))
    work = pc.struct_field(pc.extract_regex(images["id"], r"^pixiv:(?P<work>\d+)_p"), "work").cast(pa.int64())
    columns = {
        "shard": np.full(len(row_N), number, np.int32),
        "row": row_N.astype(np.int32),
        "content": np.frombuffer(content, ">u8").astype(np.uint64),
        "work": work.fill_null(-1),
        "linked_work": images["pixiv_id"].fill_null(-1),
    }
    return pa.table(columns | {column: images[column] for column in _IDENTITY if column not in ("sha256", "pixiv_id")})


def _repeated(ids: pa.ChunkedArray) -> list[int]:
    """The rows whose id a row before them has."""
    # Only ids of equal hash are compared: a table of ten million texts would take gigabytes.
    hash_N = np.concatenate([np.fromiter(map(hash, part.to_pylist()), np.int64, len(part)) for part in ids.chunks])
    order = np.argsort(hash_N, kind="stable")
    alike = np.flatnonzero(hash_N[order[1:]] == hash_N[order[:-1]])
    rows = np.unique(order[np.concatenate([alike, alike + 1])])
    first: dict[str, int] = {}
    names = zip(rows.tolist(), ids.take(pa.array(rows)).to_pylist(), strict=True)
    return [row for row, name in names if first.setdefault(name, row) != row]


def _looks(
    table: pa.Table, among: NDArray[np.bool_]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.float64], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """What `dedup.groups` asks of some of the rows."""
    names = ("content", "phash", "width", "height", "linked_work", "work", "page")
    content, phash, width, height, linked_work, work, page = (table[name].to_numpy()[among] for name in names)
    aspect = width / height
    return content, phash, aspect, page_links(linked_work, work, page, phash, aspect)


# --- Writing ----------------------------------------------------------------------------------------------------------


def select_shard(part: ShardWork, curation: Curation) -> None:
    """Write <shard> and rejected/<shard> of the selection: every row of images/<shard> is in one of them. The selected
    rows are committed last."""
    store = Store(curation.dataset)
    wanted = ["id", "sha256", "score", *POST_COLUMNS, *TAG_COLUMNS]
    images = store.read_table(f"images/{part.shard}.parquet", wanted)
    captions = store.read_table(f"{curation.captions}/{part.shard}.parquet", ["id", "caption"])
    _check_rows(captions["id"], images["id"], f"{curation.captions}/{part.shard}.parquet", "pipeline/caption.py")
    judged = store.read_table(f"{curation.folder}/judged/{part.shard}.parquet")
    reasons, details = (judged[column].to_pylist() for column in ("reason", "detail"))
    for row, refusal in part.copies.refused.items():
        assert reasons[row] is None, (part.shard, row, reasons[row], refusal)
        reasons[row], details[row] = refusal
    out = np.array([reason is not None for reason in reasons], bool)
    kept, refused = np.flatnonzero(~out), np.flatnonzero(out)

    picked = _with_danboorus_tags(images.take(pa.array(kept)), kept, part.copies)
    numbers = _pixiv_numbers(picked, kept, part.copies)
    columns = {
        "id": picked["id"],
        "row": pa.array(kept, pa.int32()),
        **_texts(picked, captions["caption"].take(pa.array(kept)), curation),
        "bookmarks": pa.array([each[0] for each in numbers], pa.int32()),
        "views": pa.array([each[1] for each in numbers], pa.int32()),
    }
    selected = pa.table([columns[field.name] for field in SELECTION], schema=SELECTION)
    rejected = pa.table(
        [
            images["id"].take(pa.array(refused)),
            pa.array([reasons[row] for row in refused], pa.string()),
            pa.array([details[row] for row in refused], pa.string()),
            images["sha256"].take(pa.array(refused)),
        ],
        schema=REJECTED,
    )
    assert selected.num_rows + rejected.num_rows == images.num_rows == part.rows, (part.shard, part.rows)
    made = _footnote(part)
    store.write_table(f"{curation.folder}/rejected/{part.shard}.parquet", rejected, REJECTED, **made)
    store.write_table(
        f"{curation.folder}/{part.shard}.parquet", selected, SELECTION, digest=content_digest(selected), **made
    )


def _texts(images: pa.Table, captions: pa.ChunkedArray, curation: Curation) -> dict[str, pa.Array]:
    """The text parts of each row, in the columns of SELECTION."""
    posts = posts_of(images)
    words = {
        "quality": curation.quality.judge(posts),
        "era": era_words(posts.created_at),
        "rating": [rating and RATING_WORDS.get(rating) for rating in posts.rating.texts()],
    }
    tags = {category: TagColumn.of(images[f"tags_{category}"]) for category in TAG_CATEGORIES}
    return {
        **text_columns(tags, reader_of(curation.tags)),
        "caption": captions_without_separators(captions),
        **{part: pa.array(column, pa.string()) for part, column in words.items()},
    }


def _with_danboorus_tags(images: pa.Table, kept: NDArray[np.int64], copies: Copies) -> pa.Table:
    """Danbooru's are translated, checked and sorted by category; Pixiv's are what the artist wrote."""
    if not copies.tags:
        return images
    rows = sorted(copies.tags)
    own = images.select(TAG_COLUMNS)
    table = pa.concat_tables([own, pa.Table.from_pylist([copies.tags[row] for row in rows], own.schema)])
    place = np.arange(len(kept))
    place[np.isin(kept, rows)] = len(kept) + np.arange(len(rows))
    table = table.take(pa.array(place))
    for column in TAG_COLUMNS:
        images = images.set_column(images.column_names.index(column), images.schema.field(column), table[column])
    return images


def _pixiv_numbers(images: pa.Table, kept: NDArray[np.int64], copies: Copies) -> list[tuple[int | None, int | None]]:
    """Bookmarks and views of each row: a Pixiv row's own, or those of the Pixiv row that it is kept instead of."""
    own = zip(*(images[column].to_pylist() for column in ("source", "favourites", "score")), strict=True)
    return [
        (favourites, score) if source == "pixiv" else copies.numbers.get(row, (None, None))
        for row, (source, favourites, score) in zip(kept.tolist(), own, strict=True)
    ]


def content_digest(table: pa.Table) -> str:
    """Of the rows and their order alone: the same however the columns lie in memory, and whichever file they are in."""
    hashed = hashlib.sha256()
    for name in table.column_names:
        hashed.update(name.encode())
        _hash_column(hashed, table[name])
    return hashed.hexdigest()


def _hash_column(hashed: Any, column: pa.ChunkedArray) -> None:
    """Lengths, with -1 for null, then the values one after the other."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_list(array.type):
        hashed.update(pc.list_value_length(array).fill_null(-1).to_numpy(zero_copy_only=False).tobytes())
        _hash_column(hashed, array.flatten())
    elif pa.types.is_string(array.type):
        hashed.update(pc.binary_length(array).fill_null(-1).to_numpy(zero_copy_only=False).tobytes())
        array = array.fill_null("")
        _, offsets, values = array.buffers()
        if len(array):
            ends = np.frombuffer(offsets, np.int32)[[array.offset, array.offset + len(array)]]
            hashed.update(memoryview(values)[ends[0] : ends[1]] if values else b"")
    else:
        hashed.update(array.is_valid().to_numpy(zero_copy_only=False).tobytes())
        hashed.update(array.fill_null(0).to_numpy(zero_copy_only=False).tobytes())
