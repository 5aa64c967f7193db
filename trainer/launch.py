"""The only trainer file that imports ray: wires selection -> batches -> loop -> checkpoint into a Ray Train job."""

import ctypes
import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue

from pipeline.jobs import JobFailed, UsageError, progress, versions
from trainer import checkpoint
from trainer.data import Batch, TrainingData, load_batch
from trainer.latents import Codec, load_codec
from trainer.loop import Inputs, Loop, LoopConfig
from trainer.model.xut import XUT
from trainer.order import micro_batches
from trainer.recipe import Training, check_device
from trainer.run_folder import newest
from trainer.stages import StageConfig
from trainer.text import TextEncoder, load_text_encoder


def train(training: Training) -> list[dict[str, float]]:
    """Run the job on the connected Ray and return the metrics that were logged. JobFailed where a worker raises."""
    check_device(training, int(ray.cluster_resources().get("GPU", 0)))
    scaling = _scaling(training.workers)
    queue = Queue()
    metrics: list[dict[str, float]] = []
    watcher = threading.Thread(target=_show_progress, args=(queue, training, metrics), daemon=True)
    watcher.start()
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"training": training, "queue": queue},
        scaling_config=scaling,
        run_config=RunConfig(name="ray", storage_path=training.folder),
    )
    try:
        trainer.fit()
    except (RayError, ray.train.TrainingFailedError) as error:
        cause = str(error).strip().splitlines()[-1]
        raise JobFailed(f"training stopped: {cause}; run the same command to go on from the last checkpoint") from error
    finally:
        queue.put(None)
        watcher.join(timeout=30)
        queue.shutdown()
    return metrics


# Of one worker: enough to hide a slow read, and bounded however fast the reading is.
_BATCHES_AHEAD = 8


