"""Columns of every table that passes between the steps of a row pipeline, beside those of the job."""

from typing import Final

SHARD: Final = "hdm_shard"  # name of the shard
ROW: Final = "hdm_row"  # number of the row in the shard, int32
DIED: Final = "hdm_died"  # True if the row ended its process each time: its picture must not be touched
REPORT: Final = "hdm_report"  # in the last step's table: JSON for the job's Meter, or null
