"""A diffusers AutoencoderKL (the VAE of SD, SDXL, SD3, FLUX or EQ-SDXL-VAE) as a codec, and how it is normalised.

Axes: B batch, C latent channels, H W pixel rows and columns, h w latent rows and columns (H / factor, W / factor),
3 = red, green, blue.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from trainer.encoders.latents import check_sides

_CONFIG = "config.json"

# Pixels per encoder call: 64 pictures of 256 pixels, or 4 of 1024, which fills any GPU. SDXL's encoder has 128 channels
# at full resolution: a bfloat16 tensor takes 1 GiB, of which a residual block holds several, and has far fewer values
# than the 2^31 that many kernels can index.
_PIXELS_AT_ONCE = 1 << 22
# Attention scores per encoder call, 8 bytes each while they are normalised: 16 pictures of 512 pixels, or 1 of 1024.
_SCORES_AT_ONCE = 1 << 28


@dataclass(frozen=True)
class Statistics:
    """Normalisation of the encoder's output z by channel: latent = (z - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# Measured by HDM's authors, because the config of this VAE has only the scaling_factor of the SDXL VAE that it was
# fine-tuned from.
_EQ_SDXL_VAE = Statistics(mean=(-3.8660, -1.3354, 0.8354, 0.9099), std=(10.0365, 6.8484, 7.2138, 5.5913))


class VaeCodec(nn.Module):
    """A frozen AutoencoderKL with statistics that normalise its latents to about unit variance.

    Encodes to the mean of the posterior, whose spread is far below the noise of training. Computes in the VAE's dtype;
    latents are float32. compiled: run the encoder through torch.compile, on a GPU only, once per slice size.
    """

    mean_C11: Tensor
    std_C11: Tensor
    loss_weight_C: Tensor

    def __init__(self, name: str, vae: Any, statistics: Statistics, compiled: bool = False) -> None:
        super().__init__()
        self.name = name
        self.channels, self.factor = vae_shape(name, dict(vae.config))
        self.statistics = statistics
        self.vae = vae.to(memory_format=torch.channels_last).eval().requires_grad_(False)
        if vae.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # few shapes of convolutions, each used for the whole run
            if compiled:
                self.vae.encoder.compile(dynamic=False)
        for buffer, values in (("mean_C11", statistics.mean), ("std_C11", statistics.std)):
            self.register_buffer(buffer, torch.tensor(values, device=vae.device)[:, None, None], persistent=False)
        self.register_buffer("loss_weight_C", torch.ones(self.channels, device=vae.device), persistent=False)

    @torch.no_grad()
    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 latents (B, C, h, w). Raises ValueError unless factor divides H and W."""
        check_sides(self.name, self.factor, pixels_B3HW)
        batch, _, height, width = pixels_B3HW.shape
        pixels, scores = batch * height * width, batch * (height * width // self.factor**2) ** 2
        slices = min(batch, max(math.ceil(pixels / _PIXELS_AT_ONCE), math.ceil(scores / _SCORES_AT_ONCE)))
        z_BChw = torch.cat([self._encode(part_B3HW) for part_B3HW in pixels_B3HW.tensor_split(max(1, slices))])
        return (z_BChw - self.mean_C11) / self.std_C11

    def _encode(self, pixels_B3HW: Tensor) -> Tensor:
        x_B3HW = (pixels_B3HW.to(torch.float32) / 127.5 - 1).to(self.vae.dtype, memory_format=torch.channels_last)
        mean_BChw: Tensor = self.vae.encode(x_B3HW).latent_dist.mean
        return mean_BChw.to(torch.float32)

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> uint8 (B, 3, H, W), in one call of the decoder."""
        z_BChw = latents_BChw.to(torch.float32) * self.std_C11 + self.mean_C11
        x_B3HW: Tensor = self.vae.decode(z_BChw.to(self.vae.dtype, memory_format=torch.channels_last)).sample
        return ((x_B3HW.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def latent_statistics(name: str, config: dict[str, Any]) -> Statistics:
    """How to normalise the latents of the VAE `name` with this config.json, by the first rule that applies:

    1. The config's latents_mean and latents_std, one number per channel.
    2. HDM's numbers for EQ-SDXL-VAE, a VAE with 4 channels and factor 8. It is recognised if the hub name or the folder
       ends in EQ-SDXL-VAE (in any case), the folder lies in the hub's cache of KBlueLeaf/EQ-SDXL-VAE, or the config's
       `_name_or_path` says so. Under any other name it is treated as a VAE of SDXL, by rule 3.
    3. The config's scaling_factor and optional shift_factor: z -> (z - shift_factor) * scaling_factor.

    Raises ValueError if none applies, in which case diffusers would silently assume 0.18215.
    """
    channels, factor = vae_shape(name, config)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None or std is not None:
        if not (_numbers(mean, channels) and _numbers(std, channels) and min(std) > 0):
            raise ValueError(
                f"the codec {name!r}: latents_mean and latents_std of its {_CONFIG} must both be {channels} numbers, "
                f"one of each channel, deviations above 0; got {mean} and {std}"
            )
        return Statistics(tuple(mean), tuple(std))
    if _is_eq_sdxl_vae(name, config) and (channels, factor) == (4, 8):
        return _EQ_SDXL_VAE
    factors = [config.get("scaling_factor"), config.get("shift_factor") or 0.0]
    if not (_numbers(factors, 2) and factors[0] > 0):
        raise ValueError(
            f"the codec {name!r}: its {_CONFIG} does not say how to normalise latents (scaling_factor {factors[0]}, "
            f"shift_factor {factors[1]}); write latents_mean and latents_std, {channels} numbers each, or a "
            "scaling_factor above 0 into it"
        )
    scale, shift = factors
    return Statistics((float(shift),) * channels, (1 / scale,) * channels)


def _is_eq_sdxl_vae(name: str, config: dict[str, Any]) -> bool:
    full = Path(name).absolute() if Path(name).is_dir() else Path(name)
    parts = [part.lower() for part in full.parts]
    saved_from = Path(str(config.get("_name_or_path") or "")).name.lower()
    return "eq-sdxl-vae" in (parts[-1], saved_from) or "models--kblueleaf--eq-sdxl-vae" in parts


def _numbers(values: Any, count: int) -> TypeGuard[list[float]]:
    """True if `values` is a list of `count` finite numbers."""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def vae_shape(name: str, config: dict[str, Any]) -> tuple[int, int]:
    """Latent channels and pixels per latent side: every encoder block but the last halves the resolution.

    Raises ValueError if the config lacks them or is not for RGB pictures.
    """
    channels, blocks = config.get("latent_channels"), config.get("block_out_channels")
    if not isinstance(channels, int) or channels < 1 or not isinstance(blocks, list | tuple) or not blocks:
        raise ValueError(
            f"the codec {name!r}: its {_CONFIG} has no latent_channels and block_out_channels; it must be that of a "
            "diffusers AutoencoderKL"
        )
    colours = (config.get("in_channels", 3), config.get("out_channels", 3))
    if colours != (3, 3):
        raise ValueError(f"the codec {name!r} is for pictures of {colours[0]} channels; it needs 3: red, green, blue")
    return channels, 2 ** (len(blocks) - 1)
