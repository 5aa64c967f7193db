"""A stage as it is to be trained: what --set and the dataset make of the recipe, and its arithmetic per sample."""

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UsageError
from trainer.cost.dataset import selected_stages, selection_of, text_lengths
from trainer.cost.machines import PAPERS
from trainer.encoders.load_codec import codec_shape
from trainer.encoders.pretrained import cached_folder
from trainer.encoders.vision import vision_shape
from trainer.model.config import XUTConfig
from trainer.model.flops import count_flops
from trainer.model.xut import Checkpointing
from trainer.recipe import overrides
from trainer.recipe.memory import RECOMPUTED, Fit
from trainer.recipe.stage_config import PRESETS, check_grid, micro_batch, stage_config, total_steps
from trainer.recipe.stages import STAGES, StageConfig

# Multiplications and additions of SDXL's image encoder per pixel, and of its one attention layer over blocks of 64
# pixels (4 n^2 512 operations). Within 0.01% of torch.utils.flop_counter at 256, 512 and 1024 pixels.
_VAE_PER_PIXEL, _VAE_PER_SQUARED_PIXELS = 4_128_642, 0.5
# Qwen3-0.6B without its vocabulary, and the attention of its 28 layers with 16 heads of 128; also as counted.
_QWEN_PER_TOKEN, _QWEN_PER_SQUARED_TOKENS = 880_803_840, 28 * 4 * 16 * 128
EMBEDDED_CODECS, EMBEDDED_ENCODER = ("dct", "pixel"), "local"  # their arithmetic is negligible
# Micro batch and recomputation of the papers, whose speeds are scaled; run.py takes what fits the GPU, and is faster.
_PAPERS_FIT = {"256": Fit(128, "none"), "512": Fit(64, "all"), "768": Fit(64, "all"), "1024": Fit(16, "all")}
_OTHER_FIT = Fit(32, "none")
# Shape of the recipe's VAE, which need not be here; width of the local text encoder, which takes seconds to import.
_VAE_SHAPE, _LOCAL_TEXT_WIDTH = (4, 8), 128


