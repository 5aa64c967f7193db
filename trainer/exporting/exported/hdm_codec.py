"""The codec of a homemade-diffusion model without an autoencoder: blocks of pixels times one orthonormal matrix.

It has the part of AutoencoderKL's interface that a pipeline uses.

Axes: B batch, H W pixel rows and columns, h w latent rows and columns, C latent channels, P values of a pixel block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from trainer.exporting.exported.constants import constants_kept, kept_in_fp32


@dataclass(frozen=True)
class DeterministicDistribution:
    """Like DiagonalGaussianDistribution of diffusers, without variance."""

    mean: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.mean

    def mode(self) -> Tensor:
        return self.mean


@dataclass(frozen=True)
class HDMCodecOutput:
    latent_dist: DeterministicDistribution


class HDMCodec(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """latents_mean, latents_std: per channel; the diffusion model's latents are (encoded - mean) / std, as for an
    AutoencoderKL. block_out_channels: one more entry than the side of a block, in pixels, can be halved."""

    _keep_in_fp32_modules = kept_in_fp32("basis_CP")
    basis_CP: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latent_channels: int,
        block_out_channels: list[int],
        latents_mean: list[float],
        latents_std: list[float],
        in_channels: int = 3,
        out_channels: int = 3,
        scaling_factor: float = 1.0,
        force_upcast: bool = True,
    ) -> None:
        super().__init__()
        self.factor = 2 ** (len(block_out_channels) - 1)
        self.register_buffer(
            "basis_CP", torch.zeros(latent_channels, in_channels * self.factor**2, dtype=torch.float32)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HDMCodec":
        with constants_kept(self):
            super()._apply(fn, recurse)
        return self

    def encode(self, x: Tensor) -> HDMCodecOutput:
        """Pixels (B, 3, H, W) in [-1, 1] -> (B, C, h, w)."""
        blocks_BPhw = F.pixel_unshuffle(x, self.factor)
        return HDMCodecOutput(DeterministicDistribution(torch.einsum("cp,bphw->bchw", self.basis_CP, blocks_BPhw)))

    def decode(self, z: Tensor) -> DecoderOutput:
        """(B, C, h, w) -> pixels (B, 3, H, W), about in [-1, 1]."""
        return DecoderOutput(sample=F.pixel_shuffle(torch.einsum("cp,bchw->bphw", self.basis_CP, z), self.factor))
