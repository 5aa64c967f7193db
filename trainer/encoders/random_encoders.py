"""Randomly initialised encoders with the shapes of the recipe's: as slow as the real ones, without a download."""

import tempfile
from pathlib import Path

import torch

from trainer.encoders.pretrained import quiet
from trainer.encoders.text import TextEncoder, build_local_text_encoder, load_text_encoder
from trainer.encoders.vae import Statistics, VaeCodec

WORDS = "one word after another "


def qwen3_600m(device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """Qwen3-0.6B with a small tokenizer, for which each word of WORDS is one token."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    )
    with torch.device(device), quiet("transformers"):
        model = Qwen3Model(config).to(device, dtype)
    return TextEncoder(model, local_text_encoder(torch.device("cpu")).tokenizer)


def local_text_encoder(device: torch.device) -> TextEncoder:
    """The embedded text encoder, built from WORDS."""
    with tempfile.TemporaryDirectory() as folder:
        build_local_text_encoder([WORDS], Path(folder) / "encoder", seed=0)
        return load_text_encoder(Path(folder) / "encoder", device)


def sdxl_vae(device: torch.device, dtype: torch.dtype, compiled: bool) -> VaeCodec:
    """SDXL's image encoder and decoder; latents are not normalised, which a measurement of time does not need."""
    from diffusers import AutoencoderKL

    with torch.device(device):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
    statistics = Statistics(mean=(0.0,) * 4, std=(1.0,) * 4)
    return VaeCodec("SDXL's shape", vae.to(device, dtype), statistics, compiled)
