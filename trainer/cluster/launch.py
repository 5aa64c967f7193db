"""Runs a training job with Ray Train. sample_stream.py reads its samples; replicas.py draws pictures with Ray Serve."""

import ctypes
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import RunConfig, ScalingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.core.cluster import node_resources, nodes_of
from pipeline.core.errors import JobFailed, UsageError
from trainer.cluster.control_actor import ControlActor
from trainer.cluster.monitor import ActorReporter, JobMonitor
from trainer.cluster.policies import FailuresWithoutProgress, PolicyTrainer
from trainer.cluster.recording import RecordingTorchConfig
from trainer.cluster.sample_stream import Warn, cpus_per_worker, stream_source
from trainer.health.hangs import HangWatch
from trainer.health.notify import Notifier
from trainer.health.stacks import StackWriter, recorder_environment
from trainer.recipe.memory import check_device
from trainer.recipe.training import Training
from trainer.samples.data import TrainingData
from trainer.training import fit_memory
from trainer.training.metrics import Line
from trainer.training.run_log import check_writers
from trainer.training.worker import SampleSource, Worker
from trainer.training.worker_group import WorkerGroup

# After which a collective operation fails, besides the time that another worker may wait for samples. It cannot depend
# on whether one does: trainer/health/hangs.py ends workers that hang although none waits.
_COLLECTIVE_SECONDS: Final = 1800
_TELL_SECONDS: Final = 30.0
_RESIZE_SECONDS: Final = 15.0  # between looks for new nodes; a resize then waits for a checkpoint

MakeSource = Callable[[TrainingData, Training, WorkerGroup, Warn], SampleSource]


@dataclass(frozen=True)
class TrainingResult:
    steps: int  # taken in total
    lines: list[Line]  # logged by this job
    was_stopped: bool  # by SIGTERM, after saving a checkpoint


def train(
    training: Training,
    make_source: MakeSource = stream_source,
    ray_seconds: float = 0.0,
    notifier: Notifier | None = None,
) -> TrainingResult:
    """Runs the job on the connected Ray. JobFailed if the workers fail for good.

    On SIGTERM, as before a spot machine goes away, the workers save a checkpoint and end. A second SIGTERM ends the job
    at once. `make_source` replaces the samples, for benchmarks. `ray_seconds`: time that Ray took to start.
    `notifier` gets the step of the run, and its events but for the end.
    """
    began = time.monotonic()
    scaling = _scaling(training)
    check_writers(training.wandb)
    data = _data(training)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    counts = training.worker_counts()
    control = ray.remote(num_cpus=0, scheduling_strategy=here)(ControlActor).remote(
        training.max_failures, workers=0 if len(counts) > 1 else training.workers, last_step=training.stop_step
    )
    trainer = PolicyTrainer(
        _train_worker,
        train_loop_config={"training": training, "data": ray.put(data), "control": control, "source": make_source},
        torch_config=RecordingTorchConfig(
            timeout_s=int(3600 * training.s3_wait) + _COLLECTIVE_SECONDS,
            environment=recorder_environment(training.folder),
        ),
        scaling_config=scaling,
        run_config=RunConfig(name="ray", storage_path=training.folder),
        failure_policy=FailuresWithoutProgress(control, training.checkpoints, training.s3_wait),
        counts=counts,
    )
    monitor = JobMonitor(control, training, {"Ray": ray_seconds, "index": time.monotonic() - began}, notifier)
    try:
        with monitor:
            trainer.fit()
    except (RayError, ray.train.TrainingFailedError) as error:
        if monitor.failure:
            raise JobFailed(monitor.failure) from error
        *_, cause = str(error).strip().splitlines() or [type(error).__name__]
        raise JobFailed(f"training stopped: {cause}; run the same command to go on") from error
    if monitor.failure:
        raise JobFailed(monitor.failure)
    return TrainingResult(ray.get(control.steps_taken.remote()), monitor.lines, monitor.was_stopped)


