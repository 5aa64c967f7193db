"""The only pipeline file that imports Ray Data: one function over every shard, on every CPU of the cluster.

A shard is the unit of work and of resume: its task reads, works and commits on its own, so no
picture travels between processes and a killed task is simply run again.
"""

from collections.abc import Callable
from typing import TypeVar

import ray.data
from ray.exceptions import RayError

from pipeline.jobs import JobFailed, progress

T = TypeVar("T")


def map_shards(shards: list[T], work: Callable[[T], None], rows: Callable[[T], int], description: str) -> None:
    """Run `work` on each shard in parallel, with a progress bar over the shards' rows.

    JobFailed where a task raises: what other shards have finished stays finished.
    """
    if not shards:
        return

    def run(item: dict[str, int]) -> dict[str, int]:
        work(shards[item["index"]])
        return item

    items = ray.data.from_items([{"index": index} for index in range(len(shards))], override_num_blocks=len(shards))
    with progress(iter(()), sum(map(rows, shards)), description, "rows") as bar:
        try:
            for item in items.map(run).iter_rows():
                bar.update(rows(shards[item["index"]]))
        except RayError as error:
            cause = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            raise JobFailed(f"{description}: {cause}; finished shards are kept, run the same command again") from error
