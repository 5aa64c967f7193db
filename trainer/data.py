"""A selection -> batches: rows are read, cropped and given their text by pure functions that any worker can run."""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.images import Refused, square_crop
from pipeline.records import TEXT_CATEGORIES
from pipeline.shards import Store
from trainer.captions import CaptionConfig, TextParts, full_text, training_text
from trainer.flow import Stream, sample_generator, sample_key
from trainer.order import samples

# A worker process keeps this many row groups: with groups of 32 MB at most 512 MB.
_CACHED_ROW_GROUPS = 16


@dataclass(frozen=True)
class Selection:
    """The shards of a selection and how many rows each has; sample i is row i - (rows before) of its shard."""

    dataset: str  # absolute: workers run in folders of their own
    name: str
    shards: tuple[str, ...]
    counts: tuple[int, ...]
    digest: str  # selection.json's hash: training records it

    @property
    def count(self) -> int:
        return sum(self.counts)

    @classmethod
    def load(cls, dataset: str, name: str) -> "Selection":
        """FileNotFoundError where the dataset has no such selection."""
        store = Store(dataset)
        record = json.loads(store.read(f"selections/{name}/selection.json"))
        shards = tuple(sorted(record["shards"]))
        return cls(store.root, name, shards, tuple(record["shards"][shard] for shard in shards), record["hash"])

    def locate(self, index: int) -> tuple[str, int]:
        """The shard of sample `index`, and its row there."""
        ends = np.cumsum(self.counts)
        shard = int(np.searchsorted(ends, index, side="right"))
        return self.shards[shard], int(index - (ends[shard] - self.counts[shard]))


@dataclass(frozen=True)
class CropConfig:
    """What turns a row into a sample."""

    resolution: int  # pixels
    captions: CaptionConfig
    seed: int


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch. Axes: B samples, H W pixels, 3 = RGB, 4 = (x0, y0, width, height)."""

    ids: list[str]
    pixels_BHW3: NDArray[np.uint8]
    frame_B4: NDArray[np.float32]  # where the crop lies in the resized picture, and that picture's size; pixels
    texts: list[str]
    keys_B: NDArray[np.int64]  # of every random draw that belongs to a sample


def load_batch(selection: Selection, crop: CropConfig, positions: range) -> Batch:
    """Read, crop and describe the samples at these positions of training; equal on every machine and worker."""
    indices = samples(selection.count, crop.seed, positions.start, positions.stop)
    loaded = [
        _load_sample(selection, crop, position, int(index)) for position, index in zip(positions, indices, strict=True)
    ]
    ids, pixels, frames, texts, keys = zip(*loaded, strict=True)
    return Batch(list(ids), np.stack(pixels), np.array(frames, np.float32), list(texts), np.array(keys, np.int64))


def _load_sample(selection: Selection, crop: CropConfig, position: int, index: int) -> tuple[Any, ...]:
    epoch, place = divmod(position, selection.count)
    key = int(sample_key(crop.seed, epoch, place))
    shard, at = selection.locate(index)
    row = _selection_rows(selection.dataset, selection.name, shard).slice(at, 1).to_pylist()[0]
    image = _image(selection.dataset, shard, row["row"])
    cut = square_crop(image, crop.resolution, *sample_generator(key, Stream.CROP).random(2))
    if isinstance(cut, Refused):
        raise ValueError(f"{row['id']} in {shard} cannot be read any more: {cut.reason.value} ({cut.detail})")
    text = training_text(_text_parts(row), sample_generator(key, Stream.CAPTION), crop.captions)
    return row["id"], cut.pixels_HWC, (cut.x0, cut.y0, cut.width, cut.height), text, key


def selection_texts(selection: Selection) -> list[str]:
    """Every row's whole text, nothing dropped, in the selection's order."""
    return [
        full_text(_text_parts(row))
        for shard in selection.shards
        for row in _selection_rows(selection.dataset, selection.name, shard).to_pylist()
    ]


def example_texts(selection: Selection, count: int) -> list[str]:
    """Whole texts of `count` rows spread over the first shard: what a prompt for this selection looks like."""
    rows = _selection_rows(selection.dataset, selection.name, selection.shards[0])
    spread = np.linspace(0, rows.num_rows - 1, min(count, rows.num_rows)).astype(int)
    return [full_text(_text_parts(row)) for row in rows.take(spread).to_pylist()]


def selection_tags(selection: Selection) -> set[str]:
    """Every general tag of the selection."""
    tables = (_selection_rows(selection.dataset, selection.name, shard) for shard in selection.shards)
    return {tag for table in tables for tag in table["general"].combine_chunks().flatten().unique().to_pylist()}


def _text_parts(row: dict[str, Any]) -> TextParts:
    tags = {category: tuple(row[category]) for category in TEXT_CATEGORIES}
    return TextParts(**tags, caption=row["caption"], quality=row["quality"], era=row["era"], rating=row["rating"])


@lru_cache(maxsize=64)
def _selection_rows(dataset: str, name: str, shard: str) -> pa.Table:
    return Store(dataset).read_table(f"selections/{name}/{shard}.parquet")


@lru_cache(maxsize=64)
def _row_group_ends(dataset: str, shard: str) -> NDArray[np.int64]:
    with Store(dataset).open(f"images/{shard}.parquet") as file:
        footer = pq.read_metadata(file)
    return np.cumsum([footer.row_group(group).num_rows for group in range(footer.num_row_groups)])


@lru_cache(maxsize=_CACHED_ROW_GROUPS)
def _row_group(dataset: str, shard: str, group: int) -> pa.ChunkedArray:
    with Store(dataset).open(f"images/{shard}.parquet") as file:
        return pq.ParquetFile(file).read_row_group(group, columns=["image"])["image"]


def _image(dataset: str, shard: str, row: int) -> bytes:
    ends = _row_group_ends(dataset, shard)
    group = int(np.searchsorted(ends, row, side="right"))
    start = int(ends[group - 1]) if group else 0
    data: bytes = _row_group(dataset, shard, group)[row - start].as_py()
    return data
