"""What one training stage is: every number of the recipe in one place.

The stages 256, 512, 768 and 1024 are the HDM report's table (section 4.2), with three freedoms. Its rates are muP's at
base width 1; ours are at `OptimizerConfig.base_width`, so theirs are divided by it. It gives no averaged weights: the
half-lives here are a tenth of a stage or less. And its first stage's whole batch of 128 is the micro batch of a card of
about 40 GB: `--set micro_batch=64` takes the same steps with half the activations.

Checkpoints are 35 to 45 minutes apart at the speed of the authors' four RTX 5090: 243, 98, 56 and 20.7 images/s.
"""

from dataclasses import dataclass, field
from typing import Literal

from trainer.model.xut import Checkpointing
from trainer.optimization.optimizers import OptimizerConfig
from trainer.samples.training_text import CaptionConfig

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage trains on square crops of one size. The step count is samples / batch_size.

    ValueError, which names the field, for a number out of its range.
    """

    after: str | None  # the stage whose newest weights it starts from
    selection: str  # which of the dataset's selections
    resolution: int  # pixels: side of the square crop
    samples: int  # crops seen in the whole stage
    batch_size: int  # crops per optimizer step, summed over all workers
    micro_batch: int  # crops that a worker takes through the model at once, at most: changes memory and speed only
    model: str  # preset of XUTConfig
    patch_size: int  # latent pixels along the side of a token
    codec: str  # pixels <-> latents, see latents.py
    text_encoder: str  # folder or hub name of a causal language model; "local": made from the selection's captions
    text_tokens: int  # longest text, in tokens of the encoder
    text_multiple: int = 32  # a batch's texts are padded to a multiple of so many tokens: few graphs, little padding
    selection_rate: float  # share of image tokens that TREAD routes around the middle blocks
    optimizer: OptimizerConfig
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    clip_norm: float = 3.0  # of the whole gradient; the papers: 3, then 1 from the 512 stage on
    timestep_shift: float = 1.0  # above 1 trains more often near pure noise, where a picture's layout is decided
    ema_decay: float = 0.9999
    flip: float = 0.0  # probability of a mirrored crop; never where the text speaks of sides or letters
    precision: Precision = "bf16"  # of the model's products; weights and their state stay fp32
    checkpointing: Checkpointing = "none"  # blocks whose activations are computed again in the backward pass
    compiled: bool = True  # on a GPU: model and image encoder as compiled graphs, minutes at the start
    seed: int = 0
    hold_out: float = 0.002  # share of the selection that is kept for validation and never trained on
    streams: int = 16  # of the data order: any number of workers that divides it sees the same batches
    window: int = 4  # row groups of a stream whose rows are shuffled together
    checkpoint_every: int = 1000  # optimizer steps
    keep_last: int = 3  # checkpoints
    keep_every: int = 0  # optimizer steps: the checkpoints of its multiples are kept for good; 0: none
    evaluate_every: int = 1000  # optimizer steps
    log_every: int = 10  # optimizer steps

    def __post_init__(self) -> None:
        for name in _AT_LEAST_1:
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "keep_every"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("selection_rate", "ema_decay", "hold_out"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("clip_norm", "timestep_shift"):
            self._require(name, getattr(self, name) > 0, "above 0")
        self._require("flip", 0 <= self.flip <= 1, "a probability, from 0 to 1")

    def _require(self, name: str, right: bool, wanted: str) -> None:
        if not right:
            raise ValueError(f"{name} must be {wanted}: got {getattr(self, name)}")


_AT_LEAST_1 = (
    *("resolution", "samples", "batch_size", "micro_batch", "patch_size", "text_tokens", "text_multiple"),
    *("streams", "window", "checkpoint_every", "keep_last", "evaluate_every", "log_every"),
)


def _hdm_optimizer(rate: float, betas: tuple[float, float], weight_decay: float) -> OptimizerConfig:
    """AdamW with the papers' rate for a base width of 1: 0.5 / fan_in in the hidden matrices is theirs exactly."""
    scaled = rate / OptimizerConfig.base_width
    return OptimizerConfig(kind="adamw", learning_rate=scaled, betas=betas, weight_decay=weight_decay)


