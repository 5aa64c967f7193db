"""Runs a training job with Ray Train. sample_stream.py reads its samples; replicas.py draws pictures with Ray Serve."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.core.cluster import node_resources, nodes_of
from pipeline.core.errors import JobFailed, UsageError
from trainer.cluster.control_actor import ControlActor
from trainer.cluster.monitor import ActorReporter, JobMonitor
from trainer.cluster.sample_stream import Warn, cpus_per_worker, stream_source
from trainer.recipe.memory import check_device
from trainer.recipe.training import Training
from trainer.samples.data import TrainingData
from trainer.training.metrics import Line
from trainer.training.run_log import check_writers
from trainer.training.worker import SampleSource, Worker
from trainer.training.worker_group import WorkerGroup

# After which a collective operation fails, besides the time that another worker may wait for S3. Ray's default.
_COLLECTIVE_SECONDS: Final = 1800

MakeSource = Callable[[TrainingData, Training, WorkerGroup, Warn], SampleSource]


@dataclass(frozen=True)
class TrainingResult:
    steps: int  # taken in total
    lines: list[Line]  # logged by this job
    was_stopped: bool  # by SIGTERM, after saving a checkpoint


def train(training: Training, make_source: MakeSource = stream_source) -> TrainingResult:
    """Runs the job on the connected Ray. JobFailed if the workers fail for good.

    On SIGTERM, as before a spot machine goes away, the workers save a checkpoint and end. A second SIGTERM ends the job
    at once. `make_source` replaces the samples, for benchmarks.
    """
    scaling = _scaling(training)
    check_writers(training.wandb)
    data = _data(training)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    control = ray.remote(num_cpus=0, scheduling_strategy=here)(ControlActor).remote()
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"training": training, "data": ray.put(data), "control": control, "source": make_source},
        torch_config=TorchConfig(timeout_s=int(3600 * training.s3_wait) + _COLLECTIVE_SECONDS),
        scaling_config=scaling,
        run_config=RunConfig(
            name="ray", storage_path=training.folder, failure_config=FailureConfig(max_failures=training.max_failures)
        ),
    )
    monitor = JobMonitor(control, training)
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
    if 0 < gpus < training.workers:
        raise UsageError(f"--workers {training.workers} but the cluster has {gpus:.0f} GPUs; use --workers {gpus:.0f}")
    resources = {"CPU": cpus_per_worker(training.workers)} | node_resources("trainer")
    return ScalingConfig(num_workers=training.workers, use_gpu=gpus > 0, resources_per_worker=resources)


def _train_worker(config: dict[str, Any]) -> None:
    """Runs in each worker of Ray Train, and again in new processes after one was lost."""
    training: Training = config["training"]
    control = config["control"]
    if ray.get(control.messages_from.remote(0))[1]:
        return
    context = ray.train.get_context()
    if not torch.cuda.is_available():
        # Ray sets OMP_NUM_THREADS to the worker's logical CPUs. Reading pictures needs few of the real ones.
        torch.set_num_threads(max(1, torch.multiprocessing.cpu_count() // context.get_local_world_size()))
        keep_freed_memory()
    group = WorkerGroup.from_process_group()
    reporter = ActorReporter(control)
    source = config["source"](ray.get(config["data"]), training, group, reporter.warn)
    try:
        steps = Worker(training, group, ray.train.torch.get_device(), source, reporter).run()
    except (JobFailed, UsageError, ValueError) as error:
        ray.get(control.fail.remote(str(error)))
        raise
    if group.is_rank_zero:
        ray.get(control.finish.remote(steps))


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
