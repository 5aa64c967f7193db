"""Histograms of the score sidecars: scores/<scorer>/<shard>.parquet, an id and one float column per label."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.reporting.measures import Measure, even_measure
from pipeline.storage.scan import in_order, read_batches
from pipeline.storage.shards import Store

# A tagger's ten thousand labels would be no chart.
_LABELS_SHOWN = 12


@dataclass(frozen=True)
class ScoreChart:
    """How the values of one label are distributed."""

    scorer: str
    measure: Measure
    counts: NDArray[np.int64]  # per bin
    unknown: int  # rows without a finite value


def score_charts(store: Store, scorer: str) -> list[ScoreChart]:
    """One chart per label, for the first labels; their ranges come from a first pass over the same columns."""
    files = [f"scores/{scorer}/{shard}.parquet" for shard in store.shards(f"scores/{scorer}")]
    with store.open(files[0]) as file:
        columns = pq.read_schema(file)
    labels = [column.name for column in columns if pa.types.is_floating(column.type)][:_LABELS_SHOWN]
    return [_chart(store, scorer, files, label) for label in labels]


def _chart(store: Store, scorer: str, files: list[str], label: str) -> ScoreChart:
    low, high, rows = np.inf, -np.inf, 0
    for least, most, count in in_order(lambda file: _range(store, file, label), files):
        low, high, rows = min(low, least), max(high, most), rows + count
    measure = even_measure(label, low, high) if low <= high else even_measure(label, 0, 1)
    counts = np.zeros(measure.bins, np.int64)
    for part in in_order(lambda file: _counts(store, file, label, measure), files):
        counts += part
    return ScoreChart(scorer, measure, counts, rows - int(counts.sum()))


def _range(store: Store, file: str, label: str) -> tuple[float, float, int]:
    """The smallest and largest finite value, and the number of rows."""
    low, high, rows = np.inf, -np.inf, 0
    for batch in read_batches(store, file, [label]):
        values = _finite(batch)
        low, high = min(low, values.min(initial=np.inf)), max(high, values.max(initial=-np.inf))
        rows += batch.num_rows
    return float(low), float(high), rows


def _counts(store: Store, file: str, label: str, measure: Measure) -> NDArray[np.int64]:
    counts = np.zeros(measure.bins, np.int64)
    for batch in read_batches(store, file, [label]):
        counts += np.bincount(measure.bin_of(_finite(batch)), minlength=measure.bins)
    return counts


def _finite(batch: pa.RecordBatch) -> NDArray[np.float64]:
    values = batch.column(0).cast(pa.float64()).to_numpy(zero_copy_only=False)
    finite: NDArray[np.float64] = values[np.isfinite(values)]
    return finite
