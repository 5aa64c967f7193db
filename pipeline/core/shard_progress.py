"""What the driver of a row pipeline knows of its shards: missing rows, failures, and the commits that run."""

import pickle
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError

from pipeline.core.cluster import at_most_a_node
from pipeline.core.errors import JobStopped
from pipeline.core.failures import ShardFailures, is_fatal, reason
from pipeline.core.metrics import JobMetrics
from pipeline.core.progress import Progress
from pipeline.core.tables import REPORT, ROW, SHARD

# Columns of rows that tell of a failure.
FAILURE: Final = "hdm_failure"  # why the rest of the shard cannot be done
FATAL: Final = "hdm_fatal"  # True if no other shard could be done either

_COMMIT_CPUS: Final = 0.02  # mostly waits for a disk or for S3; not 0, which would allow the head node
_COMMIT_BYTES: Final = 300 << 20  # least memory of a commit: two row groups of images, twice, and the process
_RETRIES: Final = 1
_POLL_SECONDS: Final = 1.0
_REPORT_SECONDS: Final = 3.0
# Rows that kill their worker when they run alone, before the job stops: many do not do so because of their pictures.
_DIED_ROWS: Final = 20
_DIED_SHARE: Final = 0.01

T = TypeVar("T", contravariant=True)


class Meter(Protocol):
    """Turns what the last step reports into the job's progress."""

    def add(self, report: str) -> None: ...

    def commit(self, outcomes: Mapping[str, int]) -> None:
        """Takes what the commit of a shard returned."""
        ...

    def progress(self, rows: int) -> Progress: ...


@dataclass(frozen=True, kw_only=True)
class Pending(Generic[T]):
    """A shard and the numbers of its rows that are neither in partial files nor committed."""

    shard: T
    rows: NDArray[np.int32]


class ShardProgress:
    """The missing rows of every shard of a pipeline. A shard is committed, in a task, when it has none."""

    def __init__(
        self, todo: Mapping[str, Pending[Any]], commit: Callable[[Any], Mapping[str, int]], bar: Any,
        metrics: JobMetrics, meter: Meter | None, commit_memory: int,
    ) -> None:  # fmt: skip
        self.failures = ShardFailures()
        self._todo, self._bar, self._metrics, self._meter = todo, bar, metrics, meter
        # A byte per row: tens of millions of rows are in the memory of the head node.
        self._missing = {name: np.ones(len(pending.rows), bool) for name, pending in todo.items() if len(pending.rows)}
        self._rows = sum(map(len, self._missing.values()))
        self._commit = ray.put(commit)
        self._call = ray.remote(
            num_cpus=_COMMIT_CPUS, memory=at_most_a_node(max(_COMMIT_BYTES, commit_memory)), max_retries=_RETRIES,
            scheduling_strategy="SPREAD",
        )(_call)  # fmt: skip
        self._most_commits = max(2, int(ray.cluster_resources().get("CPU", 0)) // 2)
        self._ready = deque(name for name in todo if name not in self._missing)
        self._committing: dict[Any, str] = {}
        self._reported = 0.0

    def items(self, died: bool) -> list[dict[str, Any]]:
        """One per shard with missing rows."""
        return [
            {
                "name": name,
                "shard": pickle.dumps(self._todo[name].shard),
                "rows": self._todo[name].rows[missing].tobytes(),
                "died": died,
            }
            for name, missing in self._missing.items()
            if name not in self.failures
        ]

    def check_died(self, job: str) -> None:
        """Raises JobStopped if more rows are missing, after each ran alone, than pictures can explain."""
        died = sum(int(missing.sum()) for name, missing in self._missing.items() if name not in self.failures)
        if died > max(_DIED_ROWS, _DIED_SHARE * self._rows) or (died > 1 and died == self._rows):
            raise JobStopped(
                f"{job}: {died} of {self._rows} rows killed their worker even when they ran alone, which pictures do "
                "not explain: look for the cause in Ray's logs (out of memory, a library built for another CPU, full "
                "/dev/shm); finished rows are kept, run the same command again"
            )

    def update(self, table: pa.Table | None) -> None:
        """Accounts for the rows of a table of the last step, or only for time that has passed."""
        if table is not None and table.num_rows:
            if FAILURE in table.column_names:
                for row in table.filter(pc.is_valid(table[FAILURE])).to_pylist():
                    self.failures.fail(row[SHARD], row[FAILURE], row[FATAL])
                table = table.filter(pc.is_null(table[FAILURE]))
            if self._meter and REPORT in table.column_names:
                for report in table[REPORT].drop_null().to_pylist():
                    self._meter.add(report)
            if table.num_rows:
                self._account(table)
        self._advance(0)
        if self._meter and time.monotonic() - self._reported > _REPORT_SECONDS:
            self._show(self._meter)

    def is_committing(self) -> bool:
        """Waits a second for commits, and returns whether some are left."""
        self._advance(_POLL_SECONDS)
        return bool(self._ready or self._committing)

    def finish(self) -> None:
        """Names the shards with missing rows as failed."""
        for name, missing in self._missing.items():
            self.failures.setdefault(name, f"{missing.sum()} rows were lost with their process; see Ray's logs")
        if self._meter:
            self._show(self._meter)

    def _account(self, table: pa.Table) -> None:
        rows = table[ROW].to_numpy()
        names = table[SHARD].combine_chunks().dictionary_encode()
        for number, name in enumerate(names.dictionary.to_pylist()):
            if name not in self._missing:  # a task that was run again although its result had arrived
                continue
            missing = self._missing[name]
            places = np.searchsorted(self._todo[name].rows, rows[names.indices.to_numpy() == number])
            done = np.unique(places[missing[places]])
            missing[done] = False
            self._bar.update(len(done))
            if not missing.any():
                del self._missing[name]
                if name not in self.failures:
                    self._ready.append(name)

    def _advance(self, seconds: float) -> None:
        """Starts and ends commits; waits up to `seconds` for one to end."""
        while self._ready and len(self._committing) < self._most_commits:
            name = self._ready.popleft()
            self._committing[self._call.remote(self._commit, self._todo[name].shard)] = name
        if not self._committing:
            return
        ended, _ = ray.wait(list(self._committing), timeout=seconds)
        for reference in ended:
            name = self._committing.pop(reference)
            try:
                outcomes = ray.get(reference)
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else error
                self.failures.fail(name, reason(cause), is_fatal(cause))
            except RayError as error:
                self.failures.fail(name, f"the process that committed it died: {reason(error)}", False)
            else:
                self.failures.succeed()
                if self._meter:
                    self._meter.commit(outcomes)
                else:
                    self._metrics.add("", outcomes)

    def _show(self, meter: Meter) -> None:
        self._reported = time.monotonic()
        progress = meter.progress(self._bar.n)
        self._bar.set_postfix_str(progress.line, refresh=False)
        self._metrics.count(progress.counts)
        self._metrics.show(progress.gauges)


def _call(commit: Callable[[Any], Mapping[str, int]], shard: Any) -> Mapping[str, int]:
    return commit(shard)
