"""Weights between this project's runs and folders, the public HDM layout, and peft. Each function returns the number of
tensors written, after reading them back."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.core.errors import JobFailed, UsageError
from pipeline.storage.shards import Store
from trainer.exporting.command import ExportJob
from trainer.model.config import XUTConfig
from trainer.model.released import from_released, read_config, read_tensors, to_released, write_released
from trainer.runs.checkpoint import Checkpoint
from trainer.runs.lora import read_adapters, write_adapters
from trainer.runs.run_folder import config_of, find_checkpoint
from trainer.runs.weights import Lora, adapters, is_model_folder, load_model, save_model, trained_model


def import_released(job: ExportJob) -> int:
    config = read_config(job.config) if job.config else XUTConfig.released()
    tensors = from_released(read_tensors(job.source), config)
    save_model(job.out, config, tensors)
    return _verified(load_model(job.out)[1], tensors, job.out)


def export_released(job: ExportJob) -> int:
    if is_model_folder(Path(job.source)):
        if job.weights is not None:
            raise UsageError(
                f"--weights and --ema-length belong to a run; {job.source} is a model folder with one set of weights"
            )
        config, tensors = load_model(Path(job.source))
    else:
        model = trained_model(source_checkpoint(job.source), "ema" if job.weights is None else job.weights)
        config, tensors = model.config, model.state_dict()
    released = to_released(_converted(tensors, job.dtype), config)
    write_released(job.out, config, released)
    return _verified(read_tensors(job.out), released, job.out)


def export_lora(job: ExportJob) -> int:
    found = None if is_model_folder(Path(job.source)) else source_checkpoint(job.source)
    lora = Lora.of(config_of(found)) if found else None
    if found is None or lora is None:
        raise UsageError(
            f"{job.source} has no adapters: it was not trained with --lora. Export a whole model with --to-diffusers "
            "or --to-released."
        )
    tensors = write_adapters(
        job.out, _converted(adapters(found, "ema" if job.weights is None else job.weights), job.dtype), lora.rank
    )
    return _verified(read_adapters(job.out)[1], tensors, job.out)


def source_checkpoint(source: str) -> Checkpoint:
    """The newest checkpoint of a run or a stage, or the checkpoint itself."""
    root = Store(source).root
    if found := find_checkpoint(root):
        return found
    raise UsageError(f"{root} has no checkpoint and is no model folder. Give --run a run of trainer/run.py.")


def _converted(tensors: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """Except the frequencies of the time: rounded to half precision they would turn it by a quarter of a radian."""
    kept = tensors if dtype is None else ("time_in.frequency",)
    return {n: tensor if n in kept else tensor.to(getattr(torch, str(dtype))) for n, tensor in tensors.items()}


def _verified(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], out: Path) -> int:
    """Raises JobFailed if the tensors read back differ from those written, because the disk is full or failing."""
    same = found.keys() == wanted.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(_bytes(found[name]), _bytes(tensor))
        for name, tensor in wanted.items()
    )
    if not same:
        raise JobFailed(f"{out} does not read back as it was written. Remove it, check the disk and run again.")
    return len(wanted)


def _bytes(tensor: Tensor) -> Tensor:
    """Compared instead of the numbers, because NaN does not equal itself."""
    return tensor.contiguous().flatten().view(torch.uint8)
