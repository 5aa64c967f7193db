"""Makes one shard of a selection: applies the rules to its rows, then writes the selected rows with their texts.

The rules come before the search for copies (copies.py), so that a refused row never displaces an admitted copy of the
same picture. No pass reads pictures, and nothing here knows of Ray.
"""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.records import JUDGED, REJECTED, SELECTION, TAG_CATEGORIES
from pipeline.curation.admission import TAG_COLUMNS, checks, first_refusals, rule_columns
from pipeline.curation.copies import Copies, read_copies
from pipeline.curation.quality import POST_COLUMNS, RATING_WORDS, QualityTable, era_words, posts_of
from pipeline.curation.stage_rules import Rules
from pipeline.storage.content import content_digest
from pipeline.storage.fingerprints import Provenance
from pipeline.storage.posts import read_images
from pipeline.storage.shards import Store
from pipeline.tagging.tag_columns import TagColumn, remove_caption_separators, text_columns
from pipeline.tagging.tags import TagRules, cached_reader


@dataclass(frozen=True)
class Curation:
    """What all shards of a selection have in common."""

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
class ShardWork:
    """One shard for `apply_rules` or `select_shard`."""

    shard: str
    rows: int
    provenance: Provenance

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata for the footers of the files that are written."""
        return {"made_from": json.dumps(self.provenance, sort_keys=True)}


def apply_rules(part: ShardWork, curation: Curation) -> None:
    """Writes judged/<shard>: for each row of images/<shard> the first rule that refuses it, or null."""
    store = Store(curation.dataset)
    images = read_images(store, part.shard, rule_columns(curation.rules))
    scores = read_scores(store, part.shard, images["id"], curation.rules)
    results = checks(images, scores, curation.rules, curation.quality, cached_reader(curation.tags))
    refusals = first_refusals(results, images.num_rows)
    columns = [pa.array([refusal and refusal[at] for refusal in refusals], pa.string()) for at in (0, 1)]
    table = pa.Table.from_arrays(columns, schema=JUDGED)
    store.write_table(f"{curation.folder}/judged/{part.shard}.parquet", table, JUDGED, **part.metadata)


def read_scores(store: Store, shard: str, ids: pa.ChunkedArray, rules: Rules) -> dict[str, NDArray[np.float32]]:
    """The scores that the rules ask for, by <scorer>.<label>; one per row of the shard, NaN if there is none."""
    scores: dict[str, NDArray[np.float32]] = {}
    for name in rules.scores:
        scorer, _, label = name.partition(".")
        table = store.read_table(f"scores/{scorer}/{shard}.parquet", ["id", label])
        _check_ids(table["id"], ids, f"scores/{scorer}/{shard}.parquet", "pipeline/score.py")
        scores[name] = table[label].to_numpy().astype(np.float32)
    return scores


def _check_ids(found: pa.ChunkedArray, ids: pa.ChunkedArray, file: str, job: str) -> None:
    if not found.equals(ids):
        raise ValueError(f"{file} has other rows than its images, which were ingested again; run {job} again")


def select_shard(part: ShardWork, curation: Curation) -> None:
    """Writes <shard> and rejected/<shard> of the selection: each row of images/<shard> is in one of them.

    The selected rows are committed last.
    """
    store = Store(curation.dataset)
    wanted = ["id", "sha256", "score", *POST_COLUMNS, *TAG_COLUMNS]
    images = read_images(store, part.shard, wanted)
    captions = store.read_table(f"{curation.captions}/{part.shard}.parquet", ["id", "caption"])
    _check_ids(captions["id"], images["id"], f"{curation.captions}/{part.shard}.parquet", "pipeline/caption.py")
    judged = store.read_table(f"{curation.folder}/judged/{part.shard}.parquet")
    reasons, details = (judged[column].to_pylist() for column in ("reason", "detail"))
    copies = read_copies(store, curation.folder, part.shard, part.provenance["copies"])
    for row, refusal in copies.refused.items():
        assert reasons[row] is None, (part.shard, row, reasons[row], refusal)
        reasons[row], details[row] = refusal
    out = np.array([reason is not None for reason in reasons], bool)
    kept, refused = np.flatnonzero(~out), np.flatnonzero(out)

    picked = _with_danbooru_tags(images.take(pa.array(kept)), kept, copies)
    bookmarks, views = _pixiv_numbers(picked, kept, copies)
    columns = {
        "id": picked["id"],
        "row": pa.array(kept, pa.int32()),
        **_texts(picked, captions["caption"].take(pa.array(kept)), curation),
        "bookmarks": bookmarks,
        "views": views,
    }
    selected = pa.table([columns[name] for name in SELECTION.names], schema=SELECTION)
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
    store.write_table(f"{curation.folder}/rejected/{part.shard}.parquet", rejected, REJECTED, **part.metadata)
    metadata = {"digest": content_digest(selected), **part.metadata}
    store.write_table(f"{curation.folder}/{part.shard}.parquet", selected, SELECTION, **metadata)


def _texts(images: pa.Table, captions: pa.ChunkedArray, curation: Curation) -> dict[str, pa.Array]:
    """The text columns of SELECTION."""
    words = {
        "quality": curation.quality.words_of(posts_of(images)),
        "era": era_words(images["created_at"].to_numpy()),
        "rating": [rating and RATING_WORDS.get(rating) for rating in images["rating"].to_pylist()],
    }
    tags = {category: TagColumn.of(images[f"tags_{category}"]) for category in TAG_CATEGORIES}
    return {
        **text_columns(tags, cached_reader(curation.tags)),
        "caption": remove_caption_separators(captions),
        **{part: pa.array(column, pa.string()) for part, column in words.items()},
    }


def _with_danbooru_tags(images: pa.Table, kept: NDArray[np.int64], copies: Copies) -> pa.Table:
    """Replaces the tags of Pixiv rows that have a copy on Danbooru.

    Danbooru's tags are translated, checked and sorted into categories; Pixiv's are what the artist wrote.
    """
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


def _pixiv_numbers(images: pa.Table, kept: NDArray[np.int64], copies: Copies) -> list[pa.Array]:
    """Bookmarks and views of each row: its own if it is from Pixiv, else those of its copy on Pixiv."""
    copied = [copies.numbers.get(row, (None, None)) for row in kept.tolist()]
    of_pixiv = pc.equal(images["source"], "pixiv")
    return [
        pc.if_else(of_pixiv, images[own], pa.array([numbers[at] for numbers in copied], pa.int32()))
        for at, own in enumerate(("favourites", "score"))
    ]
