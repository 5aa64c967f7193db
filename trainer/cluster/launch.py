"""Training on Ray (replicas.py has sampling): a Ray Train job whose workers get their samples from loader actors.

Plain actors and not Ray Data: its order is not reproducible, its iterators hold no position (ray issues 37633, 48224),
and its executor, a Python loop in the worker's process, made a training step on two cores three times as long.
"""

import ctypes
import itertools
import math
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Queue
from typing import Any, Final

import ray
import ray.train
import torch
from ray.exceptions import RayError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.core.errors import JobFailed, UsageError
from pipeline.core.progress import Idle, progress
from trainer.cluster.control_actor import Board
from trainer.recipe.resolve import Training, check_device
from trainer.samples.data import Batch, TrainingData, join
from trainer.samples.loader import Loader
from trainer.samples.order import micro_batches, streams_of
from trainer.training.metrics import GAUGE_PREFIX, METRICS, Line, progress_text
from trainer.training.process_group import Team
from trainer.training.run_log import LogConfig, check_writers, skipped_steps
from trainer.training.worker import Source, Worker

_LOOK_SECONDS: Final = 1.0  # between looks at what the workers tell
_AHEAD: Final = (
    3  # micro batches for each loader, beside those that wait in the worker: bounded, however fast they read
)
_WAITING: Final = 2  # micro batches in the worker
_MOST_LOADERS: Final = 8  # of a worker
_LOADER_RETRIES: Final = 3  # of a call whose process died: a picture that kills it must not do so for ever
# What Ray reserves for each. It uses a whole one, and is counted so; but more must not keep it waiting for ever.
_LOADER_CPUS: Final = 0.01


MakeSource = Callable[[TrainingData, Training, Team], Source]


@dataclass(frozen=True)
class Trained:
    """How a job ended."""

    steps: int  # taken in all
    lines: list[Line]  # that were logged
    was_stopped: bool  # by SIGTERM, after a checkpoint


def train(training: Training, samples: MakeSource | None = None) -> Trained:
    """Run the job on the connected Ray. JobFailed where the workers give up. `samples`: others than the selection's, to
    be measured beside them.

    On SIGTERM, as before a spot machine goes, the workers save a checkpoint and end; a second one ends at once.
    """
    scaling = _scaling(training)
    check_writers(LogConfig(wandb="homemade-diffusion" if training.wandb else None))
    data = _data(training)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"training": training, "data": ray.put(data), "board": board, "samples": samples or streamed},
        scaling_config=scaling,
        run_config=RunConfig(
            name="ray", storage_path=training.folder, failure_config=FailureConfig(max_failures=training.max_failures)
        ),
    )
    watcher = _Watcher(board, training)
    try:
        with watcher:
            trainer.fit()
    except (RayError, ray.train.TrainingFailedError) as error:
        if watcher.failure:
            raise JobFailed(watcher.failure) from error
        *_, cause = str(error).strip().splitlines() or [type(error).__name__]
        raise JobFailed(f"training stopped: {cause}; run the same command to go on") from error
    if watcher.failure:
        raise JobFailed(watcher.failure)
    return Trained(ray.get(board.ended_at.remote()), watcher.lines, watcher.was_stopped)


