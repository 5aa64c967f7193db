"""A dataset counted: one pass over the small columns of every shard, in memory that does not grow with the rows.

The pictures themselves are never read here. Everything is counted once per view: view 0 is the whole dataset, the
others are its selections. Shards are added up in the order of their names, so the same dataset gives the same census.
"""

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.errors import UsageError
from pipeline.core.records import TAG_CATEGORIES
from pipeline.curation.rerun import curate_command
from pipeline.reporting.measures import (
    CAPTION_WORDS,
    IMAGE_COLUMNS,
    IMAGE_MEASURES,
    MEASURES,
    Measure,
    caption_words,
    image_values,
)
from pipeline.reporting.tallies import TagTally, add_words, tally
from pipeline.storage.scan import in_order, read_batches, row_count
from pipeline.storage.shards import Store

SOURCES = ("danbooru", "pixiv", "other")
SELECTION_WORDS = ("quality", "era", "rating")


@dataclass
class Census:
    """The sums. Histograms are sources x bins, per view; the words of view 0 come from images/, the others' from the
    selections."""

    views: int
    rows: NDArray[np.int64] = field(init=False)  # per view
    histograms: dict[str, NDArray[np.int64]] = field(init=False)  # by measure: views x SOURCES x bins
    words: dict[tuple[int, str], Counter[str]] = field(default_factory=dict)  # by view and column
    captions: Counter[str] = field(default_factory=Counter)  # rows: "captioned" or the reason for having none
    engines: Counter[str] = field(default_factory=Counter)
    tags: dict[str, TagTally] = field(init=False)
    places: dict[str, "Place"] = field(default_factory=dict)  # of the ids that were asked for

    def __post_init__(self) -> None:
        self.rows = np.zeros(self.views, np.int64)
        self.histograms = {m.name: np.zeros((self.views, len(SOURCES), m.bins), np.int64) for m in MEASURES}
        self.tags = {category: TagTally(self.views) for category in TAG_CATEGORIES}

    def merge(self, other: "Census") -> None:
        self.rows += other.rows
        for name, counts in other.histograms.items():
            self.histograms[name] += counts
        for key, words in other.words.items():
            add_words(self.words.setdefault(key, Counter()), words)
        add_words(self.captions, other.captions)
        add_words(self.engines, other.engines)
        for category, tags in other.tags.items():
            self.tags[category].merge(tags)
        for wanted, place in other.places.items():
            self.places.setdefault(wanted, place)

    def add_values(
        self, measure: Measure, values: NDArray[np.float64], source: NDArray[np.intp], masks: NDArray[np.bool_]
    ) -> None:
        """Count one value per row: `source` numbers SOURCES, `masks` is views x rows."""
        bins = measure.bin_of(values)
        cells = source * measure.bins + bins
        shape = (len(SOURCES), measure.bins)
        for view, mask in enumerate(masks):
            counts = np.bincount(cells[mask & (bins >= 0)], minlength=shape[0] * shape[1])
            self.histograms[measure.name][view] += counts.reshape(shape)


@dataclass(frozen=True)
class Place:
    """Where the picture with an id is, and what a thumbnail says of it."""

    shard: str
    row: int
    size: str  # in pixels
    rating: str | None


def take_census(store: Store, selections: Sequence[str], wanted: Iterable[str], captions: str = "captions") -> Census:
    """Count every row of images/ with its caption and selections, and find the places of the wanted ids; `captions`
    is their folder.

    UsageError where a caption or selection file is of other rows than its images.
    """
    ids = pa.array(sorted(set(wanted)), pa.string())
    found = {folder: set(store.shards(folder)) for folder in (captions, *map("selections/{}".format, selections))}
    census = Census(1 + len(selections))

    def count(shard: str) -> Census:
        there = [folder for folder in found if shard in found[folder]]
        return _count_shard(store, shard, captions, there, selections, ids)

    for part in in_order(count, store.shards("images")):
        census.merge(part)
    return census