def _data(training: Training) -> TrainingData:
    """UsageError if the pictures have changed since the selection was made."""
    stage = training.stage
    try:
        return TrainingData.load(
            training.selection, training.crop(), batch_size=stage.batch_size, streams=stage.streams,
            window=stage.window, hold_out=stage.hold_out, workers=training.workers, first_epoch=training.first_epoch,
            index_folder=training.folder,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from error


def _scaling(training: Training) -> ScalingConfig:
    """Resources of each worker: a GPU if there are any, and CPUs, of which some are left to read tasks. Workers run
    on nodes that offer `trainer`, if any does, and then count only their GPUs: those of captioner nodes are not free
    for them."""
    gpus = sum(node.get("GPU", 0.0) for node in nodes_of("trainer"))
    cpus = float(ray.cluster_resources().get("CPU", 0))
    check_device(training, int(gpus))
    if cpus < 2:
        raise UsageError(
            f"training needs 2 CPUs, one of them to read pictures, but Ray has {cpus:.0f}; start it with more"
        )
    counts = training.worker_counts()
    fewest, most = counts[0], counts[-1]
    if 0 < gpus < fewest:
        raise UsageError(f"--workers {fewest} but the cluster has {gpus:.0f} GPUs; use --workers {gpus:.0f}")
    resources = {"CPU": cpus_per_worker(most)} | node_resources("trainer")
    number = most if fewest == most else (fewest, most)
    return ScalingConfig(
        num_workers=number, use_gpu=gpus > 0, resources_per_worker=resources,
        elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
    )  # fmt: skip


def _train_worker(config: dict[str, Any]) -> None:
    """Runs in each worker of Ray Train, and again in new processes after one was lost."""
    training: Training = config["training"]
    control = config["control"]
    context = ray.train.get_context()
    if not torch.cuda.is_available():
        # Ray sets OMP_NUM_THREADS to the worker's logical CPUs. Reading pictures needs few of the real ones.
        torch.set_num_threads(max(1, torch.multiprocessing.cpu_count() // context.get_local_world_size()))
        keep_freed_memory()
    group = WorkerGroup.from_process_group()
    StackWriter(training.folder, group.rank)
    training = training.with_workers(group.size)
    reporter = ActorReporter(control)
    source = config["source"](ray.get(config["data"]), training, group, reporter.warn)
    worker: Worker | None = None
    try:
        worker = Worker(training, group, ray.train.torch.get_device(), source, reporter)
        if group.is_rank_zero:
            # Not before the checkpoint was read: the limit for waiting for S3 counts from the last begin.
            control.begin.remote(group.size)
        with HangWatch(worker.activity, partial(_note_activity, control, group.rank), partial(_end_process, control)):
            steps = worker.run()
    except (JobFailed, UsageError, ValueError) as error:
        ray.get(control.fail.remote(str(error)))
        raise
    except (RuntimeError, MemoryError) as error:
        # While a worker is set up, running out of memory records no smaller batch and counts as a failure.
        if worker is not None and fit_memory.is_out_of_memory(error):
            ray.get(control.note_smaller_batch.remote())
        raise
    if group.is_rank_zero:
        ray.get(control.finish.remote(steps))


def _note_activity(control: Any, rank: int, steps: int, waits: bool) -> float:
    """As of ControlActor; 0 if it cannot be asked."""
    try:
        quiet: float = ray.get(control.note_activity.remote(rank, steps, waits), timeout=_TELL_SECONDS)
    except RayError:
        return 0.0
    return quiet


def _end_process(control: Any, why: str) -> None:
    """Ends this worker, which its hanging thread cannot: Ray then starts all of them again."""
    with suppress(RayError):
        ray.get(control.add_message.remote(why), timeout=_TELL_SECONDS)
    os._exit(1)


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks instead of returning them to the system and faulting them in again.

    That takes about a tenth of a training step on a CPU. glibc's environment variables would need a Ray runtime
    environment, whose workers do not start from a path with a space.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
