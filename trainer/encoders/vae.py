"""A variational autoencoder of diffusers (AutoencoderKL: that of SD, SDXL, SD3, FLUX or EQ-SDXL-VAE) as a codec.

The only file that knows diffusers, which takes three seconds to import: only who loads weights pays for it.

Legend: B batch, C latent channels, H W pixel rows and columns, h w latent rows and columns (H / factor, W / factor),
3 = red, green, blue.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from trainer.encoders.latents import check_sides
from trainer.encoders.pretrained import first_line, frozen_dtype, model_folder

_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_SUBFOLDER = "vae"  # of a whole pipeline's folder
_KIND = ("codec", f"{_CONFIG} and {_WEIGHTS}", "KBlueLeaf/EQ-SDXL-VAE")

# Of one run of the encoder: 64 pictures of 256 pixels, 4 of 1024. At full resolution SDXL's encoder has 128 channels,
# 1 GiB a tensor in bf16 at this number, of which a residual block holds several; enough pixels to fill any GPU, and
# far below the 2^31 values that many kernels can count.
_PIXELS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Statistics:
    """latent = (z - mean) / std, of each channel of the encoder's z, and where the numbers come from."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str


# HDM's (arXiv report, section 4): measured for this VAE, whose config lists neither a mean nor a deviation of its
# channels, only the scaling_factor of the SDXL VAE that it was made from.
_EQ_SDXL_VAE = Statistics(
    mean=(-3.8660, -1.3354, 0.8354, 0.9099),
    std=(10.0365, 6.8484, 7.2138, 5.5913),
    source="HDM's statistics of EQ-SDXL-VAE",
)


