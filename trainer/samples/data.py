"""A selection -> batches: reads rows, crops pictures and makes texts, in pure functions that any process can call."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import JobFailed
from pipeline.core.records import TEXT_CATEGORIES
from pipeline.pictures.crops import Crop, square_crop
from pipeline.pictures.decoder import Refused
from trainer.diffusion.keyed_random import Stream, keyed_uniform, sample_generator, sample_key
from trainer.samples.order import Order, effective_streams
from trainer.samples.row_groups import RowGroup, RowGroups, read_row_group, selection_rows
from trainer.samples.row_index import RowIndex, Selection
from trainer.samples.training_text import CaptionConfig, TextParts, full_text, training_text

_ROW_GROUPS = RowGroups()  # of this process

_HELD_OUT_SEED = 0x68656C64  # of the random numbers of held-out samples; no stage trains with it

# How many row groups, or held-out samples, after an unreadable picture are tried in its place: more than a shard has.
_MOST_ROW_GROUPS = 64
_MOST_HELD_OUT = 64

_SHARDS_OF_EXAMPLES = 8  # each is read whole, its texts only

_THREADS = 4  # that read held-out samples; each holds a row group

# Words that a mirrored picture would contradict, and words about writing, which would appear mirrored.
_SIDES = "left|right|leftmost|rightmost|clockwise|counterclockwise|mirrored"
_WRITING = (
    r"text|words?|letters?|lettering|alphabet|kanji|hiragana|katakana|hangul|romaji|writing|written|handwriting|"
    r"calligraphy|font|caption|subtitled?|(speech|thought) bubble|spoken \w+|comic|\d+koma|sign|signature|signed|"
    r"autograph|logo|watermark|username|name|title|dated|numbers?|numbered|web address|url|qr code|barcode|newspaper|"
    r"(book|magazine|album) cover|poster|document|translated|translation request|english|japanese|chinese|korean"
)
_NOT_TO_MIRROR = re.compile(rf"\b({_SIDES}|{_WRITING})\b|左|右|文字|漫画", re.IGNORECASE)


@dataclass(frozen=True)
class CropConfig:
    """What turns a row into a sample."""

    resolution: int  # pixels: side of the crop
    captions: CaptionConfig
    seed: int
    flip: float = 0.0  # probability of mirroring a picture without sides or writing in its text

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip {self.flip} must be a probability, from 0 to 1")


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Everything that determines the sample at each position. Small enough to be sent to every process that reads."""

    row_index: RowIndex
    order: Order
    crop: CropConfig
    cached_row_groups: int  # per process: (window + 1) for each of its streams

    @classmethod
    def load(
        cls,
        selection: Selection,
        crop: CropConfig,
        *,
        batch_size: int,
        streams: int = 16,
        window: int = 4,
        hold_out: float = 0.0,
        workers: int = 1,
        first_epoch: int = 0,
        index_folder: str | None = None,
    ) -> "TrainingData":
        """Raises the errors of `RowIndex.build`.

        `batch_size` is summed over the workers, each of which is one process that reads. `index_folder` caches the row
        index between starts.
        """
        if index_folder:
            index = RowIndex.load_or_build(index_folder, selection, hold_out)
        else:
            index = RowIndex.build(selection, hold_out)
        streams = effective_streams(batch_size, streams)
        order = Order(index.counts_G, batch_size, streams, window, crop.seed, first_epoch)
        return cls(index, order, crop, -(-streams // workers) * (window + 1))


@dataclass(frozen=True)
class Batch:
    """Samples of a part of a global batch. Axes: B samples, H W pixels, 3 = RGB, 4 = (x0, y0, width, height)."""

    ids: list[str]
    pixels_BHW3: NDArray[np.uint8]
    frame_B4: NDArray[np.float32]  # position of the crop in the resized picture, and that picture's size; pixels
    texts: list[str]
    keys_B: NDArray[np.int64]  # key of every random number of a sample
    replaced: list[tuple[str, str]]  # (id, reason) of pictures that could not be read and were replaced by others

    def part(self, where: slice) -> "Batch":
        """Some of the samples, with the whole list `replaced`."""
        return Batch(
            self.ids[where], self.pixels_BHW3[where], self.frame_B4[where], self.texts[where], self.keys_B[where],
            self.replaced,
        )  # fmt: skip

    def take(self, numbers: Sequence[int]) -> "Batch":
        """The samples with these numbers, in this order, with the whole list `replaced`."""
        ids, texts = ([values[number] for number in numbers] for values in (self.ids, self.texts))
        where = list(numbers)
        return Batch(ids, self.pixels_BHW3[where], self.frame_B4[where], texts, self.keys_B[where], self.replaced)


@dataclass(frozen=True)
class _Sample:
    id: str
    crop: Crop
    text: str
    key: int
    replaced: list[tuple[str, str]]


def load_batch(data: TrainingData, positions: Sequence[int] | NDArray[np.int64]) -> Batch:
    """The samples at these positions of the data order; equal on every machine and worker.

    JobFailed if neither a picture nor any of the next ones can be read.
    """
    epoch_B, place_B = data.order.epochs(positions)
    key_B = np.empty_like(place_B)
    for epoch in np.unique(epoch_B):
        here = epoch_B == epoch
        key_B[here] = sample_key(data.order.seed, int(epoch), place_B[here])
    group_B, row_B = data.row_index.locate(data.order.samples(positions))
    groups = _ROW_GROUPS.take(data.row_index, Counter(group_B.tolist()), data.cached_row_groups)
    uniform_B3 = keyed_uniform(key_B, 3, Stream.CROP).tolist()
    places = zip(group_B.tolist(), row_B.tolist(), key_B.tolist(), uniform_B3, strict=True)
    return _batch(data, len(group_B), (_training_sample(data, groups, *place) for place in places))


def held_out_batch(data: TrainingData, numbers: Sequence[int]) -> Batch:
    """Held-out samples by number, below row_index.held_out_count: the centre crop with the full text.

    Their keys depend on the picture only, and low numbers mean the same pictures whatever share is held out. Each
    sample costs reading a row group, so evaluations should keep the batch.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        return _batch(data, len(numbers), threads.map(partial(_held_out_sample, data), numbers))


def concatenate(batches: Sequence[Batch]) -> Batch:
    """One batch of all their samples, in order."""
    if len(batches) == 1:
        return batches[0]
    return Batch(
        ids=[name for batch in batches for name in batch.ids],
        pixels_BHW3=np.concatenate([batch.pixels_BHW3 for batch in batches]),
        frame_B4=np.concatenate([batch.frame_B4 for batch in batches]),
        texts=[text for batch in batches for text in batch.texts],
        keys_B=np.concatenate([batch.keys_B for batch in batches]),
        replaced=[pair for batch in batches for pair in batch.replaced],
    )


def _batch(data: TrainingData, count: int, samples: Iterable[_Sample]) -> Batch:
    """Copies each crop as it comes, while it is in the processor's cache."""
    side = data.crop.resolution
    pixels_BHW3, frame_B4 = np.empty((count, side, side, 3), np.uint8), np.empty((count, 4), np.float32)
    batch = Batch([], pixels_BHW3, frame_B4, [], np.empty(count, np.int64), [])
    for at, sample in enumerate(samples):
        batch.ids.append(sample.id)
        batch.pixels_BHW3[at] = sample.crop.pixels_HWC
        batch.frame_B4[at] = sample.crop.x0, sample.crop.y0, sample.crop.width, sample.crop.height
        batch.texts.append(sample.text)
        batch.keys_B[at] = sample.key
        batch.replaced.extend(sample.replaced)
    return batch


def _training_sample(
    data: TrainingData, groups: dict[int, RowGroup], group: int, nth: int, key: int, uniform: Sequence[float]
) -> _Sample:
    """Training row `nth` of a row group. If it cannot be read, the next readable row replaces it.

    First the other rows of the row group are tried, in a circle, then the row groups after it. The replacement depends
    on the position only. `uniform`: three numbers in [0, 1) for the crop's two offsets and the mirroring.
    """
    failures: list[tuple[str, str]] = []
    across, down, mirroring = uniform
    for other in range(group, group + _MOST_ROW_GROUPS):
        number = other % len(data.row_index.counts_G)
        found = groups.get(number) or _ROW_GROUPS.take(data.row_index, {number: 0}, data.cached_row_groups)[number]
        count = len(found.row_T)
        # Starts at `nth` in other row groups too: their first row would replace every picture of a lost row group.
        for place in range(nth, nth + count):
            row = int(found.row_T[place % count])
            crop = _crop(found, row, data.crop.resolution, across, down)
            if isinstance(crop, Crop):
                parts = text_parts(found.rows[row])
                if mirroring < data.crop.flip and can_mirror(parts):
                    crop = mirrored(crop)
                text = training_text(parts, sample_generator(key, Stream.CAPTION), data.crop.captions)
                return _Sample(found.rows[row]["id"], crop, text, key, failures[:1])
            failures.append((found.rows[row]["id"], crop))
            if found.pictures is None:
                break
    raise _nothing_readable(failures)


def _held_out_sample(data: TrainingData, number: int) -> _Sample:
    index, failures = data.row_index, list[tuple[str, str]]()
    for other in range(number, number + min(_MOST_HELD_OUT, index.held_out_count)):
        at = other % index.held_out_count
        found, row = read_row_group(index, int(index.group_H[at])), int(index.row_H[at])
        name, crop = found.rows[row]["id"], _crop(found, row, data.crop.resolution, 0.5, 0.5)
        if isinstance(crop, Crop):
            key = int(sample_key(_HELD_OUT_SEED, 0, found.hash_R[row : row + 1])[0])
            return _Sample(name, crop, full_text(text_parts(found.rows[row])), key, failures[:1])
        failures.append((name, crop))
    raise _nothing_readable(failures)


def _nothing_readable(failures: list[tuple[str, str]]) -> JobFailed:
    name, why = failures[0]
    return JobFailed(f"{name} and the next {len(failures) - 1} pictures cannot be read: {why}; repair the dataset")


def _crop(group: RowGroup, row: int, side: int, across: float, down: float) -> Crop | str:
    """The crop, or the reason for having none."""
    if group.pictures is None:
        return group.failure
    crop = square_crop(group.pictures[row].as_py(), side, across, down)
    return f"{crop.reason.value} ({crop.detail})" if isinstance(crop, Refused) else crop


def can_mirror(parts: TextParts) -> bool:
    """True if no tag or caption mentions a side or writing."""
    return not _NOT_TO_MIRROR.search(full_text(parts))


def mirrored(crop: Crop) -> Crop:
    """The same crop of the mirrored picture."""
    side = crop.pixels_HWC.shape[1]
    return replace(crop, pixels_HWC=crop.pixels_HWC[:, ::-1], x0=crop.width - crop.x0 - side)


# --- Texts without pictures -------------------------------------------------------------------------------------------


def selection_texts(selection: Selection) -> list[str]:
    """The full text of every row, in the selection's order."""
    return [
        full_text(text_parts(row))
        for shard in selection.shards
        for row in selection_rows(selection.dataset, selection.name, shard).to_pylist()
    ]


def example_texts(selection: Selection, count: int) -> list[str]:
    """Full texts of up to `count` rows, spread over up to _SHARDS_OF_EXAMPLES shards, which may differ in their kind
    of pictures, and over the rows of each."""
    texts = []
    shards = _spread(len(selection.shards), min(count, _SHARDS_OF_EXAMPLES))
    for i, shard in enumerate(shards):
        rows = selection_rows(selection.dataset, selection.name, selection.shards[shard])
        wanted = count * (i + 1) // len(shards) - count * i // len(shards)
        texts += [full_text(text_parts(row)) for row in rows.take(_spread(rows.num_rows, wanted)).to_pylist()]
    return texts


def _spread(length: int, count: int) -> NDArray[np.int64]:
    """Up to `count` different indices below `length`, evenly spaced, the first and the last among them."""
    return np.linspace(0, length - 1, min(count, length)).astype(np.int64)


def selection_tags(selection: Selection) -> set[str]:
    """Every general tag of the selection."""
    tables = (selection_rows(selection.dataset, selection.name, shard) for shard in selection.shards)
    return {tag for table in tables for tag in table["general"].combine_chunks().flatten().unique().to_pylist()}


def text_parts(row: dict[str, Any]) -> TextParts:
    """Tags, caption and words of a SELECTION row."""
    tags = {category: tuple(row[category]) for category in TEXT_CATEGORIES}
    return TextParts(**tags, caption=row["caption"], quality=row["quality"], era=row["era"], rating=row["rating"])
