"""Streams the rows of shards through Ray Data operators: read, then steps on tasks or actors; then commits each shard.

The last step writes rows into partial files (pipeline/storage/partial.py) and passes their numbers on. A shard is
committed in a task of its own as soon as every row is accounted for. Rows that are lost because their process died are
run again one by one, which isolates the row that kills it; such a row is run a last time with DIED set, and the steps
then give it a reason instead of touching its picture.
"""

import gc
import pickle
import queue
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from numpy.typing import NDArray
from ray.data.context import AutoscalingConfig
from ray.util.annotations import RayDeprecationWarning

from pipeline.core.cluster import at_most_a_node, nodes
from pipeline.core.errors import JobFailed, JobStopped
from pipeline.core.failures import is_fatal, reason
from pipeline.core.metrics import JobMetrics
from pipeline.core.progress import progress_bar
from pipeline.core.shard_progress import FAILURE, FATAL, Meter, Pending, ShardProgress
from pipeline.core.tables import DIED, SHARD, TABLE_BYTES

_TASK_RETRIES: Final = 1  # of a task whose process or node died, before its rows are run one by one
# A retried call waits for its own actor, for ever where no other node has room for it: its rows go to others instead.
_ACTOR_RETRIES: Final = 0
_READ_CPUS: Final = 0.02  # of tasks that mostly wait for a disk or for S3
CHECK_CPUS: Final = 0.9  # of tasks that decode: beside them there is room for those that read and commit
_POLL_SECONDS: Final = 1.0
_LOST_SECONDS: Final = 60.0  # without any node that an actor could run on, before the job fails
_QUIET_SECONDS: Final = 300.0  # without a row, before the terminal shows what the cluster has free
_NOTICED_SECONDS: Final = 25.0  # Ray takes a node for lost after five failed checks, 3 s apart (ray 2.60)
_ISOLATED_PASSES: Final = 5  # at most: one is repeated if a node was lost in it

Work = Callable[[pa.Table], Iterator[pa.Table]]
T = TypeVar("T", contravariant=True)


class Read(Protocol[T]):
    """Yields rows of a shard as tables with the column ROW. `wanted` are their numbers, ascending."""

    def __call__(self, shard: T, wanted: NDArray[np.int32]) -> Iterator[pa.Table]: ...


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
    def needs(self) -> dict[str, float]:
        """The resources that a node must offer to run an actor."""
        return {**self.resources} | ({"GPU": self.gpus} if self.gpus else {})


@dataclass(frozen=True, kw_only=True)
class Step:
    """An operator. Its work gets tables with SHARD, ROW and DIED, and keeps the first two columns in what it yields."""

    name: str
    work: Work | Actors
    cpus: float = CHECK_CPUS  # actors with whole CPUs would leave none for reading on the nodes that are left
    memory: int = 0  # bytes
    most: int | None = None  # tasks at a time; None: as many as the cluster has room for
    rows: int | None = None  # gather at least this many rows for one call, except at the end; None: any table
    split: bool = False  # larger tables, so that each call gets exactly `rows`; costs a CPU for a moment


def stream_rows(
    job: str,
    todo: Mapping[str, Pending[T]],
    read: Read[T],
    steps: Sequence[Step],
    commit: Callable[[T], Mapping[str, int]],
    *,
    read_memory: int = 0,
    commit_memory: int = 0,
    most_reads: int | None = None,
    meter: Meter | None = None,
) -> dict[str, str]:
    """Runs the pipeline over the pending rows of all shards, by name, and commits each complete shard.

    `commit` writes a shard's files from its partial files and returns its rows by outcome. Returns the reason for each
    shard that could not be finished; its rows so far stay in partial files. Raises JobStopped if no other shard could
    be finished either: the disk is full, S3 refuses or does not answer, no node is left for the actors, a step says so,
    or many shards in a row fail for the same reason.

    `read_memory` and `commit_memory` are the bytes that reading and committing a shard need. `most_reads` shards are
    read at a time: where few rows of many shards are in work, their partial files are small.
    """
    rows = sum(len(pending.rows) for pending in todo.values())
    reading = Step(name="read", work=partial(_read, read), cpus=_READ_CPUS, memory=read_memory, most=most_reads)
    needs = [{"CPU": 0.1}, *(step.work.needs for step in steps if isinstance(step.work, Actors))]
    with progress_bar(iter(()), rows, job, "rows") as bar, JobMetrics(job, bar) as metrics:
        progress = ShardProgress(todo, commit, bar, metrics, meter, commit_memory)
        watch = ClusterWatch(job, needs)

        def run(isolated: bool, died: bool) -> None:
            if items := progress.items(died):
                for table in consume(_dataset(job, items, [reading, *steps], isolated), watch):
                    progress.update(table)
                # The operators of Ray Data refer to each other in a circle. Until Python collects them, the actors live
                # on and keep their CPUs, for which the next pass would wait, perhaps for ever.
                gc.collect()

        run(isolated=False, died=False)
        undisturbed = 0  # passes in which no node was lost
        for _ in range(_ISOLATED_PASSES):
            before = _node_ids()
            run(isolated=True, died=False)
            if not progress.items(died=True):
                break
            # Until Ray has noticed that a node is lost, tasks that are sent to it fail. Some fail still afterwards, so
            # with several nodes a row is blamed only if it was lost twice.
            several = len(before) > 1
            undisturbed += not _loses_node(before, _NOTICED_SECONDS if several else 0, watch)
            if undisturbed == (2 if several else 1):
                break
        progress.check_died(job)
        run(isolated=True, died=True)
        while progress.is_committing():
            watch.check()
        progress.finish()
    return progress.failures


