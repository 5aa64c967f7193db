"""What one training stage is: every number of the recipe in one place."""

from dataclasses import dataclass, field

from trainer.captions import CaptionConfig
from trainer.optim import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage trains on square crops of one size. The step count is samples / batch_size."""

    selection: str  # which of the dataset's selections
    resolution: int  # pixels: side of the square crop
    samples: int  # crops seen in the whole stage
    batch_size: int  # crops per optimizer step, summed over all workers
    model: str  # preset of XUTConfig
    patch_size: int  # latent pixels along the side of a token
    codec: str  # pixels <-> latents, see latents.py
    text_encoder: str  # folder or hub name of a causal language model; "local": made from the selection's captions
    text_tokens: int  # longest text, in tokens of the encoder
    text_multiple: int  # a batch's texts are padded to a multiple of so many tokens: few shapes, little padding
    selection_rate: float  # share of image tokens that TREAD routes around the middle blocks
    optimizer: OptimizerConfig
    captions: CaptionConfig = field(default_factory=CaptionConfig)
    clip_norm: float = 3.0  # of the whole gradient; the papers: 3, then 1 from the 512 stage on
    timestep_shift: float = 1.0  # above 1 trains more often near pure noise, where a picture's layout is decided
    ema_decay: float = 0.9999
    seed: int = 0
    checkpoint_every: int = 1000  # optimizer steps
    log_every: int = 10  # optimizer steps


STAGES = {
    # 64-pixel crops on two CPU cores in minutes. What was tried is in tests/bench/RESULTS.md.
    "demo": StageConfig(
        selection="demo",
        resolution=64,
        samples=36_000,
        batch_size=32,
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
        checkpoint_every=500,
    ),
}
