"""A selection -> batches: rows are read, cropped and given their text by pure functions that any process can run."""

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
from pipeline.pictures.decoder import Crop, Refused, square_crop
from trainer.diffusion.keyed_random import Stream, keyed_uniform, sample_generator, sample_key
from trainer.samples.layout import Layout
from trainer.samples.layout import Selection as Selection
from trainer.samples.order import Order, streams_of
from trainer.samples.row_groups import RowGroup, RowGroups, read_row_group, selection_rows
from trainer.samples.training_text import CaptionConfig, TextParts, full_text, training_text

# Of this process.
_ROW_GROUPS = RowGroups()

# Of the random numbers of held-out samples: no stage is trained with it.
_HELD_OUT_SEED = 0x68656C64

# Where a picture cannot be read, the next one is taken, in its row group or in so many after it: more than a shard has.
_MOST_ROW_GROUPS = 64
_MOST_HELD_OUT = 64

# Of held-out samples: each thread holds a row group.
_THREADS = 4

# Words that a mirrored picture would belie, and words that speak of writing, which it would show mirrored.
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

    resolution: int  # pixels
    captions: CaptionConfig
    seed: int
    flip: float = 0.0  # probability of mirroring, where nothing in the picture is known to have a side or writing

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip {self.flip} is a probability: from 0 to 1")


