"""The only pipeline file that runs work on Ray: one function over every shard, on every CPU of the cluster.

A shard is the unit of work and of resume: its task reads, works and commits on its own, so no
picture travels between processes and a killed task is simply run again.
"""

import pickle
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.data
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning

from pipeline.jobs import JobFailed, UsageError, progress

T = TypeVar("T")

_RETRIES = 2  # of a shard whose process died, perhaps out of memory; Ray Data's own number is infinite


def map_shards(
    shards: dict[str, T], work: Callable[[T], None], rows: Callable[[T], int], description: str, memory: int = 0
) -> dict[str, str]:
    """Run `work` on each shard (by name) in parallel, with a progress bar over the shards' rows.

    `memory`: bytes that a worker may need; no more of them run at once on a node than its memory has room for.
    All shards are tried; returns those on which the work raised, or whose process died, each with why. JobFailed where
    Ray itself gave up.
    """

    def run(item: dict[str, Any]) -> dict[str, str]:
        return {"name": item["name"], "failure": _attempt(work, pickle.loads(item["shard"]))}

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


def _attempt(work: Callable[[T], None], shard: T) -> str:
    """Why the work failed, "" where it did not. Of whatever kind the failure is: other shards must still be done."""
    try:
        work(shard)
    except Exception as error:
        traceback.print_exc()  # goes to the worker's own log
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


@dataclass(frozen=True)
class Pool:
    """Actors that stay for the whole job, and what each of them reserves."""

    actors: int
    cpus: int
    gpus: int

    def __str__(self) -> str:
        gpu = f"{self.gpus} GPU and " if self.gpus else ""
        return f"{self.actors} actors, each with {gpu}{self.cpus} CPU{'s' if self.cpus > 1 else ''}"


def plan_pool(actors: int | None, shards: int, use_gpus: bool) -> Pool:
    """An actor per GPU with its node's share of CPUs; without GPUs one per CPU. `actors` asks for fewer, and there are
    never more than `shards`.

    UsageError for more than fit: Ray would wait for them for ever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    gpus = gpus if use_gpus else 0
    most, holder = (gpus, "GPU") if gpus else (cpus, "CPU")
    if (actors or 1) > most:
        raise UsageError(
            f"{actors or 1} actors do not fit, each of which takes a {holder}: Ray has {most}; give a smaller "
            "--actors, or RAY_ADDRESS of a larger cluster"
        )
    shares = [int(node.get("CPU", 0) // node["GPU"]) for node in nodes if gpus and node.get("GPU")]
    return Pool(min(actors or most, shards), max(1, min(shares, default=1)), 1 if gpus else 0)


class _Actor:
    """What Ray keeps: the work, made when the first shard comes so that its failure is that shard's and has words."""

    def __init__(self, make_work: Callable[[], Callable[[Any], None]]) -> None:
        self.make_work = make_work
        self.work: Callable[[Any], None] | None = None

    def run(self, shard: Any) -> str:
        """As _attempt."""

        def work(shard: Any) -> None:
            self.work = self.work or self.make_work()
            self.work(shard)

        return _attempt(work, shard)


def map_shards_with(
    make_work: Callable[[], Callable[[T], None]],
    shards: dict[str, T],
    rows: Callable[[T], int],
    description: str,
    pool: Pool,
) -> dict[str, str]:
    """As map_shards, for work that is dear to make, such as a model: `make_work` is called once in each actor.

    Plain actors, one shard each at a time, and not Ray Data's: these retry a shard that kills its actor for ever, need
    a CPU besides the actors' or hang, and put an error about themselves on the terminal (ray 2.60).
    """
    remote = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, max_restarts=-1, max_task_retries=_RETRIES)(_Actor)
    idle = [remote.remote(make_work) for _ in range(pool.actors)]
    waiting = list(reversed(shards))
    running: dict[Any, tuple[Any, str]] = {}
    failures: dict[str, str] = {}
    with progress(iter(()), sum(map(rows, shards.values())), description, "rows") as bar:
        while waiting or running:
            while idle and waiting:
                actor, name = idle.pop(), waiting.pop()
                running[actor.run.remote(shards[name])] = actor, name
            (done,), _ = ray.wait(list(running), num_returns=1)
            actor, name = running.pop(done)
            try:
                failure = ray.get(done)
            except RayError as error:
                failure = f"{type(error).__name__}: its process ended {_RETRIES + 1} times, perhaps out of memory"
            if failure:
                failures[name] = failure
            idle.append(actor)
            bar.update(rows(shards[name]))
    return failures
