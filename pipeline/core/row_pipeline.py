"""Streams the rows of shards through Ray Data operators: read, then steps on tasks or actors; then commits each shard.

The last step writes rows into partial files (pipeline/storage/partial.py) and passes their numbers on. A shard is
committed in a task of its own as soon as every row is accounted for. Rows that are lost because their process died are
run again one by one, which isolates the row that kills it; such a row is run a last time with DIED set, and the steps
then give it a reason instead of touching its picture.
"""

import errno
import pickle
import queue
import re
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from numpy.typing import NDArray
from ray.data.context import AutoscalingConfig
from ray.exceptions import RayError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from pipeline.core.errors import JobFailed, JobStopped, S3Refused, S3Unavailable
from pipeline.core.metrics import JobMetrics
from pipeline.core.progress import Progress, progress_bar
from pipeline.core.tables import DIED, REPORT, ROW, SHARD, TABLE_BYTES

# Columns of rows that tell of a failure.
_FAILURE: Final = "hdm_failure"  # why the rest of the shard cannot be done
_FATAL: Final = "hdm_fatal"  # True if no other shard could be done either

_RETRIES: Final = 1  # of a task whose process or node died, before its rows are run one by one
_READ_CPUS: Final = 0.1  # of tasks that mostly wait for a disk or for S3
CHECK_CPUS: Final = 0.9  # of tasks that decode: beside them there is room for one that reads, also on two cores
_COMMIT_BYTES: Final = 300 << 20  # memory of a commit: two row groups of images, twice, and the process
_POLL_SECONDS: Final = 1.0
_REPORT_SECONDS: Final = 3.0
_LOST_SECONDS: Final = 60.0  # without any node that an actor could run on, before the job fails
_SAME_FAILURES: Final = 20  # shards that fail in a row for the same reason, before the job stops
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT)

Work = Callable[[pa.Table], Iterator[pa.Table]]
T = TypeVar("T", contravariant=True)


class Read(Protocol[T]):
    """Yields rows of a shard as tables with the column ROW. `wanted` are their numbers, ascending."""

    def __call__(self, shard: T, wanted: NDArray[np.int32]) -> Iterator[pa.Table]: ...


class Meter(Protocol):
    """Turns what the last step reports into the job's progress."""

    def add(self, report: str) -> None: ...

    def commit(self, outcomes: Mapping[str, int]) -> None:
        """Takes what the commit of a shard returned."""
        ...

    def progress(self, rows: int) -> Progress: ...


@dataclass(frozen=True, kw_only=True)
class Actors:
    """An autoscaling pool. Each actor calls `make` once, for its first table."""

    make: Callable[[], Work]
    least: int = 1
    most: int | None = None  # None: as many as the cluster has room for, also on nodes that join later
    calls: int = 1  # tables that an actor works on concurrently, each in a thread
    gpus: float = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    runtime_env: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs(self) -> set[str]:
        """Names of the resources without which no actor can run."""
        return {*self.resources} | ({"GPU"} if self.gpus else set())


@dataclass(frozen=True, kw_only=True)
class Step:
    """An operator. Its work gets tables with SHARD, ROW and DIED, and keeps the first two columns in what it yields."""

    name: str
    work: Work | Actors
    cpus: float = 1
    memory: int = 0  # bytes
    most: int | None = None  # tasks at a time; None: as many as the cluster has room for
    rows: int | None = None  # gather at least this many rows for one call, except at the end; None: any table
    split: bool = False  # larger tables, so that each call gets exactly `rows`; costs a CPU for a moment


@dataclass(frozen=True, kw_only=True)
class Pending(Generic[T]):
    """A shard and the numbers of its rows that are neither in partial files nor committed."""

    shard: T
    rows: NDArray[np.int32]