@dataclass(frozen=True, eq=False)
class TrainingData:
    """All that decides what each position of training holds. Small: sent once to every process that reads."""

    layout: Layout
    order: Order
    crop: CropConfig
    # That a process keeps: (window + 1) for each stream whose slots it is asked for.
    cached_row_groups: int

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
        keep_layout: str | None = None,
    ) -> "TrainingData":
        """`batch_size` of all `workers` together, each of which is one reading process; `keep_layout`: a folder for
        `Layout.kept_in`. Errors of `Layout.of`."""
        layout = Layout.kept_in(keep_layout, selection, hold_out) if keep_layout else Layout.of(selection, hold_out)
        streams = streams_of(batch_size, streams)
        order = Order(layout.counts_G, batch_size, streams, window, crop.seed, first_epoch)
        return cls(layout, order, crop, -(-streams // workers) * (window + 1))


@dataclass(frozen=True)
class Batch:
    """A part of a global batch. Axes: B samples, H W pixels, 3 = RGB, 4 = (x0, y0, width, height)."""

    ids: list[str]
    pixels_BHW3: NDArray[np.uint8]
    frame_B4: NDArray[np.float32]  # where the crop lies in the resized picture, and that picture's size; pixels
    texts: list[str]
    keys_B: NDArray[np.int64]  # of every random draw that belongs to a sample
    replaced: list[tuple[str, str]]  # ids that could not be read, so that another is in their place, and why

    def part(self, where: slice) -> "Batch":
        """Some of the samples; `replaced` stays that of all."""
        return Batch(
            self.ids[where], self.pixels_BHW3[where], self.frame_B4[where], self.texts[where], self.keys_B[where],
            self.replaced,
        )  # fmt: skip


@dataclass(frozen=True)
class _Sample:
    """Of a Batch."""

    id: str
    cut: Crop
    text: str
    key: int
    replaced: list[tuple[str, str]]


def load_batch(data: TrainingData, positions: Sequence[int] | NDArray[np.int64]) -> Batch:
    """Read, crop and describe the samples at these positions of training; equal on every machine and worker.

    JobFailed where neither a sample nor any of the next ones can be read.
    """
    epoch_B, place_B = data.order.epochs(positions)
    key_B = np.empty_like(place_B)
    for epoch in np.unique(epoch_B):
        here = epoch_B == epoch
        key_B[here] = sample_key(data.order.seed, int(epoch), place_B[here])
    group_B, row_B = data.layout.locate(data.order.samples(positions))
    groups = _ROW_GROUPS.take(data.layout, Counter(group_B.tolist()), data.cached_row_groups)
    chance_B3 = keyed_uniform(key_B, 3, Stream.CROP).tolist()
    places = zip(group_B.tolist(), row_B.tolist(), key_B.tolist(), chance_B3, strict=True)
    return _batch(data, len(group_B), (_training_sample(data, groups, *place) for place in places))


def held_out_batch(data: TrainingData, numbers: Sequence[int]) -> Batch:
    """Held-out samples by number, from 0 to layout.held_out_count - 1: the middle of the picture with its whole text,
    and keys that are the picture's own in every stage and selection.

    The lowest numbers are of the same pictures whatever share is held out. Each sample costs the reading of a row
    group: whoever evaluates more than once keeps the batch.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        return _batch(data, len(numbers), threads.map(partial(_held_out_sample, data), numbers))


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of the samples of all, in their order."""
    return Batch(
        ids=[name for batch in batches for name in batch.ids],
        pixels_BHW3=np.concatenate([batch.pixels_BHW3 for batch in batches]),
        frame_B4=np.concatenate([batch.frame_B4 for batch in batches]),
        texts=[text for batch in batches for text in batch.texts],
        keys_B=np.concatenate([batch.keys_B for batch in batches]),
        replaced=[pair for batch in batches for pair in batch.replaced],
    )


def _batch(data: TrainingData, count: int, samples: Iterable[_Sample]) -> Batch:
    """Each crop is copied as it comes, while the processor's cache has it."""
    side = data.crop.resolution
    pixels_BHW3, frame_B4 = np.empty((count, side, side, 3), np.uint8), np.empty((count, 4), np.float32)
    batch = Batch([], pixels_BHW3, frame_B4, [], np.empty(count, np.int64), [])
    for at, sample in enumerate(samples):
        batch.ids.append(sample.id)
        batch.pixels_BHW3[at] = sample.cut.pixels_HWC
        batch.frame_B4[at] = sample.cut.x0, sample.cut.y0, sample.cut.width, sample.cut.height
        batch.texts.append(sample.text)
        batch.keys_B[at] = sample.key
        batch.replaced.extend(sample.replaced)
    return batch


def _training_sample(
    data: TrainingData, groups: dict[int, RowGroup], group: int, nth: int, key: int, chances: Sequence[float]
) -> _Sample:
    """Training row `nth` of a row group or, where it cannot be read, the next one that can: of the same row group, in
    which the first row follows the last, then of those after it. Which one that is depends on the place alone.
    `chances`: three in [0, 1), of the crop and its mirroring."""
    failures: list[tuple[str, str]] = []
    across, down, mirroring = chances
    for other in range(group, group + _MOST_ROW_GROUPS):
        number = other % len(data.layout.counts_G)
        found = groups.get(number) or _ROW_GROUPS.take(data.layout, {number: 0}, data.cached_row_groups)[number]
        count = len(found.row_T)
        # Not always the first of another row group: it would stand for every picture of one that is lost.
        for place in range(nth, nth + count):
            row = int(found.row_T[place % count])
            cut = _crop(found, row, data.crop.resolution, across, down)
            if isinstance(cut, Crop):
                parts = text_parts(found.rows[row])
                if mirroring < data.crop.flip and may_be_mirrored(parts):
                    cut = mirrored(cut)
                text = training_text(parts, sample_generator(key, Stream.CAPTION), data.crop.captions)
                return _Sample(found.rows[row]["id"], cut, text, key, failures[:1])
            failures.append((found.rows[row]["id"], cut))
            if found.pictures is None:
                break
    raise _nothing_readable(failures)


def _held_out_sample(data: TrainingData, number: int) -> _Sample:
    layout, failures = data.layout, list[tuple[str, str]]()
    for other in range(number, number + min(_MOST_HELD_OUT, layout.held_out_count)):
        at = other % layout.held_out_count
        found, row = read_row_group(layout, int(layout.group_H[at])), int(layout.row_H[at])
        name, cut = found.rows[row]["id"], _crop(found, row, data.crop.resolution, 0.5, 0.5)
        if isinstance(cut, Crop):
            key = int(sample_key(_HELD_OUT_SEED, 0, found.hash_R[row : row + 1])[0])
            return _Sample(name, cut, full_text(text_parts(found.rows[row])), key, failures[:1])
        failures.append((name, cut))
    raise _nothing_readable(failures)


def _nothing_readable(failures: list[tuple[str, str]]) -> JobFailed:
    name, why = failures[0]
    return JobFailed(f"{name} and the next {len(failures) - 1} pictures tried cannot be read: {why}; mend the dataset")


def _crop(group: RowGroup, row: int, side: int, across: float, down: float) -> Crop | str:
    """The crop, or why there is none."""
    if group.pictures is None:
        return group.failure
    cut = square_crop(group.pictures[row].as_py(), side, across, down)
    return f"{cut.reason.value} ({cut.detail})" if isinstance(cut, Refused) else cut


def may_be_mirrored(parts: TextParts) -> bool:
    """Whether nothing that is known of the picture has a side or is writing."""
    return not _NOT_TO_MIRROR.search(full_text(parts))


def mirrored(cut: Crop) -> Crop:
    """The crop of the mirrored picture that shows the same, mirrored."""
    side = cut.pixels_HWC.shape[1]
    return replace(cut, pixels_HWC=cut.pixels_HWC[:, ::-1], x0=cut.width - cut.x0 - side)


# --- Texts without pictures -------------------------------------------------------------------------------------------


def selection_texts(selection: Selection) -> list[str]:
    """Every row's whole text, nothing dropped, in the selection's order."""
    return [
        full_text(text_parts(row))
        for shard in selection.shards
        for row in selection_rows(selection.dataset, selection.name, shard).to_pylist()
    ]


def example_texts(selection: Selection, count: int) -> list[str]:
    """Whole texts of `count` rows spread over the first shard: what a prompt for this selection looks like."""
    rows = selection_rows(selection.dataset, selection.name, selection.shards[0])
    spread = np.linspace(0, rows.num_rows - 1, min(count, rows.num_rows)).astype(int)
    return [full_text(text_parts(row)) for row in rows.take(spread).to_pylist()]


def selection_tags(selection: Selection) -> set[str]:
    """Every general tag of the selection."""
    tables = (selection_rows(selection.dataset, selection.name, shard) for shard in selection.shards)
    return {tag for table in tables for tag in table["general"].combine_chunks().flatten().unique().to_pylist()}


def text_parts(row: dict[str, Any]) -> TextParts:
    """Of a row of SELECTION."""
    tags = {category: tuple(row[category]) for category in TEXT_CATEGORIES}
    return TextParts(**tags, caption=row["caption"], quality=row["quality"], era=row["era"], rating=row["rating"])
