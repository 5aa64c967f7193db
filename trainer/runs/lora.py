"""Low-rank adapters (LoRA, arXiv 2106.09685): W x + B A x with W frozen. The only file that imports peft.

Adapters sit on the attention and feed-forward projections of every block. The other layers are left out: those of the
condition see one vector per sample, and the first and last layers are a hundredth of the weights. alpha equals the
rank, so a merged layer is W + B A. A starts random and B at zero: a new adapter changes nothing.

In a model the matrices are named LAYER.lora_A.default.weight (rank, fan-in) and LAYER.lora_B.default.weight (fan-out,
rank); in files with peft's layout base_model.model.LAYER.lora_A.weight and so on.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.model.released import read_json, read_tensors
from trainer.runs.checkpoint import write_tensors
from trainer.runs.ema import load_trainable_state, trainable_state

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TARGETS = r".*\.function\.(qkv|q|kv|out|up|down)"
# Fields of adapter_config.json: those that decide how A and B change a layer, and those that merging can ignore. Any
# other field makes it another kind of adapter unless it has one of the _UNSET values.
_SHAPING = ("r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern")
_IGNORED = (
    *("peft_type", "peft_version", "auto_mapping", "task_type", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config"),
)
_UNSET: tuple[object, ...] = (None, False, "none", [], {})
# Initialisations after which W + B A is the trained layer. PiSSA, OLoRA, CorDA and LoftQ move a part of W into the
# adapter, and MiCA learns in another way.
_PLAIN_STARTS: tuple[object, ...] = (None, True, False, "gaussian", "eva", "orthogonal")


def add_adapters(model: nn.Module, rank: int) -> None:
    """Adds adapters to a model in place, initialised from torch's global generator, and freezes everything else."""
    from peft import LoraConfig, inject_adapter_in_model  # lazy: importing peft takes seconds

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS), model)


def merge_adapters(model: nn.Module, scale: float = 1.0) -> None:
    """Replaces every adapted layer by a plain one with the weight W + scale * alpha / rank * B A, and unfreezes all.

    In place. Raises ValueError if a merged weight is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.scale_layer(scale)
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    if hasattr(model, "peft_config"):  # peft warns if it finds one when adapters are added again
        del model.peft_config
    model.requires_grad_(True)


# --- Files in peft's layout -------------------------------------------------------------------------------------------


def write_adapters(folder: Path, tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Writes the `trainable_state` of a model with adapters as a folder that peft loads.

    Returns the tensors by their names in the file. The folder must not exist yet and appears whole.
    """
    from peft import LoraConfig

    exported = {_exported(name): tensor for name, tensor in tensors.items()}
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS, inference_mode=True)
        config.save_pretrained(str(partial))
        write_tensors(str(partial / WEIGHTS), exported)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return exported


def merge_folder(model: nn.Module, folder: Path, scale: float = 1.0) -> dict[str, Tensor]:
    """Merges the adapters of a folder in peft's layout into a model in place, and returns them by their names there.

    Raises ValueError for a folder without adapters, other kinds of adapters and adapters of another model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    fields, tensors = read_adapters(folder)
    try:
        inject_adapter_in_model(LoraConfig(**{name: fields[name] for name in _SHAPING if name in fields}), model)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the adapters in {folder} belong to another model: {error}") from error
    trainable = trainable_state(model)
    _check_fit(folder, tensors, {_exported(name): tensor for name, tensor in trainable.items()})
    load_trainable_state(model, {name: tensors[_exported(name)] for name in trainable})
    merge_adapters(model, scale)
    return tensors


def read_adapters(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a folder in peft's layout. Raises ValueError for any other folder or kind of adapter."""
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} is not a folder of adapters: it has no {' and no '.join(missing)}. trainer/export.py --to-lora "
            "writes one"
        )
    fields = read_json(folder / CONFIG)
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{folder}/{CONFIG}: peft_type is {fields.get('peft_type')!r}, but only LORA can be merged")
    known = (*_SHAPING, *_IGNORED)
    other = [f"{name}={value}" for name, value in fields.items() if name not in known and value not in _UNSET]
    if (start := fields.get("init_lora_weights")) not in _PLAIN_STARTS:
        other.append(f"init_lora_weights={start}")
    if other:
        raise ValueError(f"{folder}/{CONFIG} has {', '.join(other)}, but only plain adapters, A and B, can be merged")
    return fields, read_tensors(folder / WEIGHTS)


def _exported(name: str) -> str:
    return f"base_model.model.{name.replace('.default.', '.')}"


def _check_fit(folder: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    misshapen = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    parts = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    if differences := [f"{len(names)} {what}, such as {names[0]}" for what, names in parts.items() if names]:
        raise ValueError(f"the adapters in {folder} belong to another model: {'; '.join(differences)}")
