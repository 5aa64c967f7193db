"""Every number of the recipe: the fields of a training stage, and the table of the five stages.

The stages 256, 512, 768 and 1024 follow the table in section 4.2 of the HDM report, with three differences:

- The report gives muP learning rates at base width 1. Here they are divided by `OptimizerConfig.base_width`, 128.
- The report has no averaged weights. `ema_decay` gives the average a half-life of at most a tenth of the stage.
- The report's micro batches of 128, 64, 64 and 16 crops, and its recomputation of all blocks from stage 512 on, are
  left to the memory of the GPU (`trainer/recipe/memory.py`). Smaller micro batches without recomputation take the same
  steps in less time.

`checkpoint_every` is 35 to 45 minutes at the speed of the authors' four RTX 5090: 243, 98, 56 and 20.7 images/s.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.diffusion.repa import RepaConfig
from trainer.model.xut import MOST_TEXT_LENGTHS, Precision
from trainer.optimization.optimizers import OptimizerConfig
from trainer.runs.power_ema import LONGEST
from trainer.samples.training_text import CaptionConfig


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One training stage on square crops of one size. It takes samples / batch_size optimizer steps.

    ValueError, which names the field, for a number out of range.
    """

    # --- Data (section 4.2; square crops: 3.5) ---
    after: str | None  # previous stage, whose newest checkpoint initializes this one; None: random weights
    selection: str  # name of the dataset's selection
    resolution: int  # pixels: side of the square crop
    samples: int  # crops seen in the whole stage
    batch_size: int  # crops per optimizer step, summed over all workers
    # Crops per forward pass of a worker, at most; affects memory and speed only. auto: as many as fit the GPU's memory.
    micro_batch: int | Literal["auto"] = "auto"
    flip: float = 0.0  # probability of mirroring a crop; never if the text mentions sides or letters
    hold_out: float = 0.002  # share of the selection kept for validation and never trained on
    seed: int = 0  # of all random numbers of the training
    streams: int = 16  # of the data order, which does not depend on the number of workers
    window: int = 4  # row groups of a stream that are shuffled together

    # --- Model and encoders (sections 3.1, 3.2) ---
    model: str  # XUTConfig preset: tiny, small, base or large
    patch_size: int  # latent pixels per token, along a side
    codec: str  # image encoder: "dct", "pixel", or folder or hub name of a diffusers AutoencoderKL
    text_encoder: str  # folder or hub name of a causal language model; "local": built from the selection's captions
    text_tokens: int  # longest text, in tokens of the text encoder; the report's context length
    text_multiple: int = 32  # texts are padded to a multiple of this many tokens, to limit compiled graphs

    # --- Objective (section 2.1; TREAD: 3.6) ---
    selection_rate: float  # share of image tokens that TREAD routes around the middle blocks; 0: off
    timestep_shift: float = 1.0  # above 1 trains more often near pure noise, where the composition is decided
    captions: CaptionConfig = field(default_factory=CaptionConfig)  # dropout and mixing of tags and captions
    repa: RepaConfig = field(default_factory=RepaConfig)  # alignment with a vision model; off by default

    # --- Optimization ---
    optimizer: OptimizerConfig  # kind, learning rates, betas, weight decay, warm-up
    clip_norm: float = 3.0  # largest norm of the whole gradient
    # Steps whose gradient norm lies this many robust deviations above recent ones are skipped; 0: none are. The formula
    # is in trainer/optimization/outliers.py.
    outlier_threshold: float = 6.0
    ema_decay: float = 0.9999  # of the averaged weights, per optimizer step
    # Power-function averages of two lengths, and how often they are saved in a stage: `export.py --ema-length` makes
    # others of them (trainer/runs/power_ema.py). They take 8 bytes a parameter on the GPU. 0: none are kept.
    ema_lengths: tuple[float, float] = (0.05, 0.10)
    ema_snapshots: int = 16

    # --- Hardware ---
    precision: Precision = "bf16"  # of the model's matrix products; weights, moments and EMA are fp32
    # Float8 products in the blocks, by torchao, on GPUs of compute capability 8.9 or higher (trainer/model/float8.py).
    fp8: bool = False
    # Blocks whose activations are recomputed in the backward pass. auto: as few as the GPU's memory allows.
    checkpointing: Literal["auto", "none", "blocks", "all"] = "auto"
    compiled: bool = True  # torch.compile the model and the VAE on a GPU, which takes minutes at the start

    # --- Checkpoints and logs, in optimizer steps ---
    checkpoint_every: int = 1000  # steps between checkpoints
    keep_last: int = 3  # number of newest checkpoints to keep
    keep_every: int = 0  # checkpoints at multiples of this step are kept for good; 0: none
    evaluate_every: int = 1000  # steps between validation losses and picture grids
    log_every: int = 10  # steps between log lines

    def __post_init__(self) -> None:
        for name in _AT_LEAST_1:
            self._require(name, getattr(self, name) >= 1, "at least 1")
        if self.micro_batch != "auto":
            self._require("micro_batch", self.micro_batch >= 1, "auto, or at least 1")
        for name in ("seed", "keep_every", "outlier_threshold", "ema_snapshots"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("selection_rate", "ema_decay", "hold_out"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("clip_norm", "timestep_shift"):
            self._require(name, getattr(self, name) > 0, "above 0")
        self._require("ema_lengths", all(0 < length <= LONGEST for length in self.ema_lengths), "in (0, 0.2886]")
        lengths = -(-self.text_tokens // self.text_multiple)
        if self.compiled and lengths > MOST_TEXT_LENGTHS:
            least = -(-self.text_tokens // MOST_TEXT_LENGTHS)
            self._require(
                "text_multiple", False, f"at least {least}, for no more than {MOST_TEXT_LENGTHS} text lengths"
            )
        self._require("flip", 0 <= self.flip <= 1, "a probability, from 0 to 1")
        self._require("fp8", not self.fp8 or self.precision == "bf16", "false unless precision is bf16")

    def _require(self, name: str, valid: bool, wanted: str) -> None:
        if not valid:
            raise ValueError(f"{name} must be {wanted}: got {getattr(self, name)}")


_AT_LEAST_1 = (
    *("resolution", "samples", "batch_size", "patch_size", "text_tokens", "text_multiple"),
    *("streams", "window", "checkpoint_every", "keep_last", "evaluate_every", "log_every"),
)


def _hdm(rate: float, betas: tuple[float, float], weight_decay: float, **fields: Any) -> StageConfig:
    """A stage of the report: XUT-base, VAE and text encoder of sections 3.1 to 3.3, AdamW.

    `rate` is the learning rate at base width 1. Hidden matrices then learn at rate / fan_in, as in the report.
    """
    return StageConfig(
        selection=str(fields["resolution"]),
        model="base",
        patch_size=2,
        codec="KBlueLeaf/EQ-SDXL-VAE",
        text_encoder="Qwen/Qwen3-0.6B",
        optimizer=OptimizerConfig(
            kind="adamw", learning_rate=rate / OptimizerConfig.base_width, betas=betas, weight_decay=weight_decay
        ),
        **fields,
    )


STAGES = {
    # Not in the report: 64-pixel crops on two CPU cores in minutes. tests/bench/RESULTS.md has the trials.
    "demo": StageConfig(
        after=None,
        selection="demo",
        resolution=64,
        samples=36_000,
        batch_size=32,
        model="tiny",
        patch_size=1,
        codec="dct",
        text_encoder="local",
        text_tokens=40,  # fits the longest text; truncation would always drop the same tags, which are sorted by name
        text_multiple=8,  # with 32 a third of the tokens would be padding, and no graph is compiled
        selection_rate=0.25,
        optimizer=OptimizerConfig(kind="muon", learning_rate=3e-3, muon_learning_rate=0.03, warmup_steps=100),
        # The tag engine's caption is the list of tags. Mostly it is used alone, so that few texts miss the main object.
        captions=CaptionConfig(group_dropout=0.6, caption_only=0.85, tags_only=0.15),
        # Neighbouring latents of 8x8 blocks are nearly equal, so outlines survive noise that hides details. Without
        # the shift most steps would train at noise levels at which the outlines are already visible.
        timestep_shift=3.0,
        ema_decay=0.997,
        precision="fp32",
        compiled=False,  # compiling would take as long as the training
        hold_out=0.01,
        checkpoint_every=500,
        evaluate_every=500,
    ),
    "256": _hdm(
        rate=0.5,
        betas=(0.9, 0.98),
        weight_decay=0.02,
        clip_norm=3.0,
        after=None,
        resolution=256,
        samples=152_500_000,
        batch_size=2048,
        text_tokens=256,
        selection_rate=0.5,
        checkpoint_every=250,
        keep_every=10_000,
    ),
    "512": _hdm(
        rate=0.1,
        betas=(0.9, 0.995),
        weight_decay=0.005,
        clip_norm=1.0,
        after="256",
        resolution=512,
        samples=42_340_000,
        batch_size=512,
        text_tokens=256,
        selection_rate=0.5,
        checkpoint_every=500,
        keep_every=10_000,
    ),
    "768": _hdm(
        rate=0.05,
        betas=(0.9, 0.995),
        weight_decay=0.002,
        clip_norm=1.0,
        ema_decay=0.9995,  # 16,541 steps: with 0.9999 a fifth of the average would be the previous stage
        after="512",
        resolution=768,
        samples=8_469_000,
        batch_size=512,
        text_tokens=256,
        selection_rate=0.5,
        checkpoint_every=250,
        keep_every=5_000,
        evaluate_every=500,
    ),
    "1024": _hdm(
        rate=0.02,
        betas=(0.9, 0.995),
        weight_decay=0.002,
        clip_norm=1.0,
        ema_decay=0.9995,  # 14,253 steps
        after="768",
        resolution=1024,
        samples=3_649_000,
        batch_size=256,
        text_tokens=512,
        selection_rate=0.0,  # off: pictures drawn with guidance are better for it (section 4.2)
        timestep_shift=1.0,  # the report's; SD3 and PRX use 3 at this size, where the same noise hides less
        checkpoint_every=200,
        keep_every=5_000,
        evaluate_every=500,
    ),
}