def _batches(training: Training, rank: int, workers: int) -> Iterator[Batch]:
    """This worker's share of every global batch, in order, read and cropped ahead of it by Ray tasks on any node.

    Plain tasks and not Ray Data: its order is not reproducible, its iterators hold no position (ray issues 37633,
    48224), and its executor, a Python loop in this process, made a training step on two cores three times as long.
    """
    load = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(load_batch)
    batch_size = training.stage.batch_size
    data = ray.put(TrainingData.load(training.selection, training.crop(), batch_size=batch_size, workers=workers))
    ahead: deque[Any] = deque()
    for step in range(training.start_step, training.stop_step):
        [positions] = micro_batches(step, batch_size, rank, workers, batch_size // workers)
        ahead.append(load.remote(data, positions))
        if len(ahead) > _BATCHES_AHEAD:
            yield ray.get(ahead.popleft())
    while ahead:
        yield ray.get(ahead.popleft())


def _cpus_of_workers(workers: int) -> float:
    """Logical CPUs that the training workers hold together: at least one is left to read and crop, or nothing would."""
    available = float(ray.cluster_resources().get("CPU", 1))
    return min(float(workers), available - 1)


def _scaling(workers: int) -> ScalingConfig:
    cpus = float(ray.cluster_resources().get("CPU", 1))
    if cpus < 2:
        raise UsageError(
            f"training needs 2 CPUs, one of them to read pictures, and Ray has {cpus:.0f}; start it with more"
        )
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if 0 < gpus < workers:
        raise UsageError(f"--workers {workers} but the cluster has {gpus} GPUs; use --workers {gpus}")
    share = _cpus_of_workers(workers) / workers
    return ScalingConfig(num_workers=workers, use_gpu=gpus > 0, resources_per_worker={"CPU": share})


def _train_worker(config: dict[str, Any]) -> None:
    training: Training = config["training"]
    context = ray.train.get_context()
    leader = context.get_world_rank() == 0
    if not torch.cuda.is_available():
        # Ray sets OMP_NUM_THREADS to the worker's logical CPUs; reading pictures needs few of the real ones.
        torch.set_num_threads(max(1, torch.multiprocessing.cpu_count() // context.get_local_world_size()))
        _keep_freed_memory()
    device = ray.train.torch.get_device()
    codec = load_codec(training.stage.codec, device)
    encoder = load_text_encoder(training.text_encoder, device, layers=training.model.text_layers)
    loop = build_loop(training, codec, device)
    batches = _batches(training, context.get_world_rank(), context.get_world_size())
    if leader:
        _forget_steps_after(training.start_step, Path(training.folder) / "metrics.jsonl")
    started = time.time()
    waited = 0.0
    for _ in range(training.start_step, training.stop_step):
        asked = time.time()
        batch = next(batches)
        waited += time.time() - asked
        loss = loop.step(encode(batch, codec, encoder, training.stage, device))
        taken = loop.steps_taken
        last = taken == training.stop_step
        saving = taken % training.stage.checkpoint_every == 0 or last
        if taken % training.stage.log_every == 0 or saving:
            loss = _mean_over_workers(loss)
            if not torch.isfinite(loss):  # on every worker alike, and before a sound checkpoint makes room for this one
                raise FloatingPointError(f"the loss is {float(loss)} at step {taken}: lower the learning rate")
            if leader:
                seconds = time.time() - started
                speed = (taken - training.start_step) * training.stage.batch_size / seconds
                line = {"step": taken, "loss": float(loss), "images_per_s": speed, "data_wait_share": waited / seconds}
                _append(Path(training.folder) / "metrics.jsonl", line)
                config["queue"].put(line)
        if leader and saving:
            save(training, loop)
    ray.train.report({"step": loop.steps_taken})


def _keep_freed_memory() -> None:
    """glibc gives large blocks back to the system at every free and faults them in again at every allocation, which
    takes about a tenth of a training step on a CPU. (By environment variables it would need a Ray runtime environment,
    whose workers do not start from a path with a space.)"""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_threshold, trim_threshold = -3, -1
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def build_loop(training: Training, codec: Codec, device: torch.device) -> Loop:
    """The model as it was at `start_step`: from the run's newest checkpoint, or new at step 0."""
    stage = training.stage
    torch.manual_seed(stage.seed)
    loop = Loop(
        XUT(training.model).to(device),
        LoopConfig(
            resolution=stage.resolution,
            selection_rate=stage.selection_rate,
            total_steps=training.stop_step,
            ema_decay=stage.ema_decay,
            clip_norm=stage.clip_norm,
            timestep_shift=stage.timestep_shift,
            optimizer=stage.optimizer,
        ),
        codec.loss_weight_C,
    )
    if training.start_step:
        found = newest(training.checkpoints)
        assert found is not None, training.run
        assert found.step == training.start_step, (found, training.start_step)
        loop.model.load_state_dict(found.tensors("model"))
        loop.ema.load_state_dict(found.tensors("ema"))
        checkpoint.load_optimizer(loop.optimizer, found.tensors("optimizer"))
        loop.steps_taken = found.step
    elif training.weights is not None:
        loop.model.load_state_dict(training.weights.tensors("model"))
        loop.ema.load_state_dict(training.weights.tensors("ema"))
    return loop


def save(training: Training, loop: Loop) -> None:
    tensors = {
        "model": loop.model.state_dict(),
        "ema": loop.ema.state_dict(),
        "optimizer": checkpoint.optimizer_tensors(loop.optimizer),
    }
    state = training.state(loop.steps_taken, training.selection.count) | {"versions": versions()}
    checkpoint.save(Path(training.checkpoints).parent, loop.steps_taken, tensors, state, training.stage.keep_last)


def encode(batch: Batch, codec: Codec, encoder: TextEncoder, stage: StageConfig, device: torch.device) -> Inputs:
    """Pixels -> latents and text -> embeddings, by the frozen encoders of this worker."""
    text_BTD, mask_BT = encoder.encode(batch.texts, stage.text_tokens, stage.text_multiple)
    pixels_B3HW = torch.from_numpy(batch.pixels_BHW3).to(device, non_blocking=True).permute(0, 3, 1, 2)
    return Inputs(
        latents_BCHW=codec.encode(pixels_B3HW),
        text_BTD=text_BTD,
        text_mask_BT=mask_BT,
        frame_B4=torch.from_numpy(batch.frame_B4).to(device),
        keys_B=torch.from_numpy(batch.keys_B).to(device),
    )


def _mean_over_workers(value: torch.Tensor) -> torch.Tensor:
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


def _forget_steps_after(step: int, metrics: Path) -> None:
    """Of a run that was stopped: the lines since its last checkpoint, which come again, and a half-written one."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    temporary = metrics.with_suffix(".partial")
    temporary.write_text("".join(kept))
    temporary.rename(metrics)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _show_progress(queue: Queue, training: Training, metrics: list[dict[str, float]]) -> None:
    """Runs beside `fit` in the driver: one line that says how far the workers are."""
    with progress(iter(()), training.stop_step, f"train {training.stage.selection}", "steps") as bar:
        bar.update(training.start_step)
        while True:
            try:
                line = queue.get(timeout=5)
            except Empty:
                continue
            if line is None:
                return
            metrics.append(line)
            bar.update(line["step"] - bar.n)
            speed, waiting = line["images_per_s"], line["data_wait_share"]
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {speed:.0f} images/s, waiting for data {waiting:.0%}")