def stream_rows(
    job: str,
    todo: Mapping[str, Pending[T]],
    read: Read[T],
    steps: Sequence[Step],
    commit: Callable[[T], Mapping[str, int]],
    *,
    read_memory: int = 0,
    most_reads: int | None = None,
    meter: Meter | None = None,
) -> dict[str, str]:
    """Runs the pipeline over the pending rows of all shards, by name, and commits each complete shard.

    `commit` writes a shard's files from its partial files and returns its rows by outcome. Returns the reason for each
    shard that could not be finished; its rows so far stay in partial files. Raises JobStopped if no other shard could
    be finished either: the disk is full, S3 refuses or does not answer, no node is left for the actors, a step says so,
    or many shards in a row fail for the same reason.

    `most_reads` shards are read at a time: where few rows of many shards are in work, their partial files are small.
    """
    rows = sum(len(pending.rows) for pending in todo.values())
    reading = Step(name="read", work=partial(_read, read), cpus=_READ_CPUS, memory=read_memory, most=most_reads)
    needs = {"CPU"}.union(*(step.work.needs for step in steps if isinstance(step.work, Actors)))
    with progress_bar(iter(()), rows, job, "rows") as bar, JobMetrics(job, bar) as metrics:
        state = _State(todo, commit, bar, metrics, meter)
        for isolated, died in ((False, False), (True, False), (True, True)):
            if items := state.items(died):
                with warnings.catch_warnings():
                    # Passing the number of retries is deprecated in 2.60, which has no other way to set it yet.
                    warnings.simplefilter("ignore", RayDeprecationWarning)
                    tables = _dataset(job, items, [reading, *steps], isolated)
                for table in _consume(tables, needs):
                    state.update(table)
        state.finish()
    return state.failures


