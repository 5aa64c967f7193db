"""The progress of a job: its bar, the state that it reports, and whether it has stalled."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from tqdm import tqdm

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """The state of running work."""

    rows: int  # finished
    line: str  # for the progress bar
    counts: dict[str, dict[str, float]]  # metric -> kind -> total so far
    gauges: dict[str, float] = field(default_factory=dict)  # metric -> current value


_FIRST_SECONDS: Final = 900.0  # normal time until the first row: a large shard, an engine that compiles


class StallDetector:
    """Measures the time since the last finished row and the longest time that one took before. A job is stalled only
    in relation to its own pace: rows are finished shard by shard, one every second or every half hour. Times are in
    seconds."""

    def __init__(self, now: float) -> None:
        self._rows, self._since, self._longest = 0, now, _FIRST_SECONDS

    def update(self, rows: int, now: float) -> dict[str, float]:
        """`rows` is the total finished so far. Returns the two times by metric name."""
        if rows != self._rows:
            took = now - self._since
            self._longest = max(self._longest, took) if self._rows else took
            self._rows, self._since = rows, now
        return {"idle_seconds": now - self._since, "longest_idle_seconds": self._longest}


def progress_bar(items: Iterable[T], total: int | None, description: str, unit: str, **settings: Any) -> "tqdm[T]":
    """Updates every 0.1 s on a terminal and prints a line every 10 s into a log file. `settings`: of tqdm."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        items, total=total, desc=description, unit=f" {unit}", mininterval=interval, dynamic_ncols=True, **settings
    )
