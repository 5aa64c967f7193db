"""Loads codecs by name: "dct", "pixel", or a folder or hub name of a diffusers AutoencoderKL."""

import json
from pathlib import Path
from typing import Any

import torch

from trainer.encoders.latents import EMBEDDED_CODECS, Codec
from trainer.encoders.pretrained import first_line, frozen_dtype, pretrained_folder, quiet
from trainer.encoders.vae import VaeCodec, latent_statistics, vae_shape

_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SUBFOLDER = "vae"  # in the folder of a whole pipeline
_KIND = ("codec", f"{_CONFIG} and {_WEIGHTS}", "KBlueLeaf/EQ-SDXL-VAE")


def load_codec(name: str, device: torch.device | str = "cpu", compiled: bool = False) -> Codec:
    """The codec `name` on a device. compiled: run a VAE's encoder through torch.compile, on a GPU only.

    A folder, or its subfolder vae/, holds config.json and diffusion_pytorch_model.safetensors and needs no network; a
    hub name is downloaded once. VAEs compute in bfloat16 on a GPU and in float32 elsewhere. Only complete weights in
    safetensors are accepted, and code that comes with a model never runs.

    Raises ValueError if there is no such codec, it cannot be loaded, or `latent_statistics` finds no normalisation.
    """
    if name in EMBEDDED_CODECS:
        return EMBEDDED_CODECS[name]().to(device)
    folder, config = _read_config(name, weights=True)
    statistics = latent_statistics(name, config)
    vae = _load_autoencoder(name, folder, frozen_dtype(device)).to(device)
    if vae.device.type == "cuda":
        attend_by_matmul(vae)
    return VaeCodec(name, vae, statistics, compiled)


def attend_by_matmul(vae: Any) -> None:
    """The encoder's attention as two matrix products: its one head of 512 dims is too wide for flash attention.

    On a CPU torch's kernel is faster (by a seventh at 4,096 tokens).
    """
    from diffusers.models.attention_processor import AttnProcessor

    for attention in vae.encoder.mid_block.attentions:
        attention.set_processor(AttnProcessor())


def codec_shape(name: str) -> tuple[int, int]:
    """Latent channels and pixels per latent side of `load_codec(name)`, without loading weights. Raises as it does."""
    if name in EMBEDDED_CODECS:
        codec = EMBEDDED_CODECS[name]()
        return codec.channels, codec.factor
    return vae_shape(name, _read_config(name, weights=False)[1])


def _read_config(name: str, *, weights: bool) -> tuple[Path, dict[str, Any]]:
    """The folder of a VAE and its config. From the hub, weights are downloaded only if asked for.

    Raises ValueError if there is no such folder or its config is not that of a diffusers AutoencoderKL.
    """
    if "/" not in name and not Path(name).is_dir():  # hub names contain an owner
        raise ValueError(
            f"there is no codec {name!r}; use one of: {', '.join(EMBEDDED_CODECS)}, or a folder or Hugging Face hub "
            "name (such as KBlueLeaf/EQ-SDXL-VAE) with a diffusers AutoencoderKL"
        )
    files = (_CONFIG, _WEIGHTS) if weights else (_CONFIG,)
    # Only these paths: the repository of a pipeline also holds a denoiser of many gigabytes.
    wanted = [*files, *(f"{_SUBFOLDER}/{file}" for file in files)]
    root = pretrained_folder(name, wanted, *_KIND)
    folder = next((at for at in (root / _SUBFOLDER, root) if (at / _CONFIG).is_file()), None)
    if folder is None:
        raise ValueError(
            f"the codec {name!r} has no {_CONFIG}, nor {_SUBFOLDER}/{_CONFIG}: save one with diffusers' "
            "AutoencoderKL.save_pretrained"
        )
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the codec {name!r}: its {_CONFIG} cannot be read ({first_line(error)}). Download it again"
        ) from error
    kind = config.get("_class_name", "AutoencoderKL") if isinstance(config, dict) else "something else"
    if kind != "AutoencoderKL":
        raise ValueError(f"the codec {name!r}: its {_CONFIG} is that of {kind}, not of a diffusers AutoencoderKL")
    return folder, config


def _load_autoencoder(name: str, folder: Path, dtype: torch.dtype) -> Any:
    """The VAE, on the CPU. Raises ValueError if its weights are missing, damaged or do not match its config."""
    try:
        from diffusers import AutoencoderKL  # lazy: takes three seconds
    except ImportError as error:
        raise ValueError(
            f"the codec {name!r} needs a package that is not installed ({first_line(error)}); run: "
            'pip install -c deploy/constraints.txt -e ".[trainer]"'
        ) from error
    if not (folder / _WEIGHTS).is_file():
        raise ValueError(f"the codec {name!r} has no {_WEIGHTS}, the only weights that are read. Download it again")
    try:
        # diffusers first initialises from the global generator.
        with quiet("diffusers"), torch.random.fork_rng(devices=[]):
            vae, report = AutoencoderKL.from_pretrained(
                folder,
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except Exception as error:  # diffusers and safetensors raise many types for damaged files
        raise ValueError(
            f"the codec {name!r} cannot be loaded ({first_line(error)}); its {_CONFIG} and {_WEIGHTS} must be one "
            "whole AutoencoderKL. Download both again"
        ) from error
    if report["missing_keys"]:  # diffusers would initialise these randomly
        raise ValueError(
            f"the codec {name!r}: {len(report['missing_keys'])} weights that its {_CONFIG} needs are not in "
            f"{_WEIGHTS}, such as {min(report['missing_keys'])}. Download both again"
        )
    return vae
