"""XUT, the cross-U-transformer of homemade-diffusion, as a diffusers model.

Axes: B batch, C latent channels, H W latent rows and columns, N image tokens, T text tokens, 2 = (y, x).
"""

from collections.abc import Callable
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from trainer.exporting.exported.constants import constants_kept, kept_in_fp32
from trainer.model.config import XUTConfig
from trainer.model.xut import XUT


class HDMTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """`architecture`: the fields of XUTConfig."""

    _keep_in_fp32_modules = kept_in_fp32("frequency", "text_standard")

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, architecture: dict[str, Any]) -> None:
        super().__init__()
        self.xut = XUT(XUTConfig.from_dict(architecture))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        position_map: Tensor,
        aspect: Tensor,
        selection_rate: float = 0.0,
        routing_key: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, C, H, W) for latents of that shape at timestep (B,), from 1 (noise) to 0.

        encoder_hidden_states (B, T, width) with mask (B, T); position_map (B, N, 2); aspect (B,): log(width / height).
        selection_rate: share of the image tokens that skip the middle blocks, chosen by routing_key (B,), int64.
        """
        velocity: Tensor = self.xut(
            hidden_states,
            timestep,
            text=encoder_hidden_states,
            text_mask=encoder_attention_mask,
            position_map=position_map,
            aspect=aspect,
            selection_rate=selection_rate,
            routing_key=routing_key,
        )
        return velocity

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HDMTransformer":
        with constants_kept(self):
            super()._apply(fn, recurse)
        return self
