"""Counts a dataset: one pass over the small columns of every shard, without reading pictures.

Memory grows with the rows of a shard, not of the dataset. Everything is counted once per view: view 0 is the whole
dataset, the others are its selections. Shards are added up in the order of their names, so that the result is
reproducible.
"""

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.errors import JobFailed, UsageError
from pipeline.core.records import TAG_CATEGORIES
from pipeline.curation.command import curate_command
from pipeline.reporting.counts import TagCounts, add_words, count_words
from pipeline.reporting.measures import (
    CAPTION_WORDS,
    IMAGE_COLUMNS,
    IMAGE_MEASURES,
    MEASURES,
    Measure,
    caption_words,
    image_values,
)
from pipeline.storage.posts import read_images
from pipeline.storage.scan import map_in_order, read_batches, row_count
from pipeline.storage.shards import Store

SOURCES = ("danbooru", "pixiv", "other")
IMAGE_WORDS = ("rating", "source", "format")
SELECTION_WORDS = ("quality", "era", "rating")
_BATCH_ROWS = 16_384


@dataclass(frozen=True)
class Place:
    """Where the picture with an id is, and what its thumbnail is labelled with."""

    shard: str
    row: int
    size: str  # in pixels
    rating: str | None


@dataclass
class Census:
    """The counts of one shard or of a whole dataset."""

    views: int
    rows: NDArray[np.int64] = field(init=False)  # per view
    histograms: dict[str, NDArray[np.int64]] = field(init=False)  # by measure: (views, SOURCES, bins)
    # By view and column: IMAGE_WORDS of view 0, SELECTION_WORDS of the others.
    words: dict[tuple[int, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    captions: Counter[str] = field(default_factory=Counter)  # "captioned", or the reason why there is no caption
    engines: Counter[str] = field(default_factory=Counter)
    tags: dict[str, TagCounts] = field(init=False)  # by category
    places: dict[str, Place] = field(default_factory=dict)  # of the wanted ids

    def __post_init__(self) -> None:
        self.rows = np.zeros(self.views, np.int64)
        self.histograms = {m.name: np.zeros((self.views, len(SOURCES), m.bins), np.int64) for m in MEASURES}
        self.tags = {category: TagCounts(self.views) for category in TAG_CATEGORIES}

    def merge(self, other: "Census") -> None:
        self.rows += other.rows
        for name, counts in other.histograms.items():
            self.histograms[name] += counts
        for key, words in other.words.items():
            add_words(self.words[key], words)
        add_words(self.captions, other.captions)
        add_words(self.engines, other.engines)
        for category, tags in other.tags.items():
            self.tags[category].merge(tags)
        self.places = other.places | self.places

    def add_values(
        self, measure: Measure, values: NDArray[np.float64], source: NDArray[np.intp], masks: NDArray[np.bool_]
    ) -> None:
        """Counts one value per row. `source` holds indices of SOURCES, `masks` is (views, rows)."""
        bins = measure.bin_of(values)
        cells = source * measure.bins + bins
        for counts, mask in zip(self.histograms[measure.name], masks, strict=True):
            counts += np.bincount(cells[mask & (bins >= 0)], minlength=counts.size).reshape(counts.shape)


def take_census(store: Store, selections: Sequence[str], wanted: Iterable[str], captions: str = "captions") -> Census:
    """Counts every row of images/ with its caption and selections, and finds the rows of the wanted ids. Ratings, tags
    and votes are those that ingest.py --refresh has brought up to date, as in curate.py.

    `captions` is the folder of the captions. Raises UsageError if captions, posts or a selection do not fit their
    images, JobFailed if a file cannot be read.
    """
    ids = pa.array(sorted(set(wanted)), pa.string())
    shards = {folder: set(store.shards(folder)) for folder in (captions, *map("selections/{}".format, selections))}
    census = Census(1 + len(selections))

    def count(shard: str) -> Census:
        folders = {folder for folder, names in shards.items() if shard in names}
        return _count_shard(store, shard, captions, folders, selections, ids)

    for part in map_in_order(count, store.shards("images")):
        census.merge(part)
    return census


def _count_shard(
    store: Store, shard: str, captions: str, folders: set[str], selections: Sequence[str], wanted: pa.Array
) -> Census:
    file, census = f"images/{shard}.parquet", Census(1 + len(selections))
    rows = row_count(store, file)
    masks = np.zeros((census.views, rows), np.bool_)
    masks[0] = True
    for view, name in enumerate(selections, start=1):
        if f"selections/{name}" in folders:
            masks[view, _selected_rows(census, view, store, name, shard, rows)] = True
    census.rows += masks.sum(axis=1)

    source, start = np.empty(rows, np.intp), 0
    for batch in _image_batches(store, shard):
        part = slice(start, start + batch.num_rows)
        source[part] = pc.fill_null(pc.index_in(batch["source"], pa.array(SOURCES)), len(SOURCES) - 1).to_numpy()
        for measure, values in zip(IMAGE_MEASURES, image_values(batch), strict=True):
            census.add_values(measure, values, source[part], masks[:, part])
        for category, tags in census.tags.items():
            tags.add(batch[f"tags_{category}"], masks[:, part])
        for name in IMAGE_WORDS:
            add_words(census.words[0, name], count_words(batch[name]))
        for row in pc.indices_nonzero(pc.is_in(batch["id"], wanted)).to_pylist():
            size = f"{batch['width'][row]} × {batch['height'][row]}"
            place = Place(shard, start + row, size, batch["rating"][row].as_py())
            census.places.setdefault(batch["id"][row].as_py(), place)
        start += batch.num_rows
    if captions in folders:
        _count_captions(census, store, f"{captions}/{shard}.parquet", source, masks)
    return census


def _image_batches(store: Store, shard: str) -> Iterator[pa.RecordBatch]:
    """The small columns of images/<shard>, as refreshed. Raises UsageError if posts/<shard> has other rows, JobFailed
    if a file cannot be read."""
    try:
        images = read_images(store, shard, ["id", *IMAGE_WORDS, *IMAGE_COLUMNS])
    except (pa.ArrowException, OSError, KeyError) as error:
        files = [file for folder in ("images", "posts") if store.exists(file := f"{folder}/{shard}.parquet")]
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JobFailed(
            f"cannot read {' or '.join(map(store.path, files))}: {why}; remove it and run the job that wrote it"
        ) from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    yield from images.to_batches(_BATCH_ROWS)


def _selected_rows(census: Census, view: int, store: Store, name: str, shard: str, rows: int) -> NDArray[np.int32]:
    """The row numbers of a selection. Also counts its words."""
    file, numbers = f"selections/{name}/{shard}.parquet", [np.zeros(0, np.int32)]
    for batch in read_batches(store, file, ["row", *SELECTION_WORDS]):
        numbers.append(batch["row"].to_numpy())
        for column in SELECTION_WORDS:
            add_words(census.words[view, column], count_words(batch[column]))
    selected = np.concatenate(numbers)
    if len(selected) and not 0 <= selected.min() <= selected.max() < rows:
        raise UsageError(
            f"{file} names row {selected.max()}, but images/{shard}.parquet has {rows} rows: it was made from other "
            f"images; run: {curate_command(store, name)}"
        )
    return selected


def _count_captions(
    census: Census, store: Store, file: str, source: NDArray[np.intp], masks: NDArray[np.bool_]
) -> None:
    start, rows = 0, len(source)
    if (captions := row_count(store, file)) != rows:
        raise UsageError(
            f"{file} has {captions} rows, but its images have {rows}: it was made from other images; "
            f"run: python pipeline/caption.py --dataset {shlex.quote(store.root)}"
        )
    for batch in read_batches(store, file, ["caption", "reason", "engine", "model"]):
        part = slice(start, start + batch.num_rows)
        census.add_values(CAPTION_WORDS, caption_words(batch["caption"]), source[part], masks[:, part])
        missing = batch["reason"].filter(pc.is_null(batch["caption"]))
        add_words(census.captions, count_words(missing) | Counter(captioned=batch.num_rows - len(missing)))
        engines = pc.binary_join_element_wise(batch["engine"], batch["model"], " ")
        add_words(census.engines, count_words(pc.utf8_trim_whitespace(engines)))
        start += batch.num_rows
