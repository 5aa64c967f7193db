"""The weights that a path refers to: those of a model folder, or a checkpoint's, averaged or raw, with adapters merged.

A model folder holds one model without training state: config.json, model.safetensors and, if the model came with an
image decoder, vae.safetensors.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.encoders.pretrained import first_line
from trainer.model.config import XUTConfig
from trainer.model.released import VAE_PREFIX, read_json, read_tensors
from trainer.model.xut import XUT, Checkpointing
from trainer.runs.checkpoint import Checkpoint
from trainer.runs.ema import EMA, load_trainable_state, trainable_state
from trainer.runs.ema_snapshots import averages_of_length
from trainer.runs.lora import add_adapters, merge_adapters
from trainer.runs.run_folder import config_of, find_checkpoint

# The moving averages, the parameters as the optimizer left them, or averages of this relative length (power_ema.py).
Weights = Literal["ema", "raw"] | float

_CONFIG, _MODEL, _VAE = "config.json", "model.safetensors", "vae.safetensors"


def save_model(folder: Path, config: XUTConfig, tensors: Mapping[str, Tensor]) -> None:
    """Writes a model folder, which must not exist yet and appears whole. Dtypes are kept; `vae.*` gets its own file."""
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    vae = {name: tensor for name, tensor in tensors.items() if name.startswith(VAE_PREFIX)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if name not in vae}, partial / _MODEL)
    if vae:
        save_file(vae, partial / _VAE)
    (partial / _CONFIG).write_text(json.dumps(config.to_dict(), indent=1) + "\n", encoding="utf-8")
    partial.rename(folder)


def is_model_folder(folder: Path) -> bool:
    return (folder / _CONFIG).is_file() and (folder / _MODEL).is_file()


def load_model(folder: Path) -> tuple[XUTConfig, dict[str, Tensor]]:
    """The inverse of `save_model`. Raises ValueError if the folder is not a model folder."""
    if missing := [name for name in (_CONFIG, _MODEL) if not (folder / name).is_file()]:
        raise ValueError(f"{folder} is not a model folder: it has no {' and no '.join(missing)}")
    tensors = read_tensors(folder / _MODEL)
    vae = read_tensors(folder / _VAE) if (folder / _VAE).is_file() else {}
    return XUTConfig.from_dict(read_json(folder / _CONFIG)), tensors | vae


@dataclass(frozen=True)
class BaseWeights:
    """Weights that adapters can be trained on: a model folder or a checkpoint's averages."""

    folder: str
    checkpoint: Checkpoint | None  # None for a model folder

    @property
    def stage(self) -> dict[str, Any] | None:
        """The stage settings that a checkpoint was trained with; None for a model folder."""
        return dict(config_of(self.checkpoint)["stage"]) if self.checkpoint else None

    def model(self, checkpointing: Checkpointing = "none") -> XUT:
        """The model in float32, on the CPU. Raises ValueError if the files are damaged."""
        if self.checkpoint is not None:
            return trained_model(self.checkpoint, "ema", checkpointing)
        config, tensors = load_model(Path(self.folder))
        model = XUT(config, checkpointing)
        try:
            model.load_state_dict({n: tensor.float() for n, tensor in tensors.items() if not n.startswith(VAE_PREFIX)})
        except RuntimeError as error:
            raise ValueError(f"the weights in {self.folder} do not match its config ({first_line(error)})") from error
        return model


def find_base(path: str) -> BaseWeights | None:
    """The model folder at a path, or the checkpoint that `run_folder.find_checkpoint` finds there; None if neither."""
    if is_model_folder(Path(path)):
        return BaseWeights(path, None)
    found = find_checkpoint(path)
    return BaseWeights(found.folder, found) if found else None


@dataclass(frozen=True)
class Lora:
    """The rank of a run's adapters and the weights that they were trained on; stored as "lora" in a run's record."""

    rank: int
    base: str  # folder, see `BaseWeights`
    sha256: str  # see `weights_hash`

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Lora | None":
        """From a run's recorded config; None if the run trained the whole model."""
        fields = record.get("lora")
        return cls(**fields) if fields else None

    def base_model(self, checkpointing: Checkpointing = "none") -> XUT:
        """The model that the adapters belong to. Raises ValueError if its weights are missing or have changed."""
        base = find_base(self.base)
        fix = "Put it back, or give run.py --from FOLDER where it is now"
        if base is None:
            raise ValueError(f"the base of these adapters is gone: {self.base} has no weights. {fix}")
        model = base.model(checkpointing)
        if (found := weights_hash(model)) != self.sha256:
            raise ValueError(
                f"the base of these adapters has changed: the weights in {self.base} have the sha256 {found[:12]} "
                f"instead of {self.sha256[:12]}. {fix}"
            )
        return model


def weights_hash(model: XUT) -> str:
    """SHA-256 in hexadecimal of the names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def trained_model(found: Checkpoint, weights: Weights = "ema", checkpointing: Checkpointing = "none") -> XUT:
    """The whole model of a checkpoint in float32, on the CPU, with adapters merged into their base.

    Raises ValueError if the checkpoint is damaged, or if the base of its adapters is missing or has changed.
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
    """The adapters of a checkpoint by their names in the model, without their base. Raises ValueError if damaged."""
    record = config_of(found)
    lora = Lora.of(record)
    assert lora is not None, f"{found.folder} has no adapters"
    model = XUT(XUTConfig.from_dict(record["model"]))
    add_adapters(model, lora.rank)
    return trainable_state(_loaded(model, found, weights))


def _loaded(model: XUT, found: Checkpoint, weights: Weights) -> XUT:
    """The model with a checkpoint's tensors. "ema" needs no raw parameters, which a folder may lack."""
    tensors = found.tensors("model")
    if weights == "ema":
        average = EMA(model, decay=0)
        average.load_state_dict(found.tensors("ema"))
        tensors = tensors | average.weights  # "model" provides the buffers, which are not averaged
    elif weights != "raw":
        tensors = tensors | averages_of_length(found, weights)[0]
    try:
        load_trainable_state(model, tensors)
    except RuntimeError as error:
        raise ValueError(
            f"{found.folder} is damaged: its weights do not match its config ({first_line(error)}). Remove it"
        ) from error
    return model