_EQ_SDXL_VAE = "KBlueLeaf/EQ-SDXL-VAE"
_QWEN3 = "Qwen/Qwen3-0.6B"

STAGES = {
    # 64-pixel crops on two CPU cores in minutes. What was tried is in tests/bench/RESULTS.md.
    "demo": StageConfig(
        after=None,
        selection="demo",
        resolution=64,
        samples=36_000,
        batch_size=32,
        micro_batch=32,
        model="tiny",
        patch_size=1,
        codec="dct",
        text_encoder="local",
        text_tokens=40,  # the longest texts; the tags are in order of name, and a cut would always take the same ones
        text_multiple=8,  # a third of the tokens would be padding with 32, and there is no graph to compile
        selection_rate=0.25,
        optimizer=OptimizerConfig(kind="muon", learning_rate=3e-3, muon_learning_rate=0.03, warmup_steps=100),
        # The tag engine's caption is the tags: mostly that alone, so that few texts leave out the main object.
        captions=CaptionConfig(group_dropout=0.6, caption_only=0.85, tags_only=0.15),
        # Neighbouring latents of 8x8 blocks say much the same, so an outline still shows through noise that hides a
        # detail: without the shift most steps go to noise at which outlines are known already.
        timestep_shift=3.0,
        ema_decay=0.997,
        precision="fp32",
        compiled=False,  # would take as long as the training
        hold_out=0.01,
        checkpoint_every=500,
        evaluate_every=500,
    ),
    "256": StageConfig(
        after=None,
        selection="256",
        resolution=256,
        samples=152_500_000,
        batch_size=2048,
        micro_batch=128,
        model="base",
        patch_size=2,
        codec=_EQ_SDXL_VAE,
        text_encoder=_QWEN3,
        text_tokens=256,
        selection_rate=0.5,
        optimizer=_hdm_optimizer(0.5, betas=(0.9, 0.98), weight_decay=0.02),
        clip_norm=3.0,
        checkpoint_every=250,
        keep_every=10_000,
    ),
    "512": StageConfig(
        after="256",
        selection="512",
        resolution=512,
        samples=42_340_000,
        batch_size=512,
        micro_batch=64,
        model="base",
        patch_size=2,
        codec=_EQ_SDXL_VAE,
        text_encoder=_QWEN3,
        text_tokens=256,
        selection_rate=0.5,
        optimizer=_hdm_optimizer(0.1, betas=(0.9, 0.995), weight_decay=0.005),
        clip_norm=1.0,
        checkpointing="all",  # "blocks" computes half as much again, where 12 GB more are there
        checkpoint_every=500,
        keep_every=10_000,
    ),
    "768": StageConfig(
        after="512",
        selection="768",
        resolution=768,
        samples=8_469_000,
        batch_size=512,
        micro_batch=64,
        model="base",
        patch_size=2,
        codec=_EQ_SDXL_VAE,
        text_encoder=_QWEN3,
        text_tokens=256,
        selection_rate=0.5,
        optimizer=_hdm_optimizer(0.05, betas=(0.9, 0.995), weight_decay=0.002),
        clip_norm=1.0,
        ema_decay=0.9995,  # 16,541 steps: 0.9999 would still be a fifth the stage before
        checkpointing="all",
        checkpoint_every=250,
        keep_every=5_000,
        evaluate_every=500,
    ),
    "1024": StageConfig(
        after="768",
        selection="1024",
        resolution=1024,
        samples=3_649_000,
        batch_size=256,
        micro_batch=16,
        model="base",
        patch_size=2,
        codec=_EQ_SDXL_VAE,
        text_encoder=_QWEN3,
        text_tokens=512,
        selection_rate=0.0,  # off: pictures under guidance are better for it (HDM report, section 4.2)
        optimizer=_hdm_optimizer(0.02, betas=(0.9, 0.995), weight_decay=0.002),
        clip_norm=1.0,
        timestep_shift=1.0,  # the papers'; SD3 and PRX take 3 at this size, where more noise hides as much
        ema_decay=0.9995,  # 14,253 steps
        checkpointing="all",
        checkpoint_every=200,
        keep_every=5_000,
        evaluate_every=500,
    ),
}
