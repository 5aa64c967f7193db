"""The only pipeline file that runs work on Ray: one function over every shard, on every CPU of the cluster.

A shard is the unit of work and of resume: its task reads, works and commits on its own, so no
picture travels between processes and a killed task is simply run again.
"""

import json
import pickle
import threading
import time
import traceback
import uuid
import warnings
from collections import Counter as Tally
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

import ray
import ray.data
from ray.exceptions import RayError, RayTaskError
from ray.util.annotations import RayDeprecationWarning
from ray.util.metrics import Counter, Gauge

from pipeline.core.errors import JobFailed, JobStopped, UsageError
from pipeline.core.progress import Idle, Standing, progress

T = TypeVar("T")

_RETRIES = 2  # of a shard whose process died, perhaps out of memory; Ray Data's own number is infinite
_LOOK_SECONDS: Final = 3.0  # between looks at what actors report
_END_SECONDS: Final = 30.0  # for actors to keep what they have
_GAUGE_SECONDS: Final = 3.0  # Ray forgets a gauge that was not set for two of its reports, 20 seconds
_DECODING_CPUS: Final = 8  # more than an engine ever needs


def map_shards(
    shards: dict[str, T],
    work: Callable[[T], Mapping[str, int] | None],
    rows: Callable[[T], int],
    description: str,
    memory: int = 0,
) -> dict[str, str]:
    """Run `work` on each shard (by name) in parallel, with a progress bar over the shards' rows and metrics of Ray: see
    _Metrics. What became of a shard's rows is what `work` returns, or else they are "done".

    `memory`: bytes that a worker may need; no more of them run at once on a node than its memory has room for.
    All shards are tried; returns those on which the work raised, or whose process died, each with why. JobFailed where
    Ray itself gave up.
    """

    def run(item: dict[str, Any]) -> dict[str, str]:
        failure, became = _attempt(work, pickle.loads(item["shard"]))
        return {"name": item["name"], "failure": failure, "became": json.dumps(became)}

    items = [{"name": name, "shard": pickle.dumps(shard)} for name, shard in shards.items()]
    todo = ray.data.from_items(items, override_num_blocks=len(items))
    # A process that dies takes only its own shard along. (Never where Ray Data reads files: rows would be lost.)
    todo.context.max_errored_blocks = -1
    with warnings.catch_warnings():
        # Deprecated in 2.60, where nothing else sets the number of retries yet.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        results = todo.map(run, memory=_within_a_node(memory), ray_remote_args_fn=lambda: {"max_retries": _RETRIES})
    failures = dict.fromkeys(shards, "its process died; the log names Ray's own logs")
    with (
        progress(iter(()), sum(map(rows, shards.values())), description, "rows") as bar,
        _Metrics(description, bar) as metrics,
    ):
        try:
            for item in results.iter_rows():
                count = rows(shards[item["name"]])
                bar.update(count)
                metrics.add(item["failure"], json.loads(item["became"]) or {"done": count})
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


def _attempt(work: Callable[[T], Mapping[str, int] | None], shard: T) -> tuple[str, Mapping[str, int] | None]:
    """Why the work failed, "" where it did not; and what it returned. Of whatever kind the failure is, but for
    JobStopped: other shards must still be done."""
    try:
        return "", work(shard)
    except JobStopped:
        raise
    except Exception as error:
        traceback.print_exc()  # goes to the worker's own log
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", None


