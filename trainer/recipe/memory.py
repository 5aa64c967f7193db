"""About how much GPU memory one training worker needs, in closed form."""

from functools import lru_cache

import torch

from trainer.model.routing import kept_image_tokens
from trainer.model.xut import XUT, XUTConfig
from trainer.recipe.stages import StageConfig

_BYTES_PER_PARAMETER = 20  # fp32: the weight, its gradient, AdamW's two moments, its moving average
_BYTES_FROZEN = 4  # the weight
# Frozen encoders in bfloat16 (Qwen3-0.6B: 1.2 GB, the image encoder: 0.2 GB) and CUDA itself.
_BESIDES = 3_000_000_000


@lru_cache
def parameters(config: XUTConfig) -> int:
    """Of the whole model; nothing is allocated."""
    with torch.device("meta"):
        model = XUT(config)
    return sum(parameter.numel() for parameter in model.parameters())


def activation_bytes(config: XUTConfig, stage: StageConfig, codec_factor: int) -> int:
    """Of one sample with the longest text, between a forward pass and its backward pass.

    A block keeps 8 values of the model's width a token (two streams, two branches' results, queries, keys, values and
    what attention gives) and 2 of the feed-forward's; one that is computed again keeps its input, and one at a time is
    whole. So in bfloat16 and compiled; else four times as much, which is what a dense fp32 step at 512 pixels took
    (tests/bench/RESULTS.md: 8.3 GiB for one sample with weights, gradients and moments; by this formula 7.5).
    """
    image_tokens = (stage.resolution // codec_factor // config.patch_size) ** 2
    dense_tokens = image_tokens + stage.text_tokens
    routed_tokens = kept_image_tokens(image_tokens, stage.selection_rate) + stage.text_tokens
    dense_blocks = config.prev_blocks + config.post_blocks
    routed_blocks = config.depth * (config.enc_blocks + config.dec_blocks)
    tokens = dense_blocks * dense_tokens + routed_blocks * routed_tokens
    values = 8 * config.dim + 2 * config.mlp_dim
    again = {"none": 0.0, "blocks": 0.5, "all": 1.0}[stage.checkpointing]
    kept = (1 - again) * tokens * values + again * tokens * config.dim + (dense_tokens * values if again else 0)
    return round(2 * kept * (1 if stage.compiled and stage.precision == "bf16" else 4))


def training_bytes(
    config: XUTConfig, stage: StageConfig, micro_batch: int, codec_factor: int, frozen: bool = False
) -> int:
    """20 bytes a parameter + the activations of one micro batch + 3 GB for the frozen encoders and CUDA.

    frozen: 4 bytes a parameter; the adapters on it are left out, a hundredth of that.
    """
    return (
        (_BYTES_FROZEN if frozen else _BYTES_PER_PARAMETER) * parameters(config)
        + micro_batch * activation_bytes(config, stage, codec_factor)
        + _BESIDES
    )
