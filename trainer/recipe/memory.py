"""Estimates the GPU memory of one training worker in closed form, and refuses large models without a GPU."""

from functools import lru_cache

import torch

from pipeline.core.errors import UsageError
from trainer.model.config import XUTConfig
from trainer.model.routing import kept_image_tokens
from trainer.model.xut import XUT
from trainer.recipe.stages import StageConfig
from trainer.recipe.training import Training

_BYTES_PER_PARAMETER = 20  # fp32: weight, gradient, AdamW's two moments, EMA
_BYTES_FROZEN = 4  # weight only
# Frozen encoders in bfloat16 (Qwen3-0.6B: 1.2 GB, VAE: 0.2 GB) and the CUDA context.
_OVERHEAD = 3_000_000_000
# Models up to this size train on a CPU. Counted, because a model folder has no preset name.
_CPU_MILLIONS = 20


@lru_cache
def parameters(config: XUTConfig) -> int:
    """Parameters of the whole model, counted without allocating it."""
    with torch.device("meta"):
        model = XUT(config)
    return sum(parameter.numel() for parameter in model.parameters())


def activation_bytes(config: XUTConfig, stage: StageConfig, codec_factor: int) -> int:
    """Bytes that one sample with the longest text keeps from its forward to its backward pass.

    Per token a block keeps 8 values of the model's width (two streams, the results of two branches, queries, keys,
    values, attention output) and 2 of the feed-forward's. A recomputed block keeps its input only, and one such block
    is complete at a time. This holds for bfloat16 and a compiled model; otherwise it is 4 times as much, measured with
    a dense fp32 step at 512 pixels (tests/bench/RESULTS.md: 8.3 GiB for one sample with weights, gradients and
    moments, 7.5 by this formula).
    """
    image_tokens = (stage.resolution // codec_factor // config.patch_size) ** 2
    dense_tokens = image_tokens + stage.text_tokens
    routed_tokens = kept_image_tokens(image_tokens, stage.selection_rate) + stage.text_tokens
    dense_blocks = config.prev_blocks + config.post_blocks
    routed_blocks = config.depth * (config.enc_blocks + config.dec_blocks)
    tokens = dense_blocks * dense_tokens + routed_blocks * routed_tokens
    values = 8 * config.dim + 2 * config.mlp_dim
    recomputed = {"none": 0.0, "blocks": 0.5, "all": 1.0}[stage.checkpointing]
    kept = (1 - recomputed) * tokens * values + recomputed * tokens * config.dim
    kept += dense_tokens * values if recomputed else 0
    return round(2 * kept * (1 if stage.compiled and stage.precision == "bf16" else 4))


def training_bytes(
    config: XUTConfig, stage: StageConfig, micro_batch: int, codec_factor: int, frozen: bool = False
) -> int:
    """20 bytes per parameter, the activations of one micro batch, and 3 GB for frozen encoders and CUDA.

    With `frozen`, 4 bytes per parameter. The adapters trained on a frozen model add about a hundredth and are ignored.
    """
    return (
        (_BYTES_FROZEN if frozen else _BYTES_PER_PARAMETER) * parameters(config)
        + micro_batch * activation_bytes(config, stage, codec_factor)
        + _OVERHEAD
    )


def check_device(training: Training, gpus: int) -> None:
    """UsageError for a model too large for a CPU if there is no GPU. It says how much memory the stage needs."""
    millions = parameters(training.model) / 1e6
    if gpus or millions < _CPU_MILLIONS:
        return
    stage, factor, frozen = training.stage, training.codec_factor, training.lora is not None
    needed = training_bytes(training.model, stage, training.micro_batch, factor, frozen) / 1e9
    sample = activation_bytes(training.model, stage, factor) / 1e6
    raise UsageError(
        f"there is no GPU, and stage {training.stage_name} trains {'adapters on ' if frozen else ''}{millions:.0f}M "
        f"parameters, for which each worker needs a GPU with about {needed:.0f} GB ({4 if frozen else 20} bytes a "
        f"parameter + {training.micro_batch} samples of {sample:.0f} MB + 3 GB); less with --set "
        f"micro_batch={max(1, training.micro_batch // 4)}. To try the stage on this machine: --set model=tiny --set "
        "codec=dct --set text_encoder=local --set batch_size=8 --steps 10, and --run with another folder"
    )
