"""Estimates the GPU memory of one training worker in closed form, and refuses large models without a GPU."""

from functools import lru_cache
from typing import NamedTuple

import torch

from pipeline.core.errors import UsageError
from trainer.diffusion.repa import projector_parameters
from trainer.encoders.latents import EMBEDDED_CODECS
from trainer.encoders.pretrained import cached_folder
from trainer.encoders.vision import vision_parameters, vision_shape
from trainer.model.config import XUTConfig
from trainer.model.routing import kept_image_tokens
from trainer.model.xut import XUT, Checkpointing
from trainer.recipe.stages import StageConfig
from trainer.recipe.training import Training

_BYTES_PER_PARAMETER = 20  # fp32: weight, gradient, AdamW's two moments, EMA
_BYTES_PER_LENGTH = 4  # each power-function average, fp32
_BYTES_CAST = 2  # bfloat16 copy of a weight, from its use in the forward pass to the end of the backward pass
_BYTES_FROZEN = 4  # weight only
_BYTES_PROJECTOR = 18  # fp32: weight, gradient, two moments; bfloat16 copy
_BYTES_VISION = 2  # bfloat16
# Frozen encoders in bfloat16 (Qwen3-0.6B: 1.2 GB, VAE: 0.2 GB), the CUDA context, and fragmentation.
_OVERHEAD = 3_000_000_000
_TYPICAL_FEATURES = 1024  # of a vision model that is not on this machine: ViT-L's
# The VAE's first level keeps about four tensors of 128 channels at once, in bfloat16.
_VAE_BYTES_PER_PIXEL = 4 * 128 * 2
RECOMPUTED: dict[Checkpointing, float] = {"none": 0.0, "blocks": 0.5, "all": 1.0}  # share of the blocks
MARGIN = 0.08  # of a GPU's memory that is left free: for fragmentation, and for evaluations
_ENOUGH_TOKENS = 2048  # of a micro batch: with more a GPU is hardly faster, so that fewer are no reason to recompute
_LARGEST_MICRO_BATCH = 128  # the report's
# Models up to this size train on a CPU. Counted, because a model folder has no preset name.
_CPU_MILLIONS = 20


@lru_cache
def parameters(config: XUTConfig) -> int:
    """Parameters of the whole model, counted without allocating it."""
    with torch.device("meta"):
        model = XUT(config)
    return sum(parameter.numel() for parameter in model.parameters())


class Kept(NamedTuple):
    """Values that a block keeps per token from its forward to its backward pass, and their bytes."""

    bytes: int
    dim: int  # times the model's width
    mlp: int  # times the feed-forward's hidden width
    cross: int  # times the model's width, of a cross-attention branch


# By (compiled, precision). Counted with torch.autograd.graph.saved_tensors_hooks, as the tests do. Compiled, with
# AOTAutograd's partitioner: 2 residual streams, 2 modulated norms, 2 results of branches, the projection to queries,
# keys and values (3), rotated queries and keys, and the attention's output are 12 times the width; both halves of the
# feed-forward and their product are 3 times its width. Cross-attention adds stream, norms of both inputs, keys and
# values (2), rotated queries and keys, output and result: 9. Without compilation more is kept, some of it in float32,
# which counts twice.
KEPT = {
    (True, "bf16"): Kept(2, 12, 3, 9),
    (True, "fp32"): Kept(4, 12, 3, 9),
    (False, "bf16"): Kept(2, 20, 4, 17),
    (False, "fp32"): Kept(4, 14, 4, 11),
}


