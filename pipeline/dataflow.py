"""The only pipeline file that imports Ray Data: one function over every shard, on every CPU of the cluster.

A shard is the unit of work and of resume: its task reads, works and commits on its own, so no
picture travels between processes and a killed task is simply run again.
"""

import pickle
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import ray.data
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning

from pipeline.jobs import JobFailed, progress

T = TypeVar("T")

_RETRIES = 2  # of a shard whose process died; Ray Data's own number is infinite


def map_shards(
    shards: dict[str, T], work: Callable[[T], None], rows: Callable[[T], int], description: str, memory: int = 0
) -> dict[str, str]:
    """Run `work` on each shard (by name) in parallel, with a progress bar over the shards' rows.

    `memory`: bytes that a worker may need; no more of them run at once on a node than its memory has room for.
    All shards are tried; returns those on which the work raised, or whose process died, each with why. JobFailed where
    Ray itself gave up.
    """

    def run(item: dict[str, Any]) -> dict[str, str]:
        try:
            work(pickle.loads(item["shard"]))
        except Exception as error:  # of whatever kind: one shard must not keep the others from being done
            traceback.print_exc()  # goes to the worker's own log
            return {"name": item["name"], "failure": f"{type(error).__name__}: {_first_line(error)}"}
        return {"name": item["name"], "failure": ""}

    items = [{"name": name, "shard": pickle.dumps(shard)} for name, shard in shards.items()]
    todo = ray.data.from_items(items, override_num_blocks=len(items))
    # A process that dies takes only its own shard along. (Never where Ray Data reads files: rows would be lost.)
    todo.context.max_errored_blocks = -1
    with warnings.catch_warnings():
        # Deprecated in 2.60, where nothing else sets the number of retries yet.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        results = todo.map(run, memory=_within_a_node(memory), ray_remote_args_fn=lambda: {"max_retries": _RETRIES})
    failures = dict.fromkeys(shards, "its process died; the log names Ray's own logs")
    with progress(iter(()), sum(map(rows, shards.values())), description, "rows") as bar:
        try:
            for item in results.iter_rows():
                bar.update(rows(shards[item["name"]]))
                del failures[item["name"]]
                if item["failure"]:
                    failures[item["name"]] = item["failure"]
        except RayError as error:
            cause = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            raise JobFailed(f"{description}: {cause}; finished shards are kept, run the same command again") from error
    return failures


def _within_a_node(memory: int) -> float | None:
    """What Ray may ask for: a task that asks for more than any node has would wait for ever."""
    most = max(node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"])
    return min(memory, most) if memory else None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
