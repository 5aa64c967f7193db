"""The inputs of a model besides latents and text: positions, aspect ratio, and how text is padded.

`XUTConfig.position_grid` says which convention the weights were trained with. "token" is the papers'. "latent" is the
public release's: positions of latent pixels in units of half the longer side, the aspect ratio without a logarithm, and
text padded to its full length without a mask.

Axes: B batch, N positions row by row, 4 = (x0, y0, width, height), 2 = (y, x).
"""

import torch
from torch import Tensor

from trainer.diffusion.positions import Convention, crop_position_map, full_position_map
from trainer.model.config import XUTConfig

_CONVENTIONS: dict[str, Convention] = {"token": "paper", "latent": "released"}  # by XUTConfig.position_grid


def crop_positions(config: XUTConfig, frame_B4: Tensor, resolution: int, latents: int) -> Tensor:
    """Position map (B, N, 2) of square crops, with `resolution` pixels and `latents` latent pixels per side.

    frame_B4: the crop's corner and the size of the resized picture, in pixels (`TrainingInputs` in training/loop.py).
    """
    x0_B, y0_B, width_B, height_B = frame_B4.unbind(1)
    grid = latents if config.position_grid == "latent" else latents // config.patch_size
    return crop_position_map(x0_B, y0_B, resolution, width_B, height_B, grid, _CONVENTIONS[config.position_grid])


def picture_positions(
    config: XUTConfig, width: int, height: int, codec_factor: int, device: torch.device | None = None
) -> Tensor:
    """Position map (N, 2) of a whole picture, for sampling. width, height: in pixels, multiples of a token's side."""
    cell = codec_factor * (1 if config.position_grid == "latent" else config.patch_size)
    return full_position_map(width, height, height // cell, width // cell, _CONVENTIONS[config.position_grid], device)


def aspect(config: XUTConfig, width_B: Tensor, height_B: Tensor) -> Tensor:
    """The aspect ratio (B,) of whole pictures, width / height, as a logarithm unless the model is a released one."""
    ratio_B = width_B / height_B
    return ratio_B if config.position_grid == "latent" else torch.log(ratio_B)


def pads_text(config: XUTConfig) -> bool:
    """True if the model attends to padding like to text: see `TextEncoder.encode`."""
    return config.position_grid == "latent"
