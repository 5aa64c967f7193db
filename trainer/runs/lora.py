"""Low-rank adapters (LoRA, arXiv 2106.09685): W x + B A x, with W frozen and A, B trained. Only this file knows peft.

Adapters sit on the attention and feed-forward projections of every block: what sees tokens. The condition's layers see
one vector a sample and serve all blocks at once; the first and last layers are a hundredth of the weights. alpha is the
rank, so that a merged layer is W + B A. B starts at zero, A at random: a new adapter changes nothing.

In a model the matrices are named LAYER.lora_A.default.weight (rank, fan-in) and LAYER.lora_B.default.weight (fan-out,
rank); in peft's files, which the rest of the field reads, base_model.model.LAYER.lora_A.weight.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.model.released import read_json, read_tensors
from trainer.runs.checkpoint import write_tensors
from trainer.runs.trainable import learnt_state, load_learnt_state

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TARGETS = r".*\.function\.(qkv|q|kv|out|up|down)"
# Of adapter_config.json: what decides how A and B change a layer, what only training or a reader's comfort needs, and
# of all else whatever makes it another kind of adapter, where it is set.
_SHAPING = ("r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern")
_BESIDES = (
    *("peft_type", "peft_version", "auto_mapping", "task_type", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config"),
)
_UNSET: tuple[object, ...] = (None, False, "none", [], {})
# Ways to begin that leave the base, and the arithmetic, as they are: of all others peft's (PiSSA, OLoRA, CorDA, LoftQ
# take a part out of the base, MiCA learns otherwise) W + B A is not what was trained.
_PLAIN_STARTS: tuple[object, ...] = (None, True, False, "gaussian", "eva", "orthogonal")


def add_adapters(model: nn.Module, rank: int) -> None:
    """New ones, in place, from torch's random state; all else of the model is frozen."""
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds: not for whoever has no adapters

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS), model)


def merge_adapters(model: nn.Module, scale: float = 1.0) -> None:
    """Every adapted layer becomes a plain one with W + scale * alpha / rank * B A; in place, and nothing is frozen any
    more. ValueError where that is not finite."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.scale_layer(scale)
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    if hasattr(model, "peft_config"):  # peft warns of a second one
        del model.peft_config
    model.requires_grad_(True)


# --- peft's own layout ------------------------------------------------------------------------------------------------


def write_adapters(folder: Path, tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The learnt state of a model with adapters, as a folder that peft loads; gives it by the names it has there. The
    folder must not exist yet and appears whole."""
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
    """Merge the adapters of a folder in peft's layout; gives them as they are there.

    ValueError, which names what does not fit, for a folder that is none, other kinds of adapters, and those of another
    model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    fields, tensors = read_adapters(folder)
    try:
        inject_adapter_in_model(LoraConfig(**{name: fields[name] for name in _SHAPING if name in fields}), model)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the adapters in {folder} are of another model: {error}") from error
    learning = learnt_state(model)
    _check_fit(folder, tensors, {_exported(name): tensor for name, tensor in learning.items()})
    load_learnt_state(model, {name: tensors[_exported(name)] for name in learning})
    merge_adapters(model, scale)
    return tensors


def read_adapters(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a folder in peft's layout. ValueError for one that is none, and other kinds of adapters."""
    return _read_config(folder), read_tensors(folder / WEIGHTS)


def _exported(name: str) -> str:
    return f"base_model.model.{name.replace('.default.', '.')}"


def _read_config(folder: Path) -> dict[str, Any]:
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} is no folder of adapters: it has no {' and no '.join(missing)}; trainer/export.py --to-lora "
            "writes one"
        )
    fields = read_json(folder / CONFIG)
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{folder}/{CONFIG}: peft_type {fields.get('peft_type')!r}; only LORA is merged here")
    known = (*_SHAPING, *_BESIDES)
    other = [f"{name}={value}" for name, value in fields.items() if name not in known and value not in _UNSET]
    if (start := fields.get("init_lora_weights")) not in _PLAIN_STARTS:
        other.append(f"init_lora_weights={start}")
    if other:
        raise ValueError(f"{folder}/{CONFIG}: {', '.join(other)}; only plain adapters, A and B, are merged here")
    return fields


def _check_fit(folder: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    misshapen = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    parts = {"missing": missing, "unknown": unknown, "misshapen": misshapen}
    if said := [f"{len(names)} {what}, such as {names[0]}" for what, names in parts.items() if names]:
        raise ValueError(f"the adapters in {folder} are of another model: {'; '.join(said)}")
