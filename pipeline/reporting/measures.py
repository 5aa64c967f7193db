"""The numbers that the report counts per picture. Each measure has fixed bins, so that counts of shards add up."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.records import TAG_CATEGORIES

# Votes and views spread over orders of magnitude: bins double in width.
_DOUBLING = (0, *(2**n for n in range(24)))


@dataclass(frozen=True)
class Measure:
    """A number per picture, and the ascending edges of its bins.

    Bin 0 is below the first edge, bin i from edge i-1 up to but without edge i, the last bin from the last edge on.
    """

    name: str
    title: str
    edges: tuple[float, ...]
    whole: bool = True  # values are integers
    abbreviated: bool = True  # 16.4k for 16384

    @property
    def bins(self) -> int:
        return len(self.edges) + 1

    def bin_of(self, values: NDArray[np.float64]) -> NDArray[np.intp]:
        """The bin of each value, -1 for NaN."""
        return np.where(np.isnan(values), -1, np.searchsorted(self.edges, values, side="right"))

    def label(self, edge: float) -> str:
        """The text of an edge under a chart."""
        for size, letter in ((1_000_000, "M"), (1_000, "k")) if self.abbreviated else ():
            if abs(edge) >= 10 * size or (abs(edge) >= size and edge % size == 0):
                return f"{edge / size:.3g}{letter}"
        return f"{edge:.4g}"

    def range_of(self, number: int) -> str:
        """The text of a bin."""
        if number == 0:
            return f"below {self.label(self.edges[0])}"
        if number == len(self.edges):
            return f"{self.label(self.edges[-1])} or more"
        low, high = self.edges[number - 1], self.edges[number]
        if self.whole and high == low + 1:
            return self.label(low)
        inclusive = self.whole and high <= 10_000
        return f"{self.label(low)} to {self.label(high - 1 if inclusive else high)}"


IMAGE_MEASURES = (
    Measure("megapixels", "Megapixels", (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32, 64), whole=False),
    Measure("short_side", "Shorter side, pixels", (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)),
    Measure("aspect", "Aspect, width / height",
            (0.25, 0.33, 0.4, 0.5, 0.57, 0.65, 0.7, 0.75, 0.8, 0.95, 1.05, 1.25, 1.33, 1.43, 1.54, 1.75, 2, 2.5, 3, 4),
            whole=False),
    Measure("score", "Score: votes, Pixiv views", _DOUBLING),
    Measure("favourites", "Favourites and bookmarks", _DOUBLING),
    Measure("year", "Year", tuple(range(1995, 2051)), abbreviated=False),
    Measure("tags", "Tags per picture", tuple(range(0, 101, 5))),
)  # fmt: skip
CAPTION_WORDS = Measure("words", "Caption length, words", (1, *range(10, 201, 10)))
MEASURES = (*IMAGE_MEASURES, CAPTION_WORDS)
IMAGE_COLUMNS = ("width", "height", "score", "favourites", "created_at", *(f"tags_{name}" for name in TAG_CATEGORIES))


def image_values(batch: pa.RecordBatch) -> list[NDArray[np.float64]]:
    """The values of IMAGE_MEASURES for each row of a batch with IMAGE_COLUMNS, NaN if unknown."""
    width, height = _floats(batch["width"]), _floats(batch["height"])
    score, favourites, dates = batch["score"], batch["favourites"], batch["created_at"]
    tags = [np.nan_to_num(_floats(pc.list_value_length(batch[f"tags_{name}"]))) for name in TAG_CATEGORIES]
    numbers = [_floats(column) for column in (score, favourites, pc.year(dates))]
    return [width * height / 1e6, np.minimum(width, height), width / height, *numbers, np.sum(tags, axis=0)]


def caption_words(captions: pa.Array) -> NDArray[np.float64]:
    """The number of words of each caption, separated by white space; NaN if there is no caption."""
    return _floats(pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(captions))))


def _floats(column: pa.Array) -> NDArray[np.float64]:
    values: NDArray[np.float64] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values
