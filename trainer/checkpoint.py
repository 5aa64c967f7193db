"""Model, EMA and optimizer in safetensors plus one JSON; a checkpoint appears whole or not at all.

RUN/checkpoints/step-00001500/{model,ema,optimizer}.safetensors, state.json
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """One finished checkpoint folder."""

    folder: Path
    step: int  # optimizer steps taken

    def state(self) -> dict[str, Any]:
        """What is no tensor: step, position, the resolved config, versions."""
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state

    def tensors(self, name: str) -> dict[str, Tensor]:
        """`name` is model, ema or optimizer. ValueError for a damaged file."""
        file = self.folder / f"{name}.safetensors"
        try:
            tensors: dict[str, Tensor] = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); remove its folder to use the checkpoint before") from error
        return tensors


def newest(run: Path) -> Checkpoint | None:
    """The finished checkpoint with the most steps, or None."""
    folders = sorted((run / "checkpoints").glob("step-*"))
    return Checkpoint(folders[-1], int(folders[-1].name.removeprefix("step-"))) if folders else None


def save(
    run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int = 2
) -> Checkpoint:
    """Write under a temporary name, flush, rename, and only then remove all but the newest `keep`."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, named in tensors.items():
        save_file(
            {key: tensor.detach().cpu().contiguous() for key, tensor in named.items()},
            temporary / f"{name}.safetensors",
        )
    (temporary / "state.json").write_text(json.dumps(state | {"step": step}, indent=1))
    for file in temporary.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    for old in sorted((run / "checkpoints").glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return Checkpoint(folder, step)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors named <parameter number>.<state name>."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, named in state.items() for name, value in named.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; the groups stay the optimizer's own."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