def activation_bytes(
    config: XUTConfig, stage: StageConfig, codec_factor: int, checkpointing: Checkpointing = "none"
) -> int:
    """Bytes that one sample with the longest text keeps from its forward to its backward pass.

    A recomputed block keeps its input only, and one such block is complete at a time.
    """
    kept = KEPT[stage.compiled, stage.precision]
    image_tokens = (stage.resolution // codec_factor // config.patch_size) ** 2
    dense_tokens = image_tokens + stage.text_tokens
    routed_tokens = kept_image_tokens(image_tokens, stage.selection_rate) + stage.text_tokens
    dense_blocks = config.prev_blocks + config.post_blocks
    routed_blocks = config.depth * (config.enc_blocks + config.dec_blocks)
    tokens = dense_blocks * dense_tokens + routed_blocks * routed_tokens
    per_token = kept.dim * config.dim + kept.mlp * config.mlp_dim
    cross = kept.cross * config.dim if config.skip == "cross" else 0
    complete = tokens * per_token + config.depth * routed_tokens * cross
    share = RECOMPUTED[checkpointing]
    values = (1 - share) * complete + share * tokens * config.dim
    values += max(dense_tokens * per_token, routed_tokens * (per_token + cross)) if share else 0
    return round(kept.bytes * values)


def training_bytes(
    config: XUTConfig,
    stage: StageConfig,
    micro_batch: int,
    codec_factor: int,
    frozen: bool = False,
    checkpointing: Checkpointing = "none",
) -> int:
    """Peak memory of a worker: weights with gradients, moments and averages, a micro batch, and 3 GB for the rest.

    A micro batch takes its activations or, if that is more, the VAE's, which encodes it before. With `frozen`, 4 bytes
    per parameter; the adapters trained on a frozen model add about a hundredth and are ignored.
    """
    averages = _BYTES_PER_LENGTH * len(stage.ema_lengths) if stage.ema_snapshots else 0
    per_parameter = _BYTES_FROZEN if frozen else _BYTES_PER_PARAMETER + averages
    per_parameter += _BYTES_CAST if stage.precision == "bf16" else 0
    encoding = _VAE_BYTES_PER_PIXEL * stage.resolution**2 if stage.codec not in EMBEDDED_CODECS else 0
    alignment, per_sample = repa_bytes(config, stage, codec_factor)
    sample = max(activation_bytes(config, stage, codec_factor, checkpointing) + per_sample, encoding)
    return per_parameter * parameters(config) + alignment + micro_batch * sample + _OVERHEAD


def repa_bytes(config: XUTConfig, stage: StageConfig, codec_factor: int) -> tuple[int, int]:
    """Bytes of the alignment with a vision model: of that model and the projector, and of each sample.

    Those of a sample are its features, and what the projector keeps of all its tokens. The vision model's own
    activations are freed before the forward pass and smaller. Zeros if the stage has none.
    """
    repa = stage.repa
    if repa.features is None:
        return 0, 0
    width = vision_shape(repa.features).width if cached_folder(repa.features) else _TYPICAL_FEATURES
    fixed = _BYTES_VISION * vision_parameters(repa.features)
    fixed += _BYTES_PROJECTOR * projector_parameters(config.dim, repa.width, width)
    image_tokens = (stage.resolution // codec_factor // config.patch_size) ** 2
    kept = KEPT[stage.compiled, stage.precision].bytes
    # Input, both hidden layers before and after SiLU, and the output, also in float32 beside the features.
    return fixed, image_tokens * (kept * (config.dim + 4 * repa.width + width) + 2 * 4 * width)


class Fit(NamedTuple):
    micro_batch: int
    checkpointing: Checkpointing


def micro_batches(stage: StageConfig, workers: int) -> list[int]:
    """The micro batches that are possible: divisors of a worker's share of the batch, largest first."""
    share = stage.batch_size // workers
    largest = _LARGEST_MICRO_BATCH if stage.micro_batch == "auto" else stage.micro_batch
    return [size for size in range(min(share, largest), 0, -1) if share % size == 0]


def fitting(
    config: XUTConfig, stage: StageConfig, workers: int, codec_factor: int, available: float, frozen: bool = False
) -> Fit | None:
    """The micro batch and the recomputation that the estimate expects to fit `available` bytes; None if none does.

    What the stage sets is kept. Less recomputation comes first if it leaves room for enough tokens; a fraction of a
    block's time is lost by recomputing it, but hardly any by a smaller micro batch.
    """
    tokens = (stage.resolution // codec_factor // config.patch_size) ** 2 + stage.text_tokens
    kinds: list[Checkpointing] = list(RECOMPUTED) if stage.checkpointing == "auto" else [stage.checkpointing]
    sizes, best = micro_batches(stage, workers), None
    for kind in kinds:
        room = available * (1 - MARGIN)
        size = next((s for s in sizes if training_bytes(config, stage, s, codec_factor, frozen, kind) <= room), 0)
        if size and (size == sizes[0] or size * tokens >= _ENOUGH_TOKENS):
            return Fit(size, kind)
        if size and (best is None or size > best.micro_batch):
            best = Fit(size, kind)
    return best


def check_device(training: Training, gpus: int) -> None:
    """UsageError for float8, or a model too large for a CPU, if there is no GPU. It says how much memory it needs."""
    if training.stage.fp8 and not gpus:
        raise UsageError("fp8=true needs a GPU of compute capability 8.9 or higher, and there is none: set fp8=false")
    millions = parameters(training.model) / 1e6
    if gpus or millions < _CPU_MILLIONS:
        return
    stage, factor, frozen = training.stage, training.codec_factor, training.lora is not None
    needed = training_bytes(training.model, stage, 1, factor, frozen, "all") / 1e9
    what = f"{'adapters on ' if frozen else ''}{millions:.0f}M parameters"
    raise UsageError(
        f"there is no GPU, and stage {training.stage_name} trains {what}, for which each worker needs a GPU with at "
        f"least about {needed:.0f} GB. To try the stage on this machine: --set model=tiny --set codec=dct --set "
        "text_encoder=local --set batch_size=8 --steps 10, and --run with another folder"
    )
