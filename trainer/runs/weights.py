"""The weights that a path means: a model folder's, or a checkpoint's, averaged or raw, adapters merged."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.encoders.pretrained import first_line
from trainer.model.released import PASSED_ON
from trainer.model.xut import XUT, Checkpointing, XUTConfig
from trainer.runs.checkpoint import Checkpoint
from trainer.runs.ema import EMA
from trainer.runs.lora import add_adapters, merge_adapters
from trainer.runs.model_folder import is_model_folder, load_model
from trainer.runs.run_folder import config_of, find_checkpoint
from trainer.runs.trainable import learnt_state, load_learnt_state

Weights = Literal["ema", "raw"]


@dataclass(frozen=True)
class Lora:
    """Adapters, and the weights that they were trained on: those of a model folder, or the averages of a checkpoint."""

    rank: int
    base: str  # folder
    sha256: str  # of the weights, see `weights_hash`

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Lora | None":
        """From a run's record (`Training.record`); None for one that trained the whole model."""
        fields = record.get("lora")
        return cls(**fields) if fields else None

    def base_model(self, checkpointing: Checkpointing = "none") -> XUT:
        """ValueError, with the mend, where the base is gone or has other weights by now."""
        base = find_base(self.base)
        mend = "put it back, or give run.py --from FOLDER where it is now"
        if base is None:
            raise ValueError(f"the base of these adapters is gone: {self.base} has no weights; {mend}")
        model = base.model(checkpointing)
        if (found := weights_hash(model)) != self.sha256:
            raise ValueError(
                f"the base of these adapters has changed: the weights in {self.base} have the sha256 {found[:12]} "
                f"instead of {self.sha256[:12]}; {mend}"
            )
        return model


@dataclass(frozen=True)
class Base:
    """What adapters can be trained on."""

    folder: str
    checkpoint: Checkpoint | None  # none for a model folder

    @property
    def stage(self) -> dict[str, Any] | None:
        """The settings that a checkpoint was trained with."""
        return dict(config_of(self.checkpoint)["stage"]) if self.checkpoint else None

    def model(self, checkpointing: Checkpointing = "none") -> XUT:
        """float32. ValueError for damaged files."""
        if self.checkpoint is not None:
            return trained_model(self.checkpoint, "ema", checkpointing)
        config, tensors = load_model(Path(self.folder))
        model = XUT(config, checkpointing)
        try:
            model.load_state_dict({n: tensor.float() for n, tensor in tensors.items() if not n.startswith(PASSED_ON)})
        except RuntimeError as error:
            raise ValueError(
                f"the weights in {self.folder} are not those of its config ({first_line(error)})"
            ) from error
        return model


def find_base(path: str) -> Base | None:
    """A model folder (`trainer.runs.model_folder`), or the checkpoint that `run_folder.find_checkpoint` finds there."""
    if is_model_folder(Path(path)):
        return Base(path, None)
    found = find_checkpoint(path)
    return Base(found.folder, found) if found else None


def weights_hash(model: XUT) -> str:
    """Hexadecimal SHA-256 of all tensors, with their names and shapes: the same wherever they lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def trained_model(found: Checkpoint, weights: Weights = "ema", checkpointing: Checkpointing = "none") -> XUT:
    """The whole model of a checkpoint, on the CPU: with its averaged weights, or those that the optimizer left.

    ValueError for a damaged checkpoint, and for adapters whose base is gone or changed.
    """
    record = config_of(found)
    lora = Lora.of(record)
    if lora is None:
        return _loaded(XUT(XUTConfig.from_dict(record["model"]), checkpointing), found, weights)
    model = lora.base_model(checkpointing)
    add_adapters(model, lora.rank)
    merge_adapters(_loaded(model, found, weights))  # in place
    return model


def adapters(found: Checkpoint, weights: Weights = "ema") -> dict[str, Tensor]:
    """Of a checkpoint of adapters, alone and as they are in the model; the base is not needed. ValueError as
    `trained_model`."""
    record = config_of(found)
    lora = Lora.of(record)
    assert lora is not None, f"{found.folder} has no adapters"
    model = XUT(XUTConfig.from_dict(record["model"]))
    add_adapters(model, lora.rank)
    return learnt_state(_loaded(model, found, weights))


def _loaded(model: XUT, found: Checkpoint, weights: Weights) -> XUT:
    """With what the checkpoint has of what the model learns. With "ema" the raw parameters need not be there: the run
    that is kept for tests has none."""
    tensors = found.tensors("model")
    if weights == "ema":
        average = EMA(model, decay=0)
        average.load_state_dict(found.tensors("ema"))
        tensors = tensors | average.weights  # buffers are not averaged
    try:
        load_learnt_state(model, tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{found.folder} is damaged: its weights are not those of its config ({first_line(error)})"
        ) from error
    return model
