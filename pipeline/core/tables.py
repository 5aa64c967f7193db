"""Tables that pass between the steps of a row pipeline, and their columns beside those of the job."""

from collections.abc import Mapping
from typing import Final

import pyarrow as pa

SHARD: Final = "hdm_shard"  # name of the shard
ROW: Final = "hdm_row"  # number of the row in the shard, int32
DIED: Final = "hdm_died"  # True if the row killed its worker: its picture must not be touched
REPORT: Final = "hdm_report"  # in the last step's table: JSON for the job's Meter, or null

TABLE_BYTES: Final = 16 << 20  # between steps; a larger table is cut into several, unless it is a single row


def with_constants(table: pa.Table, values: Mapping[str, str]) -> pa.Table:
    """The table with more columns, each of which has the same text in every row."""
    for name, value in values.items():
        table = table.append_column(name, pa.array([value] * table.num_rows, pa.string()))
    return table


def labelled(table: pa.Table, shard: str, died: bool = False) -> pa.Table:
    """The table of a shard's rows as the pipeline passes it to its steps."""
    table = with_constants(table, {SHARD: shard})
    return table.append_column(DIED, pa.array([died] * table.num_rows, pa.bool_()))
