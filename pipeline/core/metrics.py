"""Ray metrics of a data job: rows by outcome, rows left, and how long ago the last one finished."""

import threading
import time
from collections import Counter as Tally
from collections.abc import Mapping
from typing import Any, Final

from ray.util.metrics import Counter, Gauge

from pipeline.core.progress import StallDetector

_GAUGE_SECONDS: Final = 3.0  # Ray drops a gauge that was not set for two of its reports, 20 seconds


class JobMetrics:
    """Ray metrics of a job, exported inside the block: the counter `hdm_<task>_rows` of rows by outcome, the gauge
    `hdm_rows_left`, and those of StallDetector.

    A thread sets the gauges again and again, because Ray drops old ones and a shard may take minutes. So a gauge that
    exists means that its job is running.
    """

    def __init__(self, task: str, bar: Any) -> None:
        self._task, self._bar = task, bar
        self._outcomes: Tally[str] = Tally()
        self._counters: dict[str, Counter] = {}
        self._counted: dict[tuple[str, str], float] = {}
        self._gauges: dict[str, Gauge] = {}
        self._shown: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._set_gauges, daemon=True, name="metrics")

    def __enter__(self) -> "JobMetrics":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=_GAUGE_SECONDS)

    def add(self, failure: str, outcomes: Mapping[str, int]) -> None:
        """Counts the rows of one shard by outcome, unless it failed."""
        if not failure:
            self._outcomes.update(outcomes)
            self.count({f"hdm_{self._task}_rows": self._outcomes})

    def count(self, totals: Mapping[str, Mapping[str, float]]) -> None:
        """Sets counters, by metric and kind, to their totals so far."""
        for metric, by_kind in totals.items():
            if metric not in self._counters:
                self._counters[metric] = Counter(metric, description=metric.replace("_", " "), tag_keys=("kind",))
            for kind, value in by_kind.items():
                more = value - self._counted.get((metric, kind), 0)
                if more > 0:  # Ray refuses 0
                    self._counters[metric].inc(more, tags={"kind": kind})
                    self._counted[metric, kind] = value

    def show(self, gauges: dict[str, float]) -> None:
        """Replaces the additional gauges, by metric."""
        self._shown = gauges

    def _set_gauges(self) -> None:
        stall = StallDetector(time.monotonic())
        while True:
            rows = self._bar.n
            pace = {f"hdm_{name}": value for name, value in stall.update(rows, time.monotonic()).items()}
            gauges = {"hdm_rows_left": self._bar.total - rows} | pace | self._shown
            for metric, value in gauges.items():
                if metric not in self._gauges:
                    self._gauges[metric] = Gauge(metric, description=metric.replace("_", " "), tag_keys=("task",))
                self._gauges[metric].set(value, tags={"task": self._task})
            if self._stop.wait(_GAUGE_SECONDS):
                return