def _count_shard(
    store: Store, shard: str, captions: str, folders: list[str], selections: Sequence[str], wanted: pa.Array
) -> Census:
    census = Census(1 + len(selections))
    rows = row_count(store, f"images/{shard}.parquet")
    masks = np.zeros((census.views, rows), np.bool_)
    masks[0] = True
    for view, name in enumerate(selections, start=1):
        if f"selections/{name}" in folders:
            masks[view, _selected_rows(census, view, store, name, shard, rows)] = True
    census.rows += masks.sum(axis=1)

    source = np.empty(rows, np.intp)
    start = 0
    columns = ["id", "source", "format", "rating", *IMAGE_COLUMNS]
    for batch in read_batches(store, f"images/{shard}.parquet", columns):
        part = slice(start, start + batch.num_rows)
        source[part] = pc.fill_null(pc.index_in(batch["source"], pa.array(SOURCES)), len(SOURCES) - 1).to_numpy()
        for name, values in image_values(batch).items():
            measure = next(measure for measure in IMAGE_MEASURES if measure.name == name)
            census.add_values(measure, values, source[part], masks[:, part])
        for category in TAG_CATEGORIES:
            census.tags[category].add(batch[f"tags_{category}"], masks[:, part])
        for name in ("source", "format", "rating"):
            add_words(census.words.setdefault((0, name), Counter()), tally(batch[name]))
        _find_places(census, batch, wanted, shard, start)
        start += batch.num_rows
    if captions in folders:
        _count_captions(census, store, f"{captions}/{shard}.parquet", source, masks)
    return census


def _selected_rows(census: Census, view: int, store: Store, name: str, shard: str, rows: int) -> NDArray[np.int32]:
    """The numbers of the selected rows; their words are counted on the way."""
    file, numbers = f"selections/{name}/{shard}.parquet", []
    for batch in read_batches(store, file, ["row", *SELECTION_WORDS]):
        numbers.append(batch["row"].to_numpy())
        for column in SELECTION_WORDS:
            add_words(census.words.setdefault((view, column), Counter()), tally(batch[column]))
    selected: NDArray[np.int32] = np.concatenate([np.zeros(0, np.int32), *numbers])
    if len(selected) and not 0 <= selected.min() <= selected.max() < rows:
        raise UsageError(
            f"{file} names row {selected.max()}, but images/{shard}.parquet has {rows} rows: made from another ingest; "
            f"run: {curate_command(store, name)}"
        )
    return selected


def _count_captions(
    census: Census, store: Store, file: str, source: NDArray[np.intp], masks: NDArray[np.bool_]
) -> None:
    start, rows = 0, len(source)
    if (captions := row_count(store, file)) != rows:
        raise UsageError(
            f"{file} has {captions} rows, but its images have {rows}: made from another ingest; "
            f"run: python pipeline/caption.py --dataset {shlex.quote(store.root)}"
        )
    for batch in read_batches(store, file, ["caption", "reason", "engine", "model"]):
        part = slice(start, start + batch.num_rows)
        census.add_values(CAPTION_WORDS, caption_words(batch["caption"]), source[part], masks[:, part])
        missing = batch["reason"].filter(pc.is_null(batch["caption"]))
        add_words(census.captions, tally(missing) | Counter(captioned=batch.num_rows - len(missing)))
        add_words(census.engines, tally(_joined(batch["engine"], batch["model"])))
        start += batch.num_rows


def _joined(engine: pa.Array, model: pa.Array) -> pa.Array:
    return pc.utf8_trim_whitespace(pc.binary_join_element_wise(engine, model, " "))


def _find_places(census: Census, batch: pa.RecordBatch, wanted: pa.Array, shard: str, start: int) -> None:
    for row in pc.indices_nonzero(pc.is_in(batch["id"], wanted)).to_pylist():
        size = f"{batch['width'][row]} × {batch['height'][row]}"
        place = Place(shard, start + row, size, batch["rating"][row].as_py())
        census.places.setdefault(batch["id"][row].as_py(), place)