def _dataset(job: str, items: list[dict[str, Any]], steps: Sequence[Step], isolated: bool) -> ray.data.Dataset:
    """The lazy dataset. `isolated`: every row is its own block and call, so that a process that dies takes one row
    along."""
    with warnings.catch_warnings():
        # Passing the number of retries is deprecated in 2.60, which has no other way to set it yet.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return _operators(job, items, steps, isolated)


def _operators(job: str, items: list[dict[str, Any]], steps: Sequence[Step], isolated: bool) -> ray.data.Dataset:
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
            calls = 1 if isolated else actors.calls
            dataset = dataset.map_batches(
                type(step.name, (_ActorStep,), {}),
                fn_constructor_args=(actors.make,),
                compute=ray.data.ActorPoolStrategy(
                    min_size=actors.least,
                    max_size=actors.most,
                    max_concurrent_calls_per_actor=calls,
                    # With tables on their way; none of them is lost with a row that runs alone.
                    max_tasks_in_flight_per_actor=1 if isolated else calls + max(1, calls // 4),
                    enable_true_multi_threading=calls > 1,
                ),
                num_gpus=actors.gpus or None,
                resources=dict(actors.resources) or None,
                runtime_env=dict(actors.runtime_env) or None,
                max_restarts=-1,
                max_task_retries=_ACTOR_RETRIES,
                **shared,
            )
        else:
            tasks = ray.data.TaskPoolStrategy(step.most and min(step.most, len(items)))  # Ray warns of more
            dataset = dataset.map_batches(
                _named(step.name, step.work), compute=tasks, max_retries=_TASK_RETRIES, **shared
            )
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
    if FAILURE in table.column_names:
        failed = pc.is_valid(table[FAILURE])
        yield table.filter(failed).select([SHARD, FAILURE, FATAL])
        table = table.filter(pc.invert(failed)).drop_columns([FAILURE, FATAL])
    if not table.num_rows:
        return
    try:
        yield from work(table)
    except Exception as error:
        traceback.print_exc()  # goes to the worker's own log
        names = pc.unique(table[SHARD] if SHARD in table.column_names else table["name"])
        count = len(names)
        yield pa.table({SHARD: names, FAILURE: [reason(error)] * count, FATAL: [is_fatal(error)] * count})


def consume(dataset: ray.data.Dataset, watch: "ClusterWatch") -> Iterator[pa.Table | None]:
    """Tables of the last step, and None every second without one. Raises JobFailed if Ray gives up, and what `watch`
    raises: Ray Data itself would wait for ever."""
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
    while True:
        try:
            found = tables.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            yield None
            watch.check()
            continue
        if found is None:
            return
        if isinstance(found, BaseException):
            cause = str(getattr(found, "cause", None) or found).strip().splitlines()
            raise JobFailed(
                f"{dataset.name}: {cause[-1] if cause else type(found).__name__}; finished rows are kept, run the same "
                "command again"
            ) from found
        watch.moved()
        yield found


class ClusterWatch:
    """Notices that the cluster cannot run the job any more, and says what it waits for."""

    def __init__(self, job: str, needs: Sequence[Mapping[str, float]]) -> None:
        self._job, self._needs = job, needs
        self._offered = self._moved = time.monotonic()

    def moved(self) -> None:
        """Rows have passed."""
        self._offered = self._moved = time.monotonic()

    def check(self) -> None:
        """Raises JobStopped if for a minute no living node has offered all that some actor needs. Prints a line when
        nothing has moved for minutes."""
        now = time.monotonic()
        offers = nodes()
        missing = next((need for need in self._needs if not any(_offers(node, need) for node in offers)), None)
        self._offered = self._offered if missing else now
        if missing and now - self._offered > _LOST_SECONDS:
            raise JobStopped(
                f"no node of the cluster has offered {' and '.join(sorted(missing))} for {_LOST_SECONDS:.0f} s; "
                "finished rows are kept: start such a node and run the same command again"
            )
        if now - self._moved > _QUIET_SECONDS:
            self._moved = now
            free = {name: amount for name, amount in ray.available_resources().items() if ":" not in name}
            listed = ", ".join(f"{name} {amount:g}" for name, amount in sorted(free.items()) if "memory" not in name)
            print(f"{self._job}: no row for {_QUIET_SECONDS / 60:.0f} minutes; free: {listed or 'nothing'}", flush=True)


def _offers(node: Mapping[str, float], need: Mapping[str, float]) -> bool:
    return all(node.get(name, 0) >= amount for name, amount in need.items())


def _loses_node(before: set[str], seconds: float, watch: ClusterWatch) -> bool:
    """True as soon as one of these nodes is gone, False if all are there for this long."""
    end = time.monotonic() + seconds
    while before <= _node_ids():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
        watch.check()
    return True


def _node_ids() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