class _Metrics:
    """Of Ray, while the block lasts and the bar moves: `hdm_<task>_rows` counts rows by what became of them, the gauge
    `hdm_rows_left` has those that are not done, and those of Idle say whether the job is stuck.

    A gauge that nobody sets is soon forgotten, and a shard may take minutes: a thread sets them. So a gauge that is
    there says that its job is running.
    """

    def __init__(self, task: str, bar: Any) -> None:
        self._task, self._bar = task, bar
        self._became: Tally[str] = Tally()
        self._counters: dict[str, Counter] = {}
        self._counted: dict[tuple[str, str], float] = {}
        self._gauges: dict[str, Gauge] = {}
        self._shown: dict[str, float] = {}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="metrics")

    def __enter__(self) -> "_Metrics":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join(timeout=_GAUGE_SECONDS)

    def add(self, failure: str, became: Mapping[str, int]) -> None:
        """The rows of one more shard, by what became of them. Those of one that failed are no rows."""
        if not failure:
            self._became.update(became)
            self.count({f"hdm_{self._task}_rows": self._became})

    def count(self, counts: Mapping[str, Mapping[str, float]]) -> None:
        """By metric and kind: how much so far."""
        for metric, by_kind in counts.items():
            if metric not in self._counters:
                self._counters[metric] = Counter(metric, description=metric.replace("_", " "), tag_keys=("kind",))
            for kind, value in by_kind.items():
                more = value - self._counted.get((metric, kind), 0)
                if more > 0:  # Ray refuses 0
                    self._counters[metric].inc(more, tags={"kind": kind})
                    self._counted[metric, kind] = value

    def show(self, gauges: dict[str, float]) -> None:
        """By metric: how much it is now, until it is said again."""
        self._shown = gauges

    def _keep(self) -> None:
        idle = Idle(time.monotonic())
        while True:
            rows = self._bar.n
            pace = {f"hdm_{name}": value for name, value in idle.look(rows, time.monotonic()).items()}
            gauges = {"hdm_rows_left": self._bar.total - rows} | pace | self._shown
            for metric, value in gauges.items():
                if metric not in self._gauges:
                    self._gauges[metric] = Gauge(metric, description=metric.replace("_", " "), tag_keys=("task",))
                self._gauges[metric].set(value, tags={"task": self._task})
            if self._ends.wait(_GAUGE_SECONDS):
                return


@dataclass(frozen=True)
class Pool:
    """Actors that stay for the whole job, and what each of them reserves."""

    actors: int
    cpus: int
    gpus: int
    at_once: int = 1  # shards that an actor works on

    def __str__(self) -> str:
        gpu = f"{self.gpus} GPU and " if self.gpus else ""
        return f"{self.actors} actors, each with {gpu}{self.cpus} CPU{'s' if self.cpus > 1 else ''}"


