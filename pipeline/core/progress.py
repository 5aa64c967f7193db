"""The progress bar of a job, and whether the job is stuck."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from tqdm import tqdm

T = TypeVar("T")


@dataclass(frozen=True)
class Standing:
    """Where work that is under way stands."""

    rows: int  # finished
    line: str  # for the progress bar
    counts: dict[str, dict[str, float]]  # metric -> kind -> how much so far
    gauges: dict[str, float] = field(default_factory=dict)  # metric -> how much it is now


_FIRST_SECONDS: Final = 900.0  # allowed for twice before anything is finished: a large shard, an engine that compiles


class Idle:
    """For how long no row was finished, and how long that took before: rows come by the shard, one every second or
    every half hour, and only beside the job's own pace is it seen to be stuck. So are lines of a training's figures.
    Times in seconds."""

    def __init__(self, now: float) -> None:
        self._rows, self._since, self._longest = 0, now, _FIRST_SECONDS

    def look(self, rows: int, now: float) -> dict[str, float]:
        """`rows`: finished so far. By metric."""
        if rows != self._rows:
            took = now - self._since
            self._longest = max(self._longest, took) if self._rows else took
            self._rows, self._since = rows, now
        return {"idle_seconds": now - self._since, "longest_idle_seconds": self._longest}


def progress(items: Iterable[T], total: int | None, description: str, unit: str) -> "tqdm[T]":
    """A progress bar on a terminal; on a log file one line every ten seconds instead of one every tenth of a second."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(items, total=total, desc=description, unit=f" {unit}", mininterval=interval, dynamic_ncols=True)
