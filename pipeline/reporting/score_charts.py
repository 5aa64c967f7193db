"""Histograms of scores/<scorer>/<shard>.parquet, which has an id and one float column per label."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.reporting.measures import Measure
from pipeline.storage.scan import map_in_order, read_batches
from pipeline.storage.shards import Store

_LABELS_SHOWN = 12  # a tagger has ten thousand
_BINS = 24  # between the lowest and the highest score


@dataclass(frozen=True)
class ScoreChart:
    """The distribution of the scores of one label."""

    scorer: str
    measure: Measure
    counts: NDArray[np.int64]  # per bin
    unknown: int  # rows without a finite score


def score_charts(store: Store, scorer: str) -> list[ScoreChart]:
    """One chart for each of the first labels of a scorer."""
    files = [f"scores/{scorer}/{shard}.parquet" for shard in store.shards(f"scores/{scorer}")]
    with store.open(files[0]) as file:
        columns = pq.read_schema(file)
    labels = [column.name for column in columns if pa.types.is_floating(column.type)][:_LABELS_SHOWN]
    return [_chart(store, scorer, files, label) for label in labels]


def _chart(store: Store, scorer: str, files: list[str], label: str) -> ScoreChart:
    """Reads the column twice, first for the range of the bins: all scores at once might not fit in memory."""

    def read(file: str) -> Iterator[NDArray[np.float64]]:
        for batch in read_batches(store, file, [label]):
            values = batch.column(0).cast(pa.float64()).to_numpy(zero_copy_only=False)
            yield np.where(np.isfinite(values), values, np.nan)

    def extents(file: str) -> list[tuple[float, float, int]]:
        return [(np.fmin.reduce(v, initial=np.inf), np.fmax.reduce(v, initial=-np.inf), len(v)) for v in read(file)]

    found = [extent for part in map_in_order(extents, files) for extent in part]
    low, high = min((part[0] for part in found), default=0.0), max((part[1] for part in found), default=0.0)
    if low > high:  # no finite score
        low, high = 0.0, 1.0
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1).tolist()
    measure = Measure(label, label, tuple(edges), whole=False)

    def count(file: str) -> NDArray[np.int64]:
        counts = np.zeros(measure.bins + 1, np.int64)  # one more, for NaN
        for values in read(file):
            counts += np.bincount(measure.bin_of(values) + 1, minlength=measure.bins + 1)
        return counts

    unknown, *counts = np.sum(list(map_in_order(count, files)), axis=0).tolist()
    return ScoreChart(scorer, measure, np.array(counts), unknown)