def plan_pool(actors: int | None, shards: int, use_gpus: bool) -> Pool:
    """An actor per GPU with its node's share of CPUs; without GPUs one per CPU. `actors` asks for fewer, and there are
    never more than `shards`.

    UsageError for more than fit: Ray would wait for them for ever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    on_gpus = use_gpus and any(node.get("GPU") for node in nodes)
    # On a GPU it needs a CPU too: an actor that Ray finds none for would wait for ever.
    kinds = ("GPU", "CPU") if on_gpus else ("CPU",)
    room = [(node, int(min(node.get(kind, 0) for kind in kinds))) for node in nodes]
    most = sum(count for _, count in room)
    if (actors or 1) > most:
        raise UsageError(
            f"{actors or 1} actors do not fit, each of which takes a {' and a '.join(kinds)}: Ray has {most}; give a "
            "smaller --actors, or RAY_ADDRESS of a larger cluster"
        )
    shares = [int(node["CPU"] // count) for node, count in room if count]
    return Pool(min(actors or most, shards), min(shares) if on_gpus else 1, int(on_gpus))


def plan_engines(engines: int | None, gpus_each: int, shards: int, use_gpus: bool) -> Pool:
    """As plan_pool, for engines that take `gpus_each` GPUs, and one engine where none are used: it may use all CPUs.
    Each works on two shards, so that its batch stays full where one ends."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpu_nodes = [node for node in nodes if use_gpus and node.get("GPU", 0) >= gpus_each]
    if use_gpus and not gpu_nodes and any(node.get("GPU") for node in nodes):
        raise UsageError(f"--tensor-parallel {gpus_each}: no machine of this Ray has so many GPUs; give a smaller one")
    if not gpu_nodes:
        cpus = int(min(node.get("CPU", 0) for node in nodes if node.get("CPU")))
        if (engines or 1) > cpus:
            raise UsageError(f"--engines {engines}: without GPUs each takes a CPU, and Ray has {cpus}; give fewer")
        return Pool(min(engines or 1, shards), max(1, min(_DECODING_CPUS, cpus // (engines or 1))), 0, at_once=2)
    # Each needs a CPU too: an actor that Ray finds none for would wait for ever.
    room = [(node, int(min(node["GPU"] // gpus_each, node.get("CPU", 0)))) for node in gpu_nodes]
    most = sum(count for _, count in room)
    if (engines or 1) > most:
        raise UsageError(
            f"{engines or 1} engines do not fit, each of which takes {gpus_each} GPU and a CPU: Ray has room for "
            f"{most}; give a smaller --engines, or RAY_ADDRESS of a larger cluster"
        )
    share = min(int(node["CPU"] // count) for node, count in room if count)
    return Pool(min(engines or most, shards), min(_DECODING_CPUS, share), gpus_each, at_once=2)


class _Actor:
    """What Ray keeps: the work, made when the first shard comes so that its failure is that shard's and has words."""

    def __init__(self, make_work: Callable[[], Callable[[Any], None]]) -> None:
        self.make_work = make_work
        self.work: Callable[[Any], None] | None = None
        self.making = threading.Lock()
        self.life = uuid.uuid4().hex  # another one after Ray started this actor again

    def run(self, shard: Any) -> str:
        """Why it failed, "" where it did not; but JobStopped goes through."""

        def work(shard: Any) -> None:
            with self.making:
                self.work = self.work or self.make_work()
            self.work(shard)

        return _attempt(work, shard)[0]

    def answer(self) -> None:
        """That it is there."""

    def report(self) -> tuple[str, Any]:
        """What the work says of itself, None before it is made."""
        return self.life, self.work.report() if isinstance(self.work, LongWork) else None

    def close(self) -> None:
        if isinstance(self.work, LongWork):
            self.work.close()


@runtime_checkable
class LongWork(Protocol):
    """Work that can be watched, and wants to be told of the end."""

    def __call__(self, shard: Any, /) -> None: ...

    def report(self) -> Any:
        """So far; may be called at any time, in a thread of its own."""
        ...

    def close(self) -> None:
        """No more shards come: end within seconds what is still under way."""
        ...


def map_shards_with(
    make_work: Callable[[], Callable[[T], None]],
    shards: dict[str, T],
    rows: Callable[[T], int],
    description: str,
    pool: Pool,
    watch: Callable[[list[Any]], Standing] | None = None,
) -> dict[str, str]:
    """As map_shards, for work that is dear to make, such as a model: `make_work` is called once in each actor.

    `watch` turns the reports of LongWork into what the progress bar shows, every few seconds, and into metrics of Ray.
    JobStopped where the work raises it. A shard whose process or node goes is given to another actor. Plain actors,
    and not Ray Data's: these retry a shard that kills its actor for ever, need a CPU besides the actors' or hang, and
    put an error about themselves on the terminal (ray 2.60).
    """
    remote = ray.remote(
        num_cpus=pool.cpus, num_gpus=pool.gpus, max_restarts=-1, max_concurrency=pool.at_once + (1 if watch else 0)
    )(_Actor)  # fmt: skip
    actors = [remote.remote(make_work) for _ in range(pool.actors)]
    places = _Places(actors, pool.at_once)
    waiting = list(reversed(shards))
    running: dict[Any, tuple[Any, str]] = {}
    losses = Tally[str]()  # of the process that worked on a shard
    failures: dict[str, str] = {}
    watched = _Watched(actors, watch) if watch else None
    with (
        progress(iter(()), sum(map(rows, shards.values())), description, "rows") as bar,
        _Metrics(description, bar) as metrics,
    ):
        try:
            while waiting or running:
                places.look()
                while places.free and waiting:
                    actor, name = places.free.pop(), waiting.pop()
                    running[actor.run.remote(shards[name])] = actor, name
                for done in _first(list(running), _LOOK_SECONDS if watched or places.lost else None):
                    actor, name = running.pop(done)
                    failure = _failure(done)
                    if failure is None:
                        places.lost.append(actor)
                        losses[name] += 1
                        if losses[name] <= _RETRIES:
                            waiting.append(name)
                            continue
                        failure = f"its process ended {losses[name]} times, perhaps out of memory"
                    else:
                        places.free.append(actor)
                    if failure:
                        failures[name] = failure
                    if not watched:
                        bar.update(rows(shards[name]))
                        metrics.add(failure, {"done": rows(shards[name])})
                if watched and (watched.is_due() or not (waiting or running)):
                    watched.look(bar, metrics)
        finally:
            if watched:
                watched.end(bar)
    return failures


class _Places:
    """Where shards can go. An actor whose process or node was lost has no place until it answers again: calls before
    that fail at once, so that it would seem to be free and take one shard after the other along."""

    def __init__(self, actors: list[Any], at_once: int) -> None:
        self.free = actors * at_once  # each has one shard before any has a second
        self.lost: list[Any] = []  # one for each shard that was
        self._asked: dict[Any, Any] = {}

    def look(self) -> None:
        """Ask the lost ones, and free the places of those that answer."""
        for actor in set(self.lost) - set(self._asked.values()):
            self._asked[actor.answer.remote()] = actor
        for answer in _first(list(self._asked), timeout=0):
            actor = self._asked.pop(answer)
            with suppress(RayError):
                ray.get(answer)
                self.free += [actor] * self.lost.count(actor)
                self.lost = [other for other in self.lost if other != actor]


def _first(refs: list[Any], timeout: float | None) -> list[Any]:
    """What is ready first, or nothing after `timeout` seconds."""
    if not refs:  # ray.wait would raise
        time.sleep(min(1.0, timeout or 0))
        return []
    ready: list[Any] = ray.wait(refs, num_returns=1, timeout=timeout)[0]
    return ready


def _failure(done: Any) -> str | None:
    """As _attempt; None where the process or its node was lost. JobStopped where the work raised it."""
    try:
        return str(ray.get(done))
    except RayTaskError as error:
        if isinstance(error.cause, JobStopped):
            raise error.cause from None
        raise
    except RayError:
        return None


class _Watched:
    """What the actors report, summed over the lives of those that were started again."""

    def __init__(self, actors: list[Any], watch: Callable[[list[Any]], Standing]) -> None:
        self.actors, self.watch = actors, watch
        self.reports: dict[str, Any] = {}  # by life
        self.looked = time.monotonic()

    def is_due(self) -> bool:
        return time.monotonic() - self.looked >= _LOOK_SECONDS

    def look(self, bar: Any, metrics: _Metrics) -> None:
        """Ask all that answer in time."""
        self.looked = time.monotonic()
        asked = [actor.report.remote() for actor in self.actors]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_LOOK_SECONDS)
        for answer in answered:
            with suppress(RayError):  # its process ended: the next one goes on
                life, report = ray.get(answer)
                self.reports |= {} if report is None else {life: report}
        standing = self.watch(list(self.reports.values()))
        bar.set_postfix_str(standing.line, refresh=False)
        bar.update(max(0, standing.rows - bar.n))
        metrics.count(standing.counts)
        metrics.show(standing.gauges)

    def end(self, bar: Any) -> None:
        """Let the actors keep what they have, and count it."""
        ending = [actor.close.remote() for actor in self.actors]
        ray.wait(ending, num_returns=len(ending), timeout=_END_SECONDS)
        for actor in self.actors:
            ray.kill(actor)
        bar.refresh()