def _dataset(job: str, items: list[dict[str, Any]], steps: Sequence[Step], isolated: bool) -> ray.data.Dataset:
    """The lazy dataset. `isolated`: every row is its own block, so that a process that dies takes one row along."""
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset.set_name(job)
    # Rows that are lost with their process are found by their numbers, and run again.
    dataset.context.max_errored_blocks = -1
    dataset.context.target_max_block_size = 1 if isolated else TABLE_BYTES
    # More actors as soon as all calls are taken, and never fewer: their work may take minutes to make.
    dataset.context.autoscaling_config = AutoscalingConfig(1.0, actor_pool_util_downscaling_threshold=-1.0)
    for step in steps:
        if step.split and not isolated:
            dataset = dataset.repartition(target_num_rows_per_block=step.rows, strict=True)
        shared = {
            "batch_size": None if isolated or step.split else step.rows,
            "batch_format": "pyarrow",
            "num_cpus": step.cpus,
            "memory": at_most_a_node(step.memory) or None,
        }
        if isinstance(step.work, Actors):
            actors = step.work
            dataset = dataset.map_batches(
                type(step.name, (_ActorStep,), {}),
                fn_constructor_args=(actors.make,),
                compute=ray.data.ActorPoolStrategy(
                    min_size=actors.least,
                    max_size=actors.most,
                    max_concurrent_calls_per_actor=actors.calls,
                    max_tasks_in_flight_per_actor=actors.calls + max(1, actors.calls // 4),  # tables on their way
                    enable_true_multi_threading=actors.calls > 1,
                ),
                num_gpus=actors.gpus or None,
                resources=dict(actors.resources) or None,
                runtime_env=dict(actors.runtime_env) or None,
                max_restarts=-1,
                max_task_retries=_RETRIES,
                **shared,
            )
        else:
            tasks = ray.data.TaskPoolStrategy(step.most and min(step.most, len(items)))  # Ray warns of more
            dataset = dataset.map_batches(_named(step.name, step.work), compute=tasks, max_retries=_RETRIES, **shared)
    return dataset


def _named(name: str, work: Work) -> Work:
    """A function that runs the step and has the name that the dashboard shows for its operator."""

    def step(table: pa.Table) -> Iterator[pa.Table]:
        yield from _run(work, table)

    step.__name__ = name
    return step


class _ActorStep:
    """Makes its work for the first table, so that failing to make it is a failure with a message."""

    def __init__(self, make: Callable[[], Work]) -> None:
        self._make = make
        self._work: Work | None = None
        self._making = threading.Lock()

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        yield from _run(self._made, table)

    def _made(self, table: pa.Table) -> Iterator[pa.Table]:
        with self._making:
            self._work = self._work or self._make()
        yield from self._work(table)


def _read(read: Read[Any], items: pa.Table) -> Iterator[pa.Table]:
    """Rows of the shards that the items describe."""
    for item in items.to_pylist():
        wanted = np.frombuffer(item["rows"], np.int32)
        for table in read(pickle.loads(item["shard"]), wanted):
            count = table.num_rows
            table = table.append_column(SHARD, pa.array([item["name"]] * count, pa.string()))
            yield table.append_column(DIED, pa.array([item["died"]] * count, pa.bool_()))


def _run(work: Work, table: pa.Table) -> Iterator[pa.Table]:
    """Runs a step, and turns an exception into rows that tell of it: every step passes them on to the driver."""
    if _FAILURE in table.column_names:
        failed = pc.is_valid(table[_FAILURE])
        yield table.filter(failed).select([SHARD, _FAILURE, _FATAL])
        table = table.filter(pc.invert(failed)).drop_columns([_FAILURE, _FATAL])
    if not table.num_rows:
        return
    try:
        yield from work(table)
    except Exception as error:
        traceback.print_exc()  # goes to the worker's own log
        names = pc.unique(table[SHARD] if SHARD in table.column_names else table["name"])
        fatal = isinstance(error, (JobStopped, S3Refused, S3Unavailable)) or getattr(error, "errno", 0) in _DISK_FULL
        yield pa.table({
            SHARD: names,
            _FAILURE: [_reason(error, fatal)] * len(names),
            _FATAL: [fatal] * len(names),
        })  # fmt: skip


def _reason(error: Exception, fatal: bool) -> str:
    line = str(error).strip().partition("\n")[0]
    return line if fatal else f"{type(error).__name__}: {line}"


class _State:
    """What the driver knows of each shard: which rows are missing, and whether it failed."""

    def __init__(
        self, todo: Mapping[str, Pending[Any]], commit: Callable[[Any], Mapping[str, int]], bar: Any,
        metrics: JobMetrics, meter: Meter | None,
    ) -> None:  # fmt: skip
        self.failures: dict[str, str] = {}
        self._todo, self._bar, self._metrics, self._meter = todo, bar, metrics, meter
        self._missing = {name: set(pending.rows.tolist()) for name, pending in todo.items()}
        self._commit = ray.put(commit)
        self._call = ray.remote(
            num_cpus=_READ_CPUS, memory=at_most_a_node(_COMMIT_BYTES), max_retries=_RETRIES,
            scheduling_strategy="SPREAD",
        )(_call)  # fmt: skip
        self._most_commits = max(2, int(ray.cluster_resources().get("CPU", 0)) // 2)
        self._ready = deque(name for name, missing in self._missing.items() if not missing)
        self._committing: dict[Any, str] = {}
        self._same: tuple[str, int] = ("", 0)  # the last failure, and how many shards in a row had it
        self._reported = 0.0

    def items(self, died: bool) -> list[dict[str, Any]]:
        """One per shard with missing rows."""
        return [
            {
                "name": name,
                "shard": pickle.dumps(self._todo[name].shard),
                "rows": np.array(sorted(missing), np.int32).tobytes(),
                "died": died,
            }
            for name, missing in self._missing.items()
            if missing and name not in self.failures
        ]

    def update(self, table: pa.Table | None) -> None:
        """Accounts for the rows of a table of the last step, or only for time that has passed."""
        if table is not None and table.num_rows:
            if _FAILURE in table.column_names:
                for row in table.filter(pc.is_valid(table[_FAILURE])).to_pylist():
                    self._fail(row[SHARD], row[_FAILURE], row[_FATAL])
                table = table.filter(pc.is_null(table[_FAILURE]))
            if self._meter and REPORT in table.column_names:
                for report in table[REPORT].drop_null().to_pylist():
                    self._meter.add(report)
            if table.num_rows:
                self._account(table)
        self._advance(0)
        if self._meter and time.monotonic() - self._reported > _REPORT_SECONDS:
            self._show(self._meter)

    def finish(self) -> None:
        """Waits for the last commits."""
        while self._ready or self._committing:
            self._advance(_POLL_SECONDS)
        for name, missing in self._missing.items():
            if missing:
                self.failures.setdefault(name, f"{len(missing)} rows were lost with their process; see Ray's logs")
        if self._meter:
            self._show(self._meter)

    def _account(self, table: pa.Table) -> None:
        rows = table[ROW].to_numpy()
        names = table[SHARD].combine_chunks().dictionary_encode()
        for number, name in enumerate(names.dictionary.to_pylist()):
            missing = self._missing[name]
            done = missing.intersection(rows[names.indices.to_numpy() == number].tolist())
            missing -= done
            self._bar.update(len(done))
            if done and not missing and name not in self.failures:
                self._ready.append(name)

    def _fail(self, name: str, reason: str, fatal: bool) -> None:
        if fatal:
            raise JobStopped(reason)
        if name in self.failures:
            return
        self.failures[name] = reason
        kind = re.sub(r"\S*/\S*|'[^']*'|\d+", "", reason)  # without names of files and numbers
        self._same = (kind, self._same[1] + 1 if kind == self._same[0] else 1)
        if self._same[1] >= _SAME_FAILURES:
            raise JobStopped(f"{_SAME_FAILURES} shards in a row failed, the last one, {name}, with: {reason}")

    def _advance(self, seconds: float) -> None:
        """Starts and ends commits; waits up to `seconds` for one to end."""
        while self._ready and len(self._committing) < self._most_commits:
            name = self._ready.popleft()
            self._committing[self._call.remote(self._commit, self._todo[name].shard)] = name
        if not self._committing:
            return
        ended, _ = ray.wait(list(self._committing), num_returns=len(self._committing), timeout=seconds)
        for reference in ended:
            name = self._committing.pop(reference)
            try:
                outcomes = ray.get(reference)
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else error
                fatal = isinstance(cause, (S3Refused, S3Unavailable)) or getattr(cause, "errno", 0) in _DISK_FULL
                self._fail(name, _reason(cause, fatal), fatal)
            except RayError as error:
                self._fail(name, f"the process that committed it died: {_reason(error, False)}", False)
            else:
                self._same = ("", 0)
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


def _consume(dataset: ray.data.Dataset, needs: Set[str]) -> Iterator[pa.Table | None]:
    """Tables of the last step, and None every second without one. Raises JobFailed if Ray gives up, and JobStopped if
    for a minute no node has offered the resources that actors need: Ray Data would wait for ever."""
    tables: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                tables.put(table)
            tables.put(None)
        except BaseException as error:
            tables.put(error)

    # A daemon, because a blocked iterator cannot be interrupted: it ends when Ray is shut down.
    threading.Thread(target=run, daemon=True, name="dataset").start()
    offered = time.monotonic()
    while True:
        try:
            found = tables.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            yield None
            missing = _missing_resource(needs)
            offered = offered if missing else time.monotonic()
            if time.monotonic() - offered > _LOST_SECONDS:
                raise JobStopped(
                    f"no node of the cluster has offered {missing} for {_LOST_SECONDS:.0f} s; finished rows are kept: "
                    "start such a node and run the same command again"
                ) from None
            continue
        if found is None:
            return
        if isinstance(found, BaseException):
            cause = str(getattr(found, "cause", None) or found).strip().splitlines()
            raise JobFailed(
                f"{dataset.name}: {cause[-1] if cause else type(found).__name__}; finished rows are kept, run the same "
                "command again"
            ) from found
        yield found


def _missing_resource(needs: Set[str]) -> str:
    """A resource that is needed and that no living node has, "" if there is none."""
    nodes = living_nodes()
    return next((name for name in sorted(needs) if not any(node.get(name) for node in nodes)), "")


def at_most_a_node(memory: int) -> int:
    """The bytes, or those of the largest node: a task that asks for more would wait for ever."""
    most = max((node.get("memory", 0) for node in living_nodes()), default=0)
    return int(min(memory, most))


def living_nodes() -> list[dict[str, float]]:
    """The resources of each node that is part of the cluster now."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
