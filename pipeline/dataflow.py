"""The only pipeline file that imports Ray Data: one function over every shard, on every CPU of the cluster.

A shard is the unit of work and of resume: its task reads, works and commits on its own, so no
picture travels between processes and a killed task is simply run again.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.data
from ray.exceptions import RayError

from pipeline.jobs import JobFailed, UsageError, progress

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


@dataclass(frozen=True)
class Pool:
    """Actors that stay for the whole job, and what each of them reserves."""

    actors: int
    cpus: int
    gpus: int

    def __str__(self) -> str:
        gpu = f"{self.gpus} GPU and " if self.gpus else ""
        return f"{self.actors} actors, each with {gpu}{self.cpus} CPUs"


def plan_pool(actors: int | None, shards: int, use_gpus: bool) -> Pool:
    """An actor per GPU with its node's share of CPUs; without GPUs one per CPU but one. `actors` asks for fewer, and
    there are never more than `shards`.

    UsageError for more than fit: Ray would wait for them for ever, as it does where actors hold every CPU and none is
    left to read what they are given.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = int(sum(node.get("CPU", 0) for node in nodes))
    per_gpu = [int((node["CPU"] - 1) // node["GPU"]) for node in nodes if node.get("GPU") and node.get("CPU")]
    gpus = int(sum(node.get("GPU", 0) for node in nodes)) if use_gpus and per_gpu else 0
    each = max(1, min(per_gpu)) if gpus else 1
    most = min(gpus or cpus, (cpus - 1) // each)
    if most < 1 or (actors or 1) > most:
        raise UsageError(
            f"{actors or 1} actors do not fit: Ray has {cpus} CPUs and {gpus} GPUs that can be used, room for {most}, "
            "as one CPU must stay free; give a smaller --actors, or RAY_ADDRESS of a larger cluster"
        )
    return Pool(min(actors or most, shards), each, 1 if gpus else 0)


class _Actor:
    """What Ray keeps: the work, made when the first shard comes so that its failure is that shard's and has words."""

    def __init__(self, make_work: Callable[[], Callable[[Any], None]], shards: dict[str, Any]) -> None:
        self.make_work, self.shards = make_work, shards
        self.work: Callable[[Any], None] | None = None

    def __call__(self, item: dict[str, str]) -> dict[str, str]:
        try:
            self.work = self.work or self.make_work()
            self.work(self.shards[item["name"]])
        except Exception as error:  # as in map_shards
            traceback.print_exc()
            return item | {"failure": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        return item | {"failure": ""}


def map_shards_with(
    make_work: Callable[[], Callable[[T], None]],
    shards: dict[str, T],
    rows: Callable[[T], int],
    description: str,
    pool: Pool,
) -> dict[str, str]:
    """As map_shards, for work that is dear to make, such as a model: `make_work` is called once in each actor."""
    items = ray.data.from_items([{"name": name} for name in shards], override_num_blocks=len(shards))
    scored = items.map(
        _Actor,
        fn_constructor_args=(make_work, shards),
        compute=ray.data.ActorPoolStrategy(size=pool.actors),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    failures: dict[str, str] = {}
    with progress(iter(()), sum(map(rows, shards.values())), description, "rows") as bar:
        try:
            for item in scored.iter_rows():
                bar.update(rows(shards[item["name"]]))
                if item["failure"]:
                    failures[item["name"]] = item["failure"]
        except RayError as error:
            cause = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            raise JobFailed(f"{description}: {cause}; finished shards are kept, run the same command again") from error
    return failures
