"""Reads and writes the public HDM weights, and renames their tensors to ours and back.

A release is one safetensors file with keys `unet.model.*` in float16 or float32, optionally with the image decoder's
`vae.*`, and a JSON config with its own field names. Renaming keeps the bytes of every tensor and leaves `vae.*` alone.

The released model expects position maps at latent resolution in the "released" convention, the aspect as width /
height, and captions padded to 256 tokens without a mask; `trainer.diffusion.conditioning` provides them.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.model.config import XUTConfig
from trainer.model.xut import XUT

PREFIX = "unet.model."
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save: a zip; before 1.6 a plain pickle
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
VAE_PREFIX = "vae."

# Parts of our names -> the release's: STEMS for the start of a key, then one of the other two for the rest.
STEMS = {
    "patch_in.": "in_patch.proj.",
    "patch_out.": "out_patch.proj.",
    "text_in.": "ctx_proj.",
    "time_in.frequency": "time_emb.freqs",
    "time_in.proj.": "time_emb.proj.0.",
    "aspect_in.": "addon_info_embs_proj.0.",
    "aspect_out.": "addon_info_embs_proj.2.",
    "adaln.attn.": "shared_adaln_attn.",
    "adaln.cross.": "shared_adaln_xattn.",
    "adaln.mlp.": "shared_adaln_ffw.",
    "prev.": "prev_tread_trns.blocks.",
    "encoder.": "backbone.enc_blocks.",
    "decoder.": "backbone.dec_blocks.",
    "post.": "post_tread_trns.blocks.",
}
ADALN_PARTS = {"norm.": "0.", "hidden.": "1.", "out.": "3."}
BLOCK_PARTS = {
    "attn.norm.": "attn_pre_norm.norm.",
    "cross.norm.": "xattn_pre_norm.norm.",
    "mlp.norm.": "mlp_pre_norm.norm.",
    "attn.function.": "attn.",
    "cross.function.": "xattn.",
    "mlp.function.up.": "mlp.w12.",
    "mlp.function.down.": "mlp.w3.",
}

CONFIG_FIELDS = {
    "patch_size": "patch_size",
    "input_dim": "in_channels",
    "dim": "dim",
    "ctx_dim": "text_dim",
    "heads": "heads",
    "mlp_dim": "mlp_dim",
    "depth": "depth",
    "enc_blocks": "enc_blocks",
    "dec_blocks": "dec_blocks",
}
TREAD_FIELDS = {"prev_trns_depth": "prev_blocks", "post_trns_depth": "post_blocks"}
# Options that the weights were trained with. Any other value is another architecture.
FIXED_FIELDS = {
    "addon_info_embs_dim": 1,
    "shared_adaln": True,
    "concat_ctx": True,
    "dec_ctx": False,
    "class_cond": 0,
    "use_dyt": False,
    "double_t": False,
}
# Fields about data and training.
NOT_ARCHITECTURE = {"ctx_size", "grad_ckpt"}


def read_config(path: str | Path) -> XUTConfig:
    """The config in a release's JSON file. Raises ValueError naming the fields that do not fit."""
    fields = read_json(path)
    tread = fields.get("tread_config")
    if not isinstance(tread, dict):
        raise ValueError(f"{path}: tread_config must be an object with {', '.join(TREAD_FIELDS)}: got {tread!r}")
    missing = sorted(CONFIG_FIELDS.keys() - fields.keys()) + sorted(TREAD_FIELDS.keys() - tread.keys())
    known = CONFIG_FIELDS.keys() | FIXED_FIELDS.keys() | NOT_ARCHITECTURE | {"dim_head", "tread_config"}
    unknown = sorted(fields.keys() - known) + sorted(tread.keys() - TREAD_FIELDS.keys() - {"dropout_ratio"})
    other = [f"{name}={fields[name]}" for name, value in FIXED_FIELDS.items() if fields.get(name, value) != value]
    if missing or unknown or other:
        raise ValueError(
            f"{path} is not a config of the released architecture: missing [{', '.join(missing)}], "
            f"unknown [{', '.join(unknown)}], not as released [{', '.join(other)}]"
        )
    ours = {our: fields[their] for their, our in CONFIG_FIELDS.items()}
    config = XUTConfig.released(**ours, **{our: tread[their] for their, our in TREAD_FIELDS.items()})
    if fields.get("dim_head", config.dim // config.heads) != config.dim // config.heads:
        raise ValueError(f"{path}: dim_head={fields['dim_head']} with {config.heads} heads of dim {config.dim}")
    return config


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file if it holds anything else."""
    try:
        fields = json.loads(Path(path).read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a JSON file ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(fields).__name__}")
    return fields


def write_released(path: Path, config: XUTConfig, tensors: Mapping[str, Tensor]) -> None:
    """Writes the tensors of `to_released` to a .safetensors file and their config to a .json file beside it.

    Raises ValueError if either file exists or the path has another suffix.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors: its config is written beside it")
    if existing := [name for name in (path, path.with_suffix(".json")) if name.exists()]:
        raise ValueError(f"{existing[0]} exists already. Give a new path, or remove it first")
    fields = {their: getattr(config, our) for their, our in CONFIG_FIELDS.items()} | FIXED_FIELDS
    tread = {their: getattr(config, our) for their, our in TREAD_FIELDS.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    path.with_suffix(".json").write_text(
        json.dumps({**fields, "tread_config": tread}, indent=1) + "\n", encoding="utf-8"
    )


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises ValueError for any other file; reading a pickle could run code."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file; give a .safetensors file")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        with open(path, "rb") as file:
            start = file.read(2)
        if start not in _PICKLES:
            raise ValueError(f"{path} is not a safetensors file ({error})") from None
        raise ValueError(
            f"{path} is not a safetensors file ({error}). A pickle (.ckpt, .pt, .bin) can run code when it is read and "
            "is refused; if you trust where it comes from, convert it once: "
            'python -c "import sys, torch, safetensors.torch as s; w = torch.load(sys.argv[1], weights_only=True); '
            "s.save_file({k: v.contiguous() for k, v in w.get('state_dict', w).items()}, sys.argv[2])\" "
            f"{shlex.quote(str(path))} {shlex.quote(f'{path}.safetensors')}"
        ) from None
    return tensors


def from_released(tensors: Mapping[str, Tensor], config: XUTConfig) -> dict[str, Tensor]:
    """A released state dict with our names and shapes; bytes and `vae.*` are unchanged.

    Raises ValueError listing every unknown, missing and misshapen key.
    """
    return _renamed(tensors, {their: our for our, their in _names(config).items()})


def to_released(tensors: Mapping[str, Tensor], config: XUTConfig) -> dict[str, Tensor]:
    """The inverse of `from_released`. Also raises ValueError if the config is not of the released architecture."""
    return _renamed(tensors, _names(config))


_Entry = tuple[str, torch.Size]  # a tensor's name and shape


def _names(config: XUTConfig) -> dict[_Entry, _Entry]:
    """The release's name and shape of every tensor of the model."""
    shape_only = XUTConfig.released(
        **{our: getattr(config, our) for our in (*CONFIG_FIELDS.values(), *TREAD_FIELDS.values())}
    )
    if config != shape_only:
        differing = [name for name, value in config.to_dict().items() if value != shape_only.to_dict()[name]]
        raise ValueError(f"this model is not of the released architecture, it differs in: {', '.join(differing)}")
    with torch.device("meta"):
        state = XUT(config).state_dict()
    patch = torch.Size([config.dim, config.in_channels, config.patch_size, config.patch_size])
    return {
        (name, value.shape): (_released_name(name), patch if name == "patch_in.weight" else value.shape)
        for name, value in state.items()
    }


def _released_name(name: str) -> str:
    stem = next(stem for stem in STEMS if name.startswith(stem))
    rest = name.removeprefix(stem)
    parts = ADALN_PARTS if stem.startswith("adaln.") else BLOCK_PARTS
    for ours, theirs in parts.items():
        rest = rest.replace(ours, theirs, 1)
    return PREFIX + STEMS[stem] + rest.replace("log_frequency", "rope.freqs")


def _renamed(tensors: Mapping[str, Tensor], entries: Mapping[_Entry, _Entry]) -> dict[str, Tensor]:
    expected: dict[str, torch.Size] = dict(entries.keys())
    passed_on = {name: tensor for name, tensor in tensors.items() if name.startswith(VAE_PREFIX)}
    unknown = sorted(tensors.keys() - expected.keys() - passed_on.keys())
    missing = sorted(expected.keys() - tensors.keys())
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in sorted(expected.items())
        if name in tensors and tensors[name].shape != shape
    ]
    misshapen += [
        f"{name} {tensors[name].dtype} instead of float16, bfloat16 or float32"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].dtype not in _DTYPES
    ]
    if unknown or missing or misshapen:
        raise ValueError(
            "these weights do not fit the config: "
            f"unknown [{', '.join(unknown)}]; missing [{', '.join(missing)}]; misshapen [{', '.join(misshapen)}]"
        )
    return {new: tensors[old].reshape(shape) for (old, _), (new, shape) in entries.items()} | passed_on
