"""Runs one function over every shard on Ray: on tasks (map_shards) or on actors (map_shards_with).

A shard is the unit of work and of resume: its task reads, computes and commits, so that no image travels between
processes and a killed task is simply run again.
"""

import json
import math
import pickle
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections import Counter as Tally
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import ray
import ray.data
from ray.exceptions import RayError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from pipeline.core.errors import JobFailed, JobStopped, S3Refused, S3Unavailable, UsageError
from pipeline.core.metrics import JobMetrics
from pipeline.core.progress import Progress, progress_bar

T = TypeVar("T")

_RETRIES = 2  # of a shard whose process died, perhaps out of memory; Ray Data's default is infinite
_REPORT_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 3.0  # between requests for the actors' reports
_CLOSE_SECONDS: Final = 30.0  # for actors to save what they have
_DECODING_CPUS: Final = 8  # more than an engine ever needs


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


@dataclass(frozen=True)
class Pool:
    """The number of actors of a job and what each reserves."""

    actors: int
    cpus: int
    gpus: int
    at_once: int = 1  # shards that an actor works on concurrently

    def __str__(self) -> str:
        gpu = f"{self.gpus} GPU and " if self.gpus else ""
        return f"{self.actors} actors, each with {gpu}{self.cpus} CPU{'s' if self.cpus > 1 else ''}"


def plan_pool(actors: int | None, shards: int, use_gpus: bool) -> Pool:
    """One actor per GPU with an equal share of its node's CPUs, or one per CPU without GPUs; at most `shards`. `actors`
    asks for fewer. Raises UsageError for more than fit: Ray would wait for them for ever."""
    nodes = _nodes()
    gpus = int(use_gpus and any(node.get("GPU") for node in nodes))
    most, share = _fit(nodes, gpus)
    if (actors or 1) > most:
        raise UsageError(
            f"{actors or 1} actors do not fit, each of which takes a {'GPU and a CPU' if gpus else 'CPU'}: Ray has "
            f"{most}; give a smaller --actors, or RAY_ADDRESS of a larger cluster"
        )
    return Pool(min(actors or most, shards), share if gpus else 1, gpus)


