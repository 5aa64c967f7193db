"""Rows with scores -> partial files -> the finished shard. See pipeline/storage/partial.py."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.records import REJECTED, scores_schema
from pipeline.core.tables import ROW, SHARD
from pipeline.scores.scoring import MADE_FROM, SCORED, ScoreShard
from pipeline.storage.partial import PartialShard
from pipeline.storage.row_reader import open_parquet
from pipeline.storage.shards import Store

_PARTIAL = pa.schema([SCORED.field("id"), SCORED.field("scores")])


def partial_shard(planned: ScoreShard, dataset: str, folder: str) -> PartialShard:
    return PartialShard(Store(dataset), folder, planned.shard, planned.made_from)


def write_rows(table: pa.Table, dataset: str, folder: str) -> Iterator[pa.Table]:
    """Writes rows of SCORED into partial files of their shards: "scores" has all rows, "rejected" those without."""
    for shard in pc.unique(table[SHARD]).to_pylist():
        rows = table.filter(pc.equal(table[SHARD], shard))
        parts = PartialShard(Store(dataset), folder, shard, rows[MADE_FROM][0].as_py())
        refused = rows.filter(pc.is_valid(rows["reason"])).rename_columns({"id": "key"})
        parts.write("rejected", refused[ROW].to_numpy(), refused.select(REJECTED.names).cast(REJECTED))
        parts.write("scores", rows[ROW].to_numpy(), rows.select(_PARTIAL.names))
    yield table.select([SHARD, ROW])


def commit_shard(planned: ScoreShard, dataset: str, folder: str, labels: Sequence[str]) -> Counter[str]:
    """Writes FOLDER/<shard>, with the rows and the row groups of images/<shard>, and FOLDER/rejected/<shard> from the
    partial files. Returns the number of rows "done" and of rows rejected by reason.

    The scores are committed last, so that a finished shard has both files.
    """
    store, parts = Store(dataset), partial_shard(planned, dataset, folder)
    schema = scores_schema(labels)
    with open_parquet(store.path(f"images/{planned.shard}.parquet")) as images:
        about = images.metadata
        groups = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
    if sum(groups) != planned.rows:
        raise ValueError("the images were replaced while they were scored; run the same command again")
    with store.writing_table(f"{folder}/{planned.shard}.parquet", schema, made_from=planned.made_from) as write:
        for group in _cut((table for _, table in parts.tables("scores")), groups):
            write(_columns(group, schema))
        refusals = pa.concat_tables([REJECTED.empty_table(), *(table for _, table in parts.tables("rejected"))])
        refusals = refusals.combine_chunks()
        store.write_table(f"{folder}/rejected/{planned.shard}.parquet", refusals, REJECTED)
    parts.remove()
    reasons = Counter(refusals["reason"].to_pylist())
    return Counter({"done": planned.rows - reasons.total()}) + reasons


def _cut(tables: Iterable[pa.Table], sizes: Sequence[int]) -> Iterator[pa.Table]:
    """The rows of all tables in tables of these sizes."""
    found, rest = iter(tables), _PARTIAL.empty_table()
    for size in sizes:
        while rest.num_rows < size:
            rest = pa.concat_tables([rest, next(found)])
        yield rest.slice(0, size).combine_chunks()
        rest = rest.slice(size)
    assert not rest.num_rows, "more scores than images"


def _columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table of _PARTIAL with a column per label."""
    has_scores = pc.is_valid(table["scores"]).to_numpy()
    scores_NL: NDArray[np.float32] = np.full((table.num_rows, len(schema) - 1), np.nan, np.float32)
    if has_scores.any():
        scores_NL[has_scores] = pc.list_flatten(table["scores"]).to_numpy().reshape(-1, scores_NL.shape[1])
    # NaN becomes null; a classifier never outputs NaN.
    columns = [pa.array(scores_N, pa.float32(), from_pandas=True) for scores_N in scores_NL.T]
    ids = pa.array(table["id"].to_pylist(), pa.string())
    return pa.Table.from_arrays([ids, *columns], schema=schema)