@dataclass(frozen=True)
class StageSetup:
    name: str
    stage: StageConfig
    micro_batch: int
    checkpointing: Checkpointing
    model: XUTConfig
    codec_factor: int  # pixels along the side of a latent
    text_tokens: int  # of a padded text, averaged over the micro batches
    text_source: str  # how the text lengths are known
    settings: Mapping[str, str]  # fields that --set changes

    @property
    def total_operations(self) -> float:
        """Floating-point operations of matrix products and convolutions for one training sample."""
        return sum(self.operations(self.checkpointing).values())

    def operations(self, checkpointing: Checkpointing) -> dict[str, float]:
        """Operations for one training sample by part. Encoders that are not embedded count as SDXL's VAE and
        Qwen3-0.6B."""
        stage, tokens, pixels = self.stage, self.text_tokens, self.stage.resolution**2
        image_tokens = (stage.resolution // self.codec_factor // self.model.patch_size) ** 2
        step = count_flops(self.model, image_tokens, tokens, stage.selection_rate)
        found = {"model": step.step + RECOMPUTED[checkpointing] * step.hidden, "VAE": 0.0, "text encoder": 0.0}
        if stage.codec not in EMBEDDED_CODECS:
            found["VAE"] = _VAE_PER_PIXEL * pixels + _VAE_PER_SQUARED_PIXELS * pixels**2
        if stage.text_encoder != EMBEDDED_ENCODER:
            found["text encoder"] = _QWEN_PER_TOKEN * tokens + _QWEN_PER_SQUARED_TOKENS * tokens**2
        return found


def planned_stages(job: Namespace) -> list[str]:
    """Names of the stages to plan, in training order; of a dataset's stages, those whose speed is known or measured."""
    asked = job.stages or list(PAPERS["stages"])
    if job.stages is None and job.dataset is not None:
        found = selected_stages(job.dataset)
        asked = [n for n in found if job.measure or n in {*PAPERS["stages"], *job.images_per_second}] or found
    fields = [head for head in (setting.partition(".")[0] for setting in job.settings) if head in STAGES]
    speeds = job.images_per_second
    for flag, names in (("stages", asked), ("images", job.images), ("images-per-second", speeds), ("set", fields)):
        for name in names:
            if name not in STAGES:
                raise UsageError(f"--{flag}: there is no stage {name!r}; stages: {', '.join(STAGES)}")
            if name not in asked:
                raise UsageError(f"--{flag} {name}: not planned; give --stages {' '.join([*asked, name])}")
    return [name for name in STAGES if name in asked]


def stage_setups(job: Namespace, names: Sequence[str], gpus: int) -> list[StageSetup]:
    """Raises UsageError for everything that trainer/run.py would refuse."""
    setups = []
    for name in names:  # --set 512.samples=1000000 belongs to one stage, --set samples=1000000 to all
        own = [s.removeprefix(f"{name}.") for s in job.settings if s.partition(".")[0] not in {*STAGES} - {name}]
        setups.append(stage_setup(name, overrides.parse(own), gpus, job.dataset))
    return setups


def stage_setup(name: str, settings: Mapping[str, str], gpus: int, root: str | None = None) -> StageSetup:
    """A stage on this many GPUs; texts are as long as those of the dataset `root`, or all of the full length."""
    stage, model_fields, _ = stage_config(name, dict(settings))
    total_steps(stage, None)
    try:
        fit = _PAPERS_FIT.get(name, _OTHER_FIT)
        auto = replace(stage, micro_batch=fit.micro_batch) if stage.micro_batch == "auto" else stage
        micro = micro_batch(auto, gpus)
        kind = fit.checkpointing if stage.checkpointing == "auto" else stage.checkpointing
        here = stage.codec in EMBEDDED_CODECS or Path(stage.codec).is_dir()
        channels, factor = codec_shape(stage.codec) if here else _VAE_SHAPE
        width = {"text_dim": _LOCAL_TEXT_WIDTH} if stage.text_encoder == EMBEDDED_ENCODER else {}
        model = PRESETS[stage.model](in_channels=channels, patch_size=stage.patch_size, **width, **model_fields)
        if stage.repa.features is not None:
            stage.repa.block_of(model)
            if cached_folder(stage.repa.features) is not None:
                vision_shape(stage.repa.features)
    except (UsageError, ValueError) as error:
        raise UsageError(str(error).replace("--workers", "--gpus")) from error
    check_grid(stage, factor)
    tokens, source = stage.text_tokens, "no dataset: every text has the recipe's text_tokens, as in the papers"
    if root is not None:
        lengths, source = text_lengths(selection_of(root, stage), stage)
        tokens = padded_tokens(lengths, stage.text_tokens, stage.text_multiple, micro, stage.batch_size // gpus)
    return StageSetup(name, stage, micro, kind, model, factor, tokens, source, settings)


def padded_tokens(lengths: Mapping[int, int], longest: int, multiple: int, micro_batch: int, share: int) -> int:
    """Expected length of the padded texts of a micro batch: that of its longest, rounded up to `multiple`, at most
    `longest`. lengths: number of texts by their tokens.

    A worker sorts its `share` of a step by length, so the longest of its micro batch number j is the text of rank
    j * micro_batch among `share` independent ones: it has at most v tokens if at least so many of them have.
    """
    padded = np.minimum(longest, np.ceil(np.maximum(1, list(lengths)) / multiple) * multiple)
    tokens, index = np.unique(padded, return_inverse=True)
    at_most = np.cumsum(np.bincount(index, weights=list(lengths.values()))) / sum(lengths.values())
    ranks = np.arange(micro_batch, share + 1, micro_batch)
    reached = np.stack([_at_least(ranks, share, float(p)) for p in at_most])
    return round(float((tokens @ np.diff(reached, axis=0, prepend=0)).mean()))


def _at_least(ranks: NDArray[np.int64], count: int, p: float) -> NDArray[np.float64]:
    """The probability that at least so many of `count` independent events of probability p happen, for each rank."""
    if p >= 1:
        return np.ones(len(ranks))
    happened = np.arange(count + 1)
    ways = math.lgamma(count + 1) - np.array([math.lgamma(k + 1) + math.lgamma(count - k + 1) for k in happened])
    chance = np.exp(ways + happened * math.log(p) + (count - happened) * math.log1p(-p))
    return np.array([chance[rank:].sum() for rank in ranks])