def plan_engines(engines: int | None, gpus_each: int, shards: int, use_gpus: bool) -> Pool:
    """Like plan_pool, for engines with `gpus_each` GPUs; without GPUs one engine, which may use all CPUs. Each works on
    two shards, so that its batch stays full at the end of one."""
    nodes = _nodes()
    if use_gpus and any(node.get("GPU") for node in nodes):
        if max(node.get("GPU", 0) for node in nodes) < gpus_each:
            raise UsageError(f"--tensor-parallel {gpus_each}: no machine of this Ray has so many GPUs; give fewer")
        most, share = _fit(nodes, gpus_each)
        if (engines or 1) > most:
            raise UsageError(
                f"{engines or 1} engines do not fit, each of which takes {gpus_each} GPU and a CPU: Ray has room for "
                f"{most}; give a smaller --engines, or RAY_ADDRESS of a larger cluster"
            )
        return Pool(min(engines or most, shards), min(_DECODING_CPUS, share), gpus_each, at_once=2)
    cpus = int(min(node.get("CPU", 0) for node in nodes if node.get("CPU")))
    if (engines or 1) > cpus:
        raise UsageError(f"--engines {engines}: without GPUs each takes a CPU, and Ray has {cpus}; give fewer")
    return Pool(min(engines or 1, shards), max(1, min(_DECODING_CPUS, cpus // (engines or 1))), 0, at_once=2)


def _fit(nodes: list[dict[str, float]], gpus: int) -> tuple[int, int]:
    """How many actors with a CPU and this many GPUs fit, and the CPUs for each."""
    counts = [int(min(node.get("CPU", 0), node.get("GPU", 0) // gpus if gpus else math.inf)) for node in nodes]
    shares = [int(node["CPU"] // count) for node, count in zip(nodes, counts, strict=True) if count]
    return sum(counts), min(shares, default=0)


class _Actor:
    """Holds the work of an actor. It is made for the first shard, so that failing to make it is that shard's failure,
    with a message."""

    def __init__(self, make_work: Callable[[], Callable[[Any], None]]) -> None:
        self.make_work = make_work
        self.work: Any = None
        self.making = threading.Lock()
        self.incarnation = uuid.uuid4().hex  # changes when Ray restarts this actor

    def run(self, shard: Any) -> str:
        """The reason for failing, "" on success. Raises JobStopped."""

        def work(shard: Any) -> None:
            with self.making:
                self.work = self.work or self.make_work()
            self.work(shard)

        return _attempt(work, shard)[0]

    def report(self) -> tuple[str, Any]:
        """The incarnation and the work's report, None before the work is made."""
        return self.incarnation, self.work and self.work.report()

    def close(self) -> None:
        if self.work:
            self.work.close()


def map_shards_with(
    make_work: Callable[[], Callable[[T], None]],
    shards: dict[str, T],
    rows: Callable[[T], int],
    description: str,
    pool: Pool,
    watch: Callable[[list[Any]], Progress] | None = None,
) -> dict[str, str]:
    """Like map_shards, for work that is expensive to make, such as a model: `make_work` is called once in each actor.

    `watch` turns the reports of all actors, every few seconds, into the progress shown on the bar and in Ray metrics.
    The work must then have two more methods: `report()` returns everything done so far and is called at any time from
    another thread; `close()` is called after the last shard and ends within seconds whatever is still running. A shard
    whose process or node died is given to another actor. Raises JobStopped if the work does.

    Uses plain actors, because Ray Data's actor pools by default retry a shard that kills its actor for ever, hang
    unless there is a CPU besides the actors', and print their errors on the terminal (ray 2.60).
    """
    concurrency = pool.at_once + (1 if watch else 0)
    remote = ray.remote(num_cpus=pool.cpus, num_gpus=pool.gpus, max_restarts=-1, max_concurrency=concurrency)(_Actor)
    actors = [remote.remote(make_work) for _ in range(pool.actors)]
    slots = _FreeSlots(actors, pool.at_once)
    waiting = list(reversed(shards))
    running: dict[Any, tuple[Any, str]] = {}
    deaths = Tally[str]()  # of processes, by the shard that they worked on
    failures: dict[str, str] = {}
    watcher = _Watcher(actors, watch) if watch else None
    with (
        progress_bar(iter(()), sum(map(rows, shards.values())), description, "rows") as bar,
        JobMetrics(description, bar) as metrics,
    ):
        try:
            while waiting or running:
                slots.reclaim()
                while slots.free and waiting:
                    actor, name = slots.free.pop(), waiting.pop()
                    running[actor.run.remote(shards[name])] = actor, name
                for done in _first(list(running), _POLL_SECONDS if watcher or slots.lost else None):
                    actor, name = running.pop(done)
                    failure = _failure(done)
                    if failure is None:
                        slots.lost.append(actor)
                        deaths[name] += 1
                        if deaths[name] <= _RETRIES:
                            waiting.append(name)
                            continue
                        failure = f"its process ended {deaths[name]} times, perhaps out of memory"
                    else:
                        slots.free.append(actor)
                    if failure:
                        failures[name] = failure
                    if not watcher:
                        bar.update(rows(shards[name]))
                        metrics.add(failure, {"done": rows(shards[name])})
                if watcher and (watcher.is_due() or not (waiting or running)):
                    watcher.poll(bar, metrics)
        finally:
            if watcher:
                watcher.close(bar)
    return failures


class _FreeSlots:
    """Actors that can take a shard. An actor whose process or node died is taken out until it answers again: calls
    before that fail at once, so it would seem free and fail one shard after the other."""

    def __init__(self, actors: list[Any], at_once: int) -> None:
        self.free = actors * at_once  # every actor gets one shard before any gets a second
        self.lost: list[Any] = []  # an actor once for each of its shards
        self._pings: dict[Any, Any] = {}

    def reclaim(self) -> None:
        """Pings lost actors and frees the slots of those that answer."""
        for actor in set(self.lost) - set(self._pings.values()):
            self._pings[actor.__ray_ready__.remote()] = actor
        for answer in _first(list(self._pings), timeout=0):
            actor = self._pings.pop(answer)
            with suppress(RayError):
                ray.get(answer)
                self.free += [actor] * self.lost.count(actor)
                self.lost = [other for other in self.lost if other != actor]


def _first(refs: list[Any], timeout: float | None) -> list[Any]:
    """The first result that is ready, [] after `timeout` seconds."""
    if not refs:  # ray.wait would raise
        time.sleep(min(1.0, timeout or 0))
        return []
    ready: list[Any] = ray.wait(refs, num_returns=1, timeout=timeout)[0]
    return ready


def _failure(done: Any) -> str | None:
    """The result of _Actor.run, None if its process or node died. Raises JobStopped if the work did."""
    try:
        return str(ray.get(done))
    except RayTaskError as error:
        if isinstance(error.cause, JobStopped):
            raise error.cause from None
        raise
    except RayError:
        return None


class _Watcher:
    """Collects the reports of all actors, including those of incarnations that died."""

    def __init__(self, actors: list[Any], watch: Callable[[list[Any]], Progress]) -> None:
        self.actors, self.watch = actors, watch
        self.reports: dict[str, Any] = {}  # by incarnation
        self.polled = time.monotonic()

    def is_due(self) -> bool:
        return time.monotonic() - self.polled >= _POLL_SECONDS

    def poll(self, bar: Any, metrics: JobMetrics) -> None:
        """Shows the reports of all actors that answer in time."""
        self.polled = time.monotonic()
        asked = [actor.report.remote() for actor in self.actors]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_POLL_SECONDS)
        for answer in answered:
            with suppress(RayError):  # its process died
                incarnation, report = ray.get(answer)
                self.reports |= {} if report is None else {incarnation: report}
        state = self.watch(list(self.reports.values()))
        bar.set_postfix_str(state.line, refresh=False)
        bar.update(max(0, state.rows - bar.n))
        metrics.count(state.counts)
        metrics.show(state.gauges)

    def close(self, bar: Any) -> None:
        """Lets the actors save what they have, then ends them."""
        closing = [actor.close.remote() for actor in self.actors]
        ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SECONDS)
        for actor in self.actors:
            ray.kill(actor)
        bar.refresh()