class VaeCodec(nn.Module):
    """A frozen AutoencoderKL with the statistics that bring its latents to about unit variance.

    It encodes to the mean of the posterior, whose spread is far below the noise that the model trains on. The encoder
    and the decoder compute in the VAE's own dtype; latents are fp32. compiled: the encoder through torch.compile, on a
    GPU only; each size of slice that comes along is compiled once.
    """

    mean_C11: Tensor
    std_C11: Tensor
    loss_weight_C: Tensor

    def __init__(self, name: str, vae: Any, statistics: Statistics, compiled: bool = False) -> None:
        super().__init__()
        self.name = name
        self.channels, self.factor = _shape(name, dict(vae.config))
        self.statistics = statistics
        self.vae = vae.to(memory_format=torch.channels_last).eval().requires_grad_(False)
        if compiled and vae.device.type == "cuda":
            self.vae.encoder.compile(dynamic=False)
        for buffer, values in (("mean_C11", statistics.mean), ("std_C11", statistics.std)):
            self.register_buffer(buffer, torch.tensor(values, device=vae.device)[:, None, None], persistent=False)
        self.register_buffer("loss_weight_C", torch.ones(self.channels, device=vae.device), persistent=False)

    @torch.no_grad()
    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> fp32 latents (B, C, h, w). ValueError where H or W is no multiple of factor."""
        check_sides(self.name, self.factor, pixels_B3HW)
        batch, _, height, width = pixels_B3HW.shape
        slices = min(batch, math.ceil(batch * height * width / _PIXELS_AT_ONCE))
        z_BChw = torch.cat([self._encode(part_B3HW) for part_B3HW in pixels_B3HW.tensor_split(max(1, slices))])
        return (z_BChw - self.mean_C11) / self.std_C11

    def _encode(self, pixels_B3HW: Tensor) -> Tensor:
        x_B3HW = (pixels_B3HW.to(torch.float32) / 127.5 - 1).to(self.vae.dtype, memory_format=torch.channels_last)
        mean_BChw: Tensor = self.vae.encode(x_B3HW).latent_dist.mean
        return mean_BChw.to(torch.float32)

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> uint8 (B, 3, H, W), all at once."""
        z_BChw = latents_BChw.to(torch.float32) * self.std_C11 + self.mean_C11
        x_B3HW: Tensor = self.vae.decode(z_BChw.to(self.vae.dtype, memory_format=torch.channels_last)).sample
        return ((x_B3HW.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_vae(
    name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, compiled: bool = False
) -> VaeCodec:
    """From a folder, itself or its vae/ with config.json and diffusion_pytorch_model.safetensors, without touching the
    network; or from a name of the Hugging Face hub, downloaded once.

    dtype: None is bfloat16 on a GPU and fp32 elsewhere. Weights in safetensors only, and all of them; no code that
    comes with a model is run. See `latent_statistics` for what latents are normalised with. ValueError, with the mend,
    where any of that fails.
    """
    folder, config = _read_config(name, weights=True)
    _shape(name, config)
    statistics = latent_statistics(name, config)
    vae = _load_autoencoder(name, folder, dtype or frozen_dtype(device))
    return VaeCodec(name, vae.to(device), statistics, compiled)


def vae_shape(name: str) -> tuple[int, int]:
    """Channels and factor of `load_vae(name)`, read from its config alone."""
    return _shape(name, _read_config(name, weights=False)[1])


def latent_statistics(name: str, config: dict[str, Any]) -> Statistics:
    """What config.json says, and how the latents of the VAE `name` are normalised. The first of:

    1. latents_mean and latents_std of the config, of each channel.
    2. HDM's numbers, for EQ-SDXL-VAE: 4 channels, 8 pixels along a latent, and the last part of the hub name or of the
       folder's path is EQ-SDXL-VAE (in any case), the path lies in the hub's cache of KBlueLeaf/EQ-SDXL-VAE, or the
       config says so as `_name_or_path`. Another folder's name would make it any VAE of SDXL, which rule 3 serves.
    3. scaling_factor and, where it is given, shift_factor of the config: z -> (z - shift_factor) * scaling_factor.

    ValueError where there is none of them: diffusers would assume 0.18215 without a word.
    """
    channels, factor = _shape(name, config)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None or std is not None:
        if not (_numbers(mean, channels) and _numbers(std, channels) and min(std) > 0):
            raise ValueError(
                f"the codec {name!r}: latents_mean and latents_std of its {_CONFIG} must both be {channels} numbers, "
                f"one of each channel, deviations above 0; got {mean} and {std}"
            )
        return Statistics(tuple(mean), tuple(std), f"latents_mean and latents_std of its {_CONFIG}")
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
    source = f"scaling_factor {scale:g} and shift_factor {shift:g} of its {_CONFIG}"
    return Statistics((float(shift),) * channels, (1 / scale,) * channels, source)


def _is_eq_sdxl_vae(name: str, config: dict[str, Any]) -> bool:
    full = Path(name).absolute() if Path(name).is_dir() else Path(name)
    parts = [part.lower() for part in full.parts]
    made_from = Path(str(config.get("_name_or_path") or "")).name.lower()
    return "eq-sdxl-vae" in (parts[-1], made_from) or "models--kblueleaf--eq-sdxl-vae" in parts


def _numbers(values: Any, count: int) -> TypeGuard[list[float]]:
    """Whether they are so many finite numbers."""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def _shape(name: str, config: dict[str, Any]) -> tuple[int, int]:
    """Latent channels and pixels along the side of a latent: every block but the last one halves the picture."""
    channels, blocks = config.get("latent_channels"), config.get("block_out_channels")
    if not isinstance(channels, int) or channels < 1 or not isinstance(blocks, list | tuple) or not blocks:
        raise ValueError(
            f"the codec {name!r}: its {_CONFIG} names no latent_channels and block_out_channels; it needs that of a "
            "diffusers AutoencoderKL"
        )
    colours = (config.get("in_channels", 3), config.get("out_channels", 3))
    if colours != (3, 3):
        raise ValueError(f"the codec {name!r} is for pictures of {colours[0]} channels; it needs 3: red, green, blue")
    return channels, 2 ** (len(blocks) - 1)


def _read_config(name: str, weights: bool) -> tuple[Path, dict[str, Any]]:
    """The folder of the VAE itself and its config; of a hub name, with or without its weights."""
    files = (_CONFIG, _WEIGHTS) if weights else (_CONFIG,)
    # Only what lies at these places: a pipeline's repository also holds a denoiser of many gigabytes.
    wanted = [*files, *(f"{_SUBFOLDER}/{file}" for file in files)]
    root = model_folder(name, wanted, *_KIND)
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
            f"the codec {name!r}: its {_CONFIG} cannot be read ({first_line(error)}); get it anew"
        ) from error
    kind = config.get("_class_name", "AutoencoderKL") if isinstance(config, dict) else "nothing known"
    if kind != "AutoencoderKL":
        raise ValueError(
            f"the codec {name!r}: its {_CONFIG} is that of {kind}; it must be of a diffusers AutoencoderKL"
        )
    return folder, config


def _load_autoencoder(name: str, folder: Path, dtype: torch.dtype) -> Any:
    """On the CPU. ValueError, with the mend, for weights that are missing, damaged or of another config."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError(
            f"the codec {name!r} needs a package that is not installed ({first_line(error)}); run: "
            'pip install -c deploy/constraints.txt -e ".[trainer]"'
        ) from error
    if not (folder / _WEIGHTS).is_file():
        raise ValueError(f"the codec {name!r} has no {_WEIGHTS}, the only weights that are read; get it anew")
    try:
        # diffusers draws weights of its own first, from the global generator.
        with quiet_diffusers(), torch.random.fork_rng(devices=[]):
            vae, report = AutoencoderKL.from_pretrained(
                folder,
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    except Exception as error:  # of a dozen kinds: whatever two libraries make of files that are not what they need
        raise ValueError(
            f"the codec {name!r} cannot be loaded ({first_line(error)}); its {_CONFIG} and {_WEIGHTS} must be one "
            "whole AutoencoderKL: get both anew"
        ) from error
    if report["missing_keys"]:  # which diffusers would leave random
        raise ValueError(
            f"the codec {name!r}: {len(report['missing_keys'])} weights that its {_CONFIG} asks for are not in "
            f"{_WEIGHTS}, such as {min(report['missing_keys'])}; get both anew"
        )
    return vae


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Keeps diffusers' remarks and progress bar off the terminal: what matters comes as an exception."""
    from diffusers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
