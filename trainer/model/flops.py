"""Floating-point operations of XUT's matrix products, in closed form.

A product of (m, k) and (k, n) takes 2 m k n operations. Norms, rotations, softmax and the optimizer are left out: on a
GPU they are limited by bandwidth. A backward pass has two products for each one of the forward pass, but only one for a
layer whose input needs no gradient.

Letters as in xut.py: N image tokens, T text tokens, S = N + T, D width, V values of a patch.
"""

from typing import NamedTuple

from trainer.model.config import XUTConfig
from trainer.model.routing import kept_image_tokens
from trainer.model.xut import POSITION_WAVES


class Flops(NamedTuple):
    """Operations of one sample's forward pass."""

    hidden: int  # in layers whose input needs a gradient
    inputs: int  # in layers whose input is data

    @property
    def forward(self) -> int:
        return self.hidden + self.inputs

    @property
    def step(self) -> int:
        """Forward and backward, without recomputation."""
        return 3 * self.hidden + 2 * self.inputs

    @property
    def frozen_step(self) -> int:
        """Forward and backward when only adapters train: one product backwards.

        Slightly too low, because it leaves out the second product of attention and the adapters' own.
        """
        return 2 * self.hidden + self.inputs


def count_flops(config: XUTConfig, image_tokens: int, text_tokens: int, selection_rate: float = 0.0) -> Flops:
    """Operations for one sample of N image and T text tokens; equal to the count of `torch.utils.flop_counter`."""
    dim, depth = config.dim, config.depth
    dense = image_tokens + text_tokens
    routed = kept_image_tokens(image_tokens, selection_rate) + text_tokens
    blocks = (config.prev_blocks + config.post_blocks) * _block(config, dense)
    blocks += depth * (config.enc_blocks + config.dec_blocks) * _block(config, routed)
    if config.skip == "cross":
        blocks += depth * _attention(dim, routed)
    elif config.skip == "concat":
        blocks += depth * 2 * routed * 2 * dim * dim

    patch_values = config.in_channels * config.patch_size**2
    inputs = 2 * image_tokens * patch_values * dim + 2 * text_tokens * config.text_dim * dim
    inputs += 2 * dim * dim + 2 * dim  # time, aspect
    if config.absolute_position == "waves":
        inputs += 2 * image_tokens * POSITION_WAVES * dim
    return Flops(blocks + _condition(config) + 2 * image_tokens * dim * patch_values, inputs)


def _block(config: XUTConfig, tokens: int) -> int:
    return _attention(config.dim, tokens) + 2 * tokens * 3 * config.dim * config.mlp_dim


def _attention(dim: int, tokens: int) -> int:
    """Projections to queries, keys, values and output, and the two products of every token with every token."""
    return 2 * tokens * 4 * dim * dim + 2 * 2 * tokens * tokens * dim


def _condition(config: XUTConfig) -> int:
    """The second layer of the aspect and adaLN, which run once per sample."""
    dim = config.dim
    if config.adaln == "shared":
        kinds = 3 if config.skip == "cross" else 2
        adaln = kinds * (2 * dim * 4 * dim + 2 * 4 * dim * 3 * dim)
    else:
        blocks = config.prev_blocks + config.post_blocks + config.depth * (config.enc_blocks + config.dec_blocks)
        branches = 2 * blocks + (config.depth if config.skip == "cross" else 0)
        adaln = branches * 2 * dim * 3 * dim
    return 2 * dim * dim + adaln