def _data(training: Training) -> TrainingData:
    """UsageError where the pictures are not those of the selection any more."""
    stage = training.stage
    try:
        return TrainingData.load(
            training.selection, training.crop(), batch_size=stage.batch_size, streams=stage.streams,
            window=stage.window, hold_out=stage.hold_out, workers=training.workers, first_epoch=training.first_epoch,
            keep_layout=training.folder,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from error


def _scaling(training: Training) -> ScalingConfig:
    """Each worker's share of the cluster: a GPU, where there are any, and CPUs of which some are left to read."""
    cpus, gpus = (float(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
    check_device(training, int(gpus))
    if cpus < 2:
        raise UsageError(
            f"training needs 2 CPUs, one of them to read pictures, and Ray has {cpus:.0f}; start it with more"
        )
    if 0 < gpus < training.workers:
        raise UsageError(f"--workers {training.workers} but the cluster has {gpus:.0f} GPUs; use --workers {gpus:.0f}")
    share = {"CPU": _cpus_of_worker(training.workers)}
    return ScalingConfig(num_workers=training.workers, use_gpu=gpus > 0, resources_per_worker=share)


def _cpus_of_worker(workers: int) -> float:
    """Never a whole one: a node that is full of workers, after another node went, has room for the loaders, which ask
    for little."""
    return min(0.9, (float(ray.cluster_resources().get("CPU", 1)) - 1) / workers)


# --- What driver and workers tell each other --------------------------------------------------------------------------


class _Watcher:
    """In the driver, beside `fit`: shows how far the workers are, and hands SIGTERM on to them."""

    def __init__(self, board: Any, training: Training) -> None:
        self.board, self.training = board, training
        self.lines: list[Line] = []
        self.failure = ""
        self.was_stopped = False
        self._seen = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._gauges = {
            name: Gauge(GAUGE_PREFIX + name, f"{metric.description} ({metric.unit})", tag_keys=("stage",))
            for name, metric in METRICS.items()
        }
        self._idle = Idle(time.monotonic())
        # Without a line of figures, and before at most; of the disk that the run's folder is on.
        for name in ("idle_seconds", "longest_idle_seconds", "disk_used_share"):
            self._gauges[name] = Gauge(GAUGE_PREFIX + name, name.replace("_", " "), tag_keys=("stage",))
        # Set at every look, as Ray forgets a gauge that was not set for 20 seconds: so one that is there says that the
        # job is running.
        # What earlier starts skipped is shown before the first line, so that this start's own are seen to be new.
        skipped = skipped_steps(Path(training.folder))
        self._figures: dict[str, float] = {"step": training.start_step, "skipped_steps": skipped}

    def __enter__(self) -> "_Watcher":
        self._handler = signal.signal(signal.SIGTERM, self._stop)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._handler)
        self._ends.set()
        self._thread.join(timeout=30)

    def _stop(self, number: int, frame: Any) -> None:
        if self.was_stopped:
            signal.default_int_handler(number, frame)
        self.was_stopped = True  # the thread tells the board: a handler must not wait

    def _watch(self) -> None:
        told = False
        name = f"train {self.training.stage_name}"
        with progress(iter(()), self.training.stop_step, name, "steps") as bar:
            bar.update(self.training.start_step)
            bar.refresh()
            while True:
                ends = self._ends.wait(_LOOK_SECONDS)
                if self.was_stopped and not told:
                    told = True
                    ray.get(self.board.stop.remote())
                    bar.write("run: asked to stop: the workers save a checkpoint first", file=sys.stderr)
                lines, self.failure = ray.get(self.board.since.remote(self._seen))
                self._seen += len(lines)
                for line in lines:
                    self._show(line, bar)
                idle = self._idle.look(bar.n - self.training.start_step, time.monotonic())
                disk = {"disk_used_share": _used_share(Path(self.training.folder))}
                for metric, value in (self._figures | idle | disk).items():
                    self._gauges[metric].set(value, tags={"stage": self.training.stage_name})
                if ends:
                    return

    def _show(self, line: Line | str, bar: Any) -> None:
        if isinstance(line, str):
            bar.write(f"run: {line}", file=sys.stderr)
            return
        finite = {name: value for name, value in line.items() if value is not None and math.isfinite(value)}
        # A figure that is not finite any more is not shown: Ray would drop it, and keep the one before.
        kept = {name: value for name, value in self._figures.items() if name not in line}
        self._figures = {name: value for name, value in (kept | finite).items() if name in self._gauges}
        if (step := line.get("step")) is not None:
            self.lines.append(line)
            bar.set_postfix_str(progress_text(line), refresh=False)
            bar.update(int(step) - bar.n)


def _used_share(folder: Path) -> float:
    """Of the disk that a folder is on, 0 to 1, as `df` counts: without what is kept for root."""
    disk = shutil.disk_usage(folder)
    return disk.used / (disk.used + disk.free)


class _Bulletin:
    """A worker's side of the board; it never waits for the driver's node."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._asked = board.is_stopping.remote()
        self._stops = False

    def stop_is_asked(self) -> bool:
        """As it was a step ago."""
        if not self._stops and ray.wait([self._asked], timeout=0)[0]:
            self._stops = ray.get(self._asked)
            self._asked = self._board.is_stopping.remote()
        return self._stops

    def tell(self, line: Line) -> None:
        self._board.tell.remote(line)

    def remark(self, text: str) -> None:
        self._board.tell.remote(text)


# --- A worker ---------------------------------------------------------------------------------------------------------


def _train_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs in each worker; again, in new processes, when one was lost."""
    training: Training = config["training"]
    board = config["board"]
    if ray.get(board.since.remote(0))[1]:
        return
    context = ray.train.get_context()
    if not torch.cuda.is_available():
        # Ray sets OMP_NUM_THREADS to the worker's logical CPUs; reading pictures needs few of the real ones.
        torch.set_num_threads(max(1, torch.multiprocessing.cpu_count() // context.get_local_world_size()))
        keep_freed_memory()
    team = Team.assemble()
    source = config["samples"](ray.get(config["data"]), training, team)
    try:
        steps = Worker(training, team, ray.train.torch.get_device(), source, _Bulletin(board)).run()
    except torch.OutOfMemoryError as error:
        fewer = max(1, training.micro_batch // 2)
        mend = f"run the same command with --set micro_batch={fewer}, which takes the same steps"
        ray.get(board.give_up.remote(f"the GPU's memory is full ({str(error).splitlines()[0]}); {mend}"))
        raise
    except (JobFailed, UsageError, ValueError) as error:
        ray.get(board.give_up.remote(str(error)))
        raise
    if team.leads:
        ray.get(board.end.remote(steps))


def keep_freed_memory() -> None:
    """glibc gives large blocks back to the system at every free and faults them in again at every allocation, which
    takes about a tenth of a training step on a CPU. (By environment variables it would need a Ray runtime environment,
    whose workers do not start from a path with a space.)"""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


# --- Samples ----------------------------------------------------------------------------------------------------------


def streamed(data: TrainingData, training: Training, team: Team) -> Source:
    """Those of the selection, read by loaders ahead of the training."""
    loaders = _start_loaders(data, training, team)
    return Source(
        data=data,
        batches=lambda training: _fetched(_asked_for(loaders, training, team)),
        held_out=lambda numbers: _read(loaders[0].held_out.remote(numbers)),
    )


def _start_loaders(data: TrainingData, training: Training, team: Team) -> list[Any]:
    """As many as there are CPUs for, and streams; each has its own streams of this worker's.

    For them are those CPUs that the workers leave; all where they give way, or a core would idle whenever the training
    waits for pictures.
    """
    gives_way = not torch.cuda.is_available()
    cpus = float(ray.cluster_resources().get("CPU", 1))
    left = cpus if gives_way else cpus - team.size * _cpus_of_worker(team.size)
    streams = data.order.streams // team.size
    count = max(1, min(streams, _MOST_LOADERS, int(left / team.size)))
    kept = replace(data, cached_row_groups=-(-streams // count) * (training.stage.window + 1))
    remote = ray.remote(
        num_cpus=_LOADER_CPUS,
        scheduling_strategy="SPREAD",
        max_restarts=-1,
        max_task_retries=_LOADER_RETRIES,
    )(Loader)
    shared = ray.put(kept)
    return [remote.remote(shared, gives_way) for _ in range(count)]


def _asked_for(loaders: list[Any], training: Training, team: Team) -> Iterator[list[Any]]:
    """The parts of each micro batch of this worker, in order, from start_step on, without end: a training that goes
    back to a checkpoint needs more than its steps. Some are asked for ahead."""
    stage = training.stage
    streams = streams_of(stage.batch_size, stage.streams)
    per_stream = stage.batch_size // streams
    first, own = team.rank * streams // team.size, streams // team.size

    def loader_of(position: int) -> int:
        """Streams side by side belong to the same loader, so that a micro batch has few parts."""
        return (position % stage.batch_size // per_stream - first) * len(loaders) // own

    ahead: deque[list[Any]] = deque()
    for step in itertools.count(training.start_step):
        batch = training.position(step) // stage.batch_size
        for positions in micro_batches(batch, stage.batch_size, team.rank, team.size, training.micro_batch):
            ahead.append([loaders[loader_of(part.start)].load.remote(part) for part in _parts(positions, loader_of)])
            if len(ahead) > _AHEAD * len(loaders):
                yield ahead.popleft()


def _parts(positions: range, key: Any) -> Iterator[range]:
    """Split where `key` changes."""
    start = positions.start
    for position in positions:
        if key(position) != key(start):
            yield range(start, position)
            start = position
    yield range(start, positions.stop)


def _fetched(asked: Iterator[list[Any]]) -> Iterator[Batch]:
    """Whole batches, put together by a thread while the worker trains on those before."""
    ready: Queue[Batch | BaseException] = Queue(_WAITING)

    def fetch() -> None:
        try:
            for parts in asked:
                ready.put(join(_read(parts)))
        except BaseException as error:  # belongs to whoever waits for the batch
            ready.put(error)

    threading.Thread(target=fetch, daemon=True, name="batches").start()
    while True:
        batch = ready.get()
        if isinstance(batch, BaseException):
            raise batch
        yield batch


def _read(asked: Any) -> Any:
    """What loaders give, or the line for the user that they raised: in Ray's error it is a traceback."""
    try:
        return ray.get(asked)
    except RayTaskError as error:
        if isinstance(error.cause, JobFailed | UsageError | ValueError):
            raise error.cause from error
        raise
