"""Runs functions in tasks of Ray: one over every shard, or one that needs all rows at once.

A shard is the unit of work and of resume: its task reads, computes and commits, so that no image travels between
processes and a killed task is simply run again.
"""

import json
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import ray
import ray.data
from ray.exceptions import RayError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from pipeline.core.cluster import at_most_a_node
from pipeline.core.errors import JobFailed, S3Refused, S3Unavailable, UsageError
from pipeline.core.failures import ShardFailures, is_fatal, reason
from pipeline.core.metrics import JobMetrics
from pipeline.core.progress import progress_bar
from pipeline.core.row_pipeline import ClusterWatch, consume

T = TypeVar("T")

_RETRIES = 2  # of a shard whose process died, perhaps out of memory; Ray Data's default is infinite
_REPORT_SECONDS: Final = 60.0


def map_shards(
    shards: dict[str, T],
    work: Callable[[T], Mapping[str, int] | None],
    rows: Callable[[T], int],
    description: str,
    memory: int = 0,
) -> dict[str, str]:
    """Runs `work` on each shard (by name) in parallel, with a progress bar over rows and Ray metrics (see JobMetrics).
    `work` may return the shard's rows by outcome; by default all are "done".

    `memory` is the bytes that a task may need: a node runs only as many at once as fit in its memory. Returns the
    reason for each shard on which `work` raised or whose process died. Raises JobStopped if no other shard could be
    done either: the disk is full, S3 refuses or does not answer, `work` says so, no node is left, or many shards in a
    row fail for the same reason. Raises JobFailed if Ray itself gave up.
    """

    def run(item: dict[str, Any]) -> dict[str, Any]:
        failure, fatal, outcomes = _attempt(work, pickle.loads(item["shard"]))
        return {"name": item["name"], "failure": failure, "fatal": fatal, "outcomes": json.dumps(outcomes)}

    items = [{"name": name, "shard": pickle.dumps(shard)} for name, shard in shards.items()]
    todo = ray.data.from_items(items, override_num_blocks=len(items))
    # A process that dies fails only its own shard. (Do not use this where Ray Data reads files: rows would be lost.)
    todo.context.max_errored_blocks = -1
    memory = at_most_a_node(memory)
    with warnings.catch_warnings():
        # Passing the number of retries is deprecated in 2.60, which has no other way to set it yet.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        results = todo.map(run, memory=memory or None, max_retries=_RETRIES)
    results.set_name(description)
    failures, silent = ShardFailures(), set(shards)
    needs = {"CPU": 1.0} | ({"memory": memory} if memory else {})
    with (
        progress_bar(iter(()), sum(map(rows, shards.values())), description, "rows") as bar,
        JobMetrics(description, bar) as metrics,
    ):
        for table in consume(results, ClusterWatch(description, [needs])):
            for item in () if table is None else table.to_pylist():
                count = rows(shards[item["name"]])
                bar.update(count)
                metrics.add(item["failure"], json.loads(item["outcomes"]) or {"done": count})
                silent.discard(item["name"])
                if item["failure"]:
                    failures.fail(item["name"], item["failure"], item["fatal"])
                else:
                    failures.succeed()
    return failures | dict.fromkeys(silent, "its process died; the log names Ray's own logs")


def run_task(work: Callable[[], T], memory: int, description: str) -> T:
    """Runs `work` in one process on a node of the cluster and returns its result, for steps that need all rows at once.

    `memory` is the bytes that it may need: the task waits until a node has that much to spare. A minute without a
    result is reported on stderr. Raises UsageError if no node has so much memory, and JobFailed, with one line, if the
    work raised an error that is not about the job's input, if its process died in every attempt, or if all nodes with
    so much memory are gone.
    """
    most = at_most_a_node(memory)
    if memory > most:
        raise UsageError(
            f"{description} needs {memory / 1e9:.1f} GB of memory in one process, and no node of this Ray offers more "
            f"than {most / 1e9:.1f} GB: add a node with more memory, or end other work where this Ray starts"
        )
    result = ray.remote(num_cpus=1, memory=memory, max_retries=_RETRIES)(_as_function(work)).remote()
    started = time.monotonic()
    while not ray.wait([result], timeout=_REPORT_SECONDS)[0]:
        if memory > at_most_a_node(memory):
            raise JobFailed(
                f"{description}: the last node with {memory / 1e9:.1f} GB of memory is gone; start one and run the "
                "same command again"
            )
        minutes = (time.monotonic() - started) / 60
        print(f"{description}: no result after {minutes:.0f} min", file=sys.stderr, flush=True)
    try:
        found: T = ray.get(result)
        return found
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UsageError | JobFailed | S3Refused | S3Unavailable):
            raise cause from None
        raise JobFailed(f"{description}: {reason(cause)}") from error
    except RayError as error:
        raise JobFailed(
            f"{description}: its process died in each of {_RETRIES + 1} attempts, perhaps out of memory "
            f"({_first_line(error)}); run the same command again, on a node with more memory"
        ) from error


def _as_function(work: Callable[[], T]) -> Callable[[], T]:
    """A plain function, which Ray requires, that does the work."""

    def run() -> T:
        return work()

    return run


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _attempt(work: Callable[[T], Mapping[str, int] | None], shard: T) -> tuple[str, bool, Mapping[str, int] | None]:
    """The reason for failing, "" on success, whether it is fatal, and what `work` returned. An exception would be
    swallowed: Ray Data takes it for a process that died."""
    try:
        return "", False, work(shard)
    except Exception as error:
        traceback.print_exc()  # goes to the worker's own log
        return reason(error) or type(error).__name__, is_fatal(error), None
