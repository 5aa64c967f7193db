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

from pipeline.core.errors import JobFailed, JobStopped, S3Refused, S3Unavailable, UsageError
from pipeline.core.metrics import JobMetrics
from pipeline.core.progress import progress_bar

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

    `memory` is the bytes that a task may need: a node runs only as many at once as fit in its memory. All shards are
    tried. Returns the reason for each shard on which `work` raised or whose process died. Raises JobFailed if Ray
    itself gave up.
    """

    def run(item: dict[str, Any]) -> dict[str, str]:
        failure, outcomes = _attempt(work, pickle.loads(item["shard"]))
        return {"name": item["name"], "failure": failure, "outcomes": json.dumps(outcomes)}

    items = [{"name": name, "shard": pickle.dumps(shard)} for name, shard in shards.items()]
    todo = ray.data.from_items(items, override_num_blocks=len(items))
    # A process that dies fails only its own shard. (Do not use this where Ray Data reads files: rows would be lost.)
    todo.context.max_errored_blocks = -1
    with warnings.catch_warnings():
        # Passing the number of retries is deprecated in 2.60, which has no other way to set it yet.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        results = todo.map(run, memory=_at_most_a_node(memory), max_retries=_RETRIES)
    failures = dict.fromkeys(shards, "its process died; the log names Ray's own logs")
    with (
        progress_bar(iter(()), sum(map(rows, shards.values())), description, "rows") as bar,
        JobMetrics(description, bar) as metrics,
    ):
        try:
            for item in results.iter_rows():
                count = rows(shards[item["name"]])
                bar.update(count)
                metrics.add(item["failure"], json.loads(item["outcomes"]) or {"done": count})
                del failures[item["name"]]
                if item["failure"]:
                    failures[item["name"]] = item["failure"]
        except RayError as error:
            cause = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            raise JobFailed(f"{description}: {cause}; finished shards are kept, run the same command again") from error
    return failures


def run_task(work: Callable[[], T], memory: int, description: str) -> T:
    """Runs `work` in one process on a node of the cluster and returns its result, for steps that need all rows at once.

    `memory` is the bytes that it may need: the task waits until a node has that much to spare. A minute without a
    result is reported on stderr. Raises UsageError if no node has so much memory, and JobFailed, with one line, if the
    work raised an error that is not about the job's input or if its process died in every attempt.
    """
    most = max(node.get("memory", 0) for node in _nodes())
    if memory > most:
        raise UsageError(
            f"{description} needs {memory / 1e9:.1f} GB of memory in one process, and no node of this Ray offers more "
            f"than {most / 1e9:.1f} GB: add a node with more memory, or end other work where this Ray starts"
        )
    result = ray.remote(num_cpus=1, memory=memory, max_retries=_RETRIES)(_as_function(work)).remote()
    started = time.monotonic()
    while not ray.wait([result], timeout=_REPORT_SECONDS)[0]:
        minutes = (time.monotonic() - started) / 60
        print(f"{description}: no result after {minutes:.0f} min", file=sys.stderr, flush=True)
    try:
        found: T = ray.get(result)
        return found
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UsageError | JobFailed | S3Refused | S3Unavailable):
            raise cause from None
        raise JobFailed(f"{description}: {type(cause).__name__}: {_first_line(cause)}") from error
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


def _at_most_a_node(memory: int) -> float | None:
    """A task that asks for more memory than any node has would wait for ever."""
    most = max(node.get("memory", 0) for node in _nodes())
    return min(memory, most) if memory else None


def _nodes() -> list[dict[str, float]]:
    """The resources of each living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _attempt(work: Callable[[T], Mapping[str, int] | None], shard: T) -> tuple[str, Mapping[str, int] | None]:
    """The reason for failing, "" on success, and what `work` returned. Every exception but JobStopped is a reason:
    other shards must still be done."""
    try:
        return "", work(shard)
    except JobStopped:
        raise
    except Exception as error:
        traceback.print_exc()  # goes to the worker's own log
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", None
