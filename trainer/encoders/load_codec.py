"""A codec by its name."""

from pathlib import Path

import torch

from trainer.encoders.latents import EMBEDDED_CODECS, Codec
from trainer.encoders.vae import load_vae, vae_shape


def load_codec(
    name: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> Codec:
    """The codec `name`, on `device`: "dct", "pixel", or a folder or hub name of a diffusers AutoencoderKL.

    dtype and compiled are the VAE's (see `trainer.encoders.vae.load_vae`); the others have one matrix, in fp32. ValueError, with
    the mend, where there is no such codec or it cannot be loaded.
    """
    if name in EMBEDDED_CODECS:
        return EMBEDDED_CODECS[name]().to(device)
    _check_name(name)
    return load_vae(name, device, dtype, compiled)


def codec_shape(name: str) -> tuple[int, int]:
    """Channels and factor of `load_codec(name)`; of a VAE from its config alone. ValueError as `load_codec`."""
    if name in EMBEDDED_CODECS:
        codec = EMBEDDED_CODECS[name]()
        return codec.channels, codec.factor
    _check_name(name)
    return vae_shape(name)


def _check_name(name: str) -> None:
    """A single word that is no folder is a mistyped codec: VAEs of the hub have an owner."""
    if "/" not in name and not Path(name).is_dir():
        raise ValueError(
            f"there is no codec {name!r}; use one of: {', '.join(EMBEDDED_CODECS)}, or a folder or a name of the Hugging Face "
            "hub (such as KBlueLeaf/EQ-SDXL-VAE) that holds a diffusers AutoencoderKL"
        )
