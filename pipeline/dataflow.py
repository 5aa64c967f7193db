"""The only pipeline file that imports Ray Data: one function over every shard, on every CPU of the cluster.

A shard is the unit of work and of resume: its task reads, works and commits on its own, so no
picture travels between processes and a killed task is simply run again.
"""

import traceback
from collections.abc import Callable
from typing import TypeVar

import ray.data
from ray.exceptions import RayError

from pipeline.jobs import JobFailed, progress

T = TypeVar("T")


def map_shards(
    shards: dict[str, T], work: Callable[[T], None], rows: Callable[[T], int], description: str
) -> dict[str, str]:
    """Run `work` on each shard (by name) in parallel, with a progress bar over the shards' rows.

    All shards are tried; returns those on which the work raised, each with why. JobFailed where Ray itself gave up.
    """

    def run(item: dict[str, str]) -> dict[str, str]:
        try:
            work(shards[item["name"]])
        except Exception as error:  # of whatever kind: one shard must not keep the others from being done
            traceback.print_exc()  # goes to the worker's own log
            return item | {"failure": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        return item | {"failure": ""}

    items = ray.data.from_items([{"name": name} for name in shards], override_num_blocks=len(shards))
    failures: dict[str, str] = {}
    with progress(iter(()), sum(map(rows, shards.values())), description, "rows") as bar:
        try:
            for item in items.map(run).iter_rows():
                bar.update(rows(shards[item["name"]]))
                if item["failure"]:
                    failures[item["name"]] = item["failure"]
        except RayError as error:
            cause = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            raise JobFailed(f"{description}: {cause}; finished shards are kept, run the same command again") from error
    return failures
