"""What a model is told of a picture beside its latents: where its tokens lie, its aspect, and padding of its text.

XUTConfig.position_grid says how the weights were trained. "token": as in the papers. "latent": as the public release
was, with a position of every latent pixel in units of half the longer side, the plain ratio W / H where the papers take
its logarithm, and every text padded to the full length, the padding unmasked (`trainer.model.released.load`).

Axes: B batch, N positions row by row, 4 = (x0, y0, width, height), 2 = (y, x).
"""

import torch
from torch import Tensor

from trainer.diffusion.positions import Convention, crop_position_map, full_position_map
from trainer.model.xut import XUTConfig


def convention(config: XUTConfig) -> Convention:
    return "released" if config.position_grid == "latent" else "paper"


def crop_positions(config: XUTConfig, frame_B4: Tensor, resolution: int, latents: int) -> Tensor:
    """Position map (B, N, 2) of square crops with `resolution` pixels and `latents` latent pixels along a side; frame:
    as in `loop.Inputs`."""
    x0_B, y0_B, width_B, height_B = frame_B4.unbind(1)
    grid = latents if config.position_grid == "latent" else latents // config.patch_size
    return crop_position_map(x0_B, y0_B, resolution, width_B, height_B, grid, convention(config))


def picture_positions(
    config: XUTConfig, width: int, height: int, codec_factor: int, device: torch.device | None = None
) -> Tensor:
    """Position map (N, 2) of a whole picture, for sampling. Sides in pixels, whole numbers of tokens."""
    cell = codec_factor * (1 if config.position_grid == "latent" else config.patch_size)
    return full_position_map(width, height, height // cell, width // cell, convention(config), device)


def aspect(config: XUTConfig, width_B: Tensor, height_B: Tensor) -> Tensor:
    """(B,), of the whole picture's sides."""
    ratio_B = width_B / height_B
    return ratio_B if config.position_grid == "latent" else torch.log(ratio_B)


def pads_text(config: XUTConfig) -> bool:
    """Whether padding is text like any other: see `TextEncoder.encode`."""
    return config.position_grid == "latent"
