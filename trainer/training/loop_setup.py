"""What a worker starts with: the newest checkpoint and the loop in that state."""

import socket
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.core.errors import JobFailed, StorageUnavailable
from trainer.encoders.latents import Codec
from trainer.encoders.vision import vision_shape
from trainer.model.float8 import use_float8
from trainer.model.xut import XUT
from trainer.optimization.schedule import Schedule
from trainer.recipe.stages import StageConfig
from trainer.recipe.training import Training
from trainer.runs.checkpoint import Checkpoint, Checkpoints
from trainer.runs.checkpoint_copy import restore
from trainer.runs.lora import add_adapters
from trainer.runs.run_folder import config_of
from trainer.runs.weights import Lora, trained_model
from trainer.training.loop import Loop


def from_newest(training: Training, warn: Callable[[str], None]) -> tuple[Training, Checkpoint | None]:
    """The job continued from its newest checkpoint, which restarted workers find further on than the job's start.

    If all are lost, the newest copy is restored, and `warn` is told. JobFailed if the job was to resume from a
    checkpoint that no longer exists, StorageUnavailable if the run's folder is missing.
    """
    if not Path(training.folder).is_dir():  # an unmounted run folder has no checkpoints: training would begin anew
        raise StorageUnavailable(f"the run's folder {training.folder} is not there on {socket.gethostname()}")
    found = Checkpoints(training.checkpoints).newest()
    if found is None and training.copies:
        if line := restore(Path(training.run), training.stage_name, training.checkpoints, training.copies):
            warn(line)
        found = Checkpoints(training.checkpoints).newest()
    found = found or training.branch
    if found is None:
        if training.start_step:
            raise JobFailed(f"the checkpoint of step {training.start_step} in {training.checkpoints} is gone")
        return training, None
    return training if found.step == training.start_step else training.resumed_from(found.state()), found


def build_loop(training: Training, checkpoint: Checkpoint | None, codec: Codec, device: torch.device) -> Loop:
    """The loop at `start_step`: loaded from the checkpoint, else from the initial weights, else new.

    ValueError if the base of adapters is missing or has changed, or the stage's vision model is missing.
    """
    torch.manual_seed(training.stage.seed)
    if training.lora is None:
        model = XUT(training.model, training.checkpointing)  # on the CPU, where random numbers are reproducible
    else:
        model = training.lora.base_model(training.checkpointing)
        add_adapters(model, training.lora.rank)
    feature_width = vision_shape(training.stage.repa.features).width if training.stage.repa.features else None
    loop = new_loop(training.stage, model, training.schedule(), codec, device, feature_width)
    if checkpoint:
        loop.load(all_tensors(checkpoint), checkpoint.step)
        if training.branch and checkpoint.folder == training.branch.folder:
            loop.start_power_ema()  # its snapshots lie in another folder
    elif training.weights and Lora.of(config_of(training.weights)):
        loop.load({"model": trained_model(training.weights).state_dict()}, steps_taken=0)
    elif training.weights:
        loop.load({name: training.weights.tensors(name) for name in ("model", "ema")}, steps_taken=0)
    return loop


def new_loop(
    stage: StageConfig,
    model: XUT,
    schedule: Schedule,
    codec: Codec,
    device: torch.device,
    feature_width: int | None = None,
) -> Loop:
    """A loop before its first step. feature_width: of the stage's vision model; None: tokens are not aligned.

    JobFailed if the stage asks for float8 and the GPU or torchao is not there.
    """
    on_gpu = device.type == "cuda"
    precision = stage.precision if on_gpu else "fp32"
    model = model.to(device)
    if stage.fp8 and on_gpu:
        try:
            use_float8(model)
        except ValueError as error:
            raise JobFailed(str(error)) from error
    return Loop(
        model, stage, schedule, codec.loss_weight_C, precision, stage.compiled and on_gpu, feature_width=feature_width
    )


def all_tensors(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """The argument of `Loop.load`."""
    files = checkpoint.state()["files"]
    optional = [name for name in ("power_ema", "repa") if f"{name}.safetensors" in files]
    return {name: checkpoint.tensors(name) for name in ("model", "ema", "optimizer", *optional)}
