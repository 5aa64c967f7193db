"""A model alone in a folder: config.json, model.safetensors and, where it came with one, vae.safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from trainer.model.released import PASSED_ON, read_json, read_tensors
from trainer.model.xut import XUTConfig

CONFIG, MODEL, VAE = "config.json", "model.safetensors", "vae.safetensors"


def save_model(folder: Path, config: XUTConfig, tensors: Mapping[str, Tensor]) -> None:
    """`tensors` under our names, and `vae.*`; dtypes are kept. The folder must not exist yet and appears whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    vae = {name: tensor for name, tensor in tensors.items() if name.startswith(PASSED_ON)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if name not in vae}, partial / MODEL)
    if vae:
        save_file(vae, partial / VAE)
    (partial / CONFIG).write_text(json.dumps(config.to_dict(), indent=1) + "\n", encoding="utf-8")
    partial.rename(folder)


def is_model_folder(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / MODEL).is_file()


def load_model(folder: Path) -> tuple[XUTConfig, dict[str, Tensor]]:
    """The inverse of `save_model`. ValueError for a folder that is none of it."""
    missing = [name for name in (CONFIG, MODEL) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no model folder: it has no {' and no '.join(missing)}")
    config = XUTConfig.from_dict(read_json(folder / CONFIG))
    tensors = read_tensors(folder / MODEL)
    return config, tensors | (read_tensors(folder / VAE) if (folder / VAE).is_file() else {})
