"""How much arithmetic a pass of XUT takes, in closed form: floating-point operations of its matrix products.

A product of (m, k) and (k, n) is 2 m k n operations. Norms, rotations, softmax and the optimizer are left out: on a GPU
they are bandwidth, not arithmetic. A backward pass has two products for each of the forward pass, but one for a layer
whose input needs no gradient.

Letters as in xut.py: N image tokens, T text tokens, S = N + T, D width, V values of a patch.
"""

from typing import NamedTuple

from trainer.model.config import XUTConfig
from trainer.model.routing import kept_image_tokens
from trainer.model.xut import POSITION_WAVES


class Products(NamedTuple):
    """Operations of one sample's forward pass."""

    tokens: int  # whose inputs need a gradient
    inputs: int  # whose inputs are data

    @property
    def forward(self) -> int:
        return self.tokens + self.inputs

    @property
    def step(self) -> int:
        """Forward and backward, nothing recomputed."""
        return 3 * self.tokens + 2 * self.inputs

    @property
    def frozen_step(self) -> int:
        """The same where adapters on frozen weights learn: one product backwards. A little less than it is: attention's
        second product, and the adapters' own, are left out."""
        return 2 * self.tokens + self.inputs


def products(config: XUTConfig, image_tokens: int, text_tokens: int, selection_rate: float = 0.0) -> Products:
    """Of a forward pass on one sample; exact, as `torch.utils.flop_counter` counts it (a test compares the two)."""
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
    return Products(blocks + _condition(config) + 2 * image_tokens * dim * patch_values, inputs)


def _block(config: XUTConfig, tokens: int) -> int:
    return _attention(config.dim, tokens) + 2 * tokens * 3 * config.dim * config.mlp_dim


def _attention(dim: int, tokens: int) -> int:
    """Queries, keys, values and output; every token with every token, twice."""
    return 2 * tokens * 4 * dim * dim + 2 * 2 * tokens * tokens * dim


def _condition(config: XUTConfig) -> int:
    """Once a sample: the second layer of the aspect, and adaLN."""
    dim = config.dim
    if config.adaln == "shared":
        kinds = 3 if config.skip == "cross" else 2
        adaln = kinds * (2 * dim * 4 * dim + 2 * 4 * dim * 3 * dim)
    else:
        blocks = config.prev_blocks + config.post_blocks + config.depth * (config.enc_blocks + config.dec_blocks)
        branches = 2 * blocks + (config.depth if config.skip == "cross" else 0)
        adaln = branches * 2 * dim * 3 * dim
    return 2 * dim * dim + adaln
