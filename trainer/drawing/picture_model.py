"""PictureModel: the newest checkpoint of a run with its codec and text encoder, ready to draw pictures.

Axes: B batch, C latent channels, D text width, H W rows and columns, N image tokens, T text tokens, 3 = RGB.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.storage.shards import Store
from trainer.diffusion.conditioning import aspect, pads_text, picture_positions
from trainer.diffusion.flow import draw_noise, interpolate, shift_for_tokens
from trainer.diffusion.keyed_random import sample_key
from trainer.diffusion.positions import camera
from trainer.diffusion.sampler import OnStep, Velocity, euler, guided, guided_apart, heun
from trainer.drawing.picture_files import Pixels
from trainer.drawing.settings import PictureRequest, SamplingSettings
from trainer.encoders.latents import Codec
from trainer.encoders.load_codec import load_codec
from trainer.encoders.text import TextEncoder, load_text_encoder
from trainer.model.config import XUTConfig
from trainer.model.xut import XUT
from trainer.runs.checkpoint import Checkpoint
from trainer.runs.lora import WEIGHTS, merge_folder
from trainer.runs.run_folder import config_of, find_checkpoint, text_encoder_of_checkpoint
from trainer.runs.weights import trained_model

# Limits of one batch, in pictures and in tokens. They decide speed and memory, not what the pictures show.
MAX_BATCH = 32
_BATCH_TOKENS = 32 * 1024
_MAX_TOKENS = 256 * 256  # of one picture: 4096 x 4096 pixels in tokens of 16

_SECOND_NOISE = 0x2545F4914F6CDD1D  # changes the keys, so that a larger picture gets noise of its own

_SAMPLERS = {"euler": euler, "heun": heun}


@dataclass(frozen=True)
class PictureModel:
    """A trained model (EMA weights) with the encoders it was trained with."""

    model: XUT
    codec: Codec
    encoder: TextEncoder
    text_tokens: int
    device: torch.device
    steps_taken: int
    record: dict[str, Any]  # config of the training run
    precision: str = "fp32"  # of the model's forward pass; "bf16" as in training on a GPU
    metrics: str = ""  # folder or s3:// prefix of the stage's metrics.jsonl
    checkpoint: Checkpoint | None = None  # None while the model is being trained
    adapters: tuple[dict[str, Any], ...] = ()  # merged LoRA adapters: sha256 of the file, and scale

    @classmethod
    def load(cls, run: str | Path, device: torch.device) -> "PictureModel":
        """Loads a run, a stage or a checkpoint, local or on S3: see `run_folder.find_checkpoint`.

        Uses the precision of the training on a GPU, fp32 on a CPU; merges the adapters of a LoRA run. Raises ValueError
        if there is no finished checkpoint, if it is damaged, or if its codec, text encoder or base model is missing.
        """
        root = Store(str(run)).root
        found = find_checkpoint(root)
        if found is None:
            raise ValueError(f"{root} has no checkpoint. Train one: python trainer/run.py --stage demo --run {root}")
        record = config_of(found)
        config, stage = XUTConfig.from_dict(record["model"]), record["stage"]
        codec = load_codec(stage["codec"], device)  # before the model, to fail early if it is missing
        with _local_folder(text_encoder_of_checkpoint(found)) as folder:
            encoder = load_text_encoder(folder, device, config.text_layers, config.text_prefix)
        return cls(
            trained_model(found).to(device).eval(),
            codec,
            encoder,
            stage["text_tokens"],
            device,
            found.step,
            record,
            precision=stage["precision"] if device.type == "cuda" else "fp32",
            metrics=found.folder.rsplit("/", 2)[0],
            checkpoint=found,
        )

    def with_adapters(self, folder: Path, scale: float) -> "PictureModel":
        """Merges a peft adapter folder into the weights, in place. Raises ValueError as `lora.merge_folder` does."""
        merge_folder(self.model, folder, scale)
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        return replace(self, adapters=(*self.adapters, {"sha256": digest, "scale": scale}))

    @property
    def made_with(self) -> dict[str, Any]:
        """Everything besides the request that decides the bits of a picture, ready for JSON."""
        found = self.checkpoint
        merged = {"adapters": list(self.adapters)} if self.adapters else {}
        return merged | {
            "checkpoint": {"step": found.step, "saved_at": found.saved_at} if found else None,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "precision": self.precision,
            "torch": torch.__version__,
        }

    @property
    def resolution(self) -> int:
        """Side of the training crops, in pixels."""
        return int(self.record["stage"]["resolution"])

    @property
    def token(self) -> int:
        """Side of a token, in pixels."""
        return self.codec.factor * self.model.config.patch_size

    def nearest_size(self, pixels: float) -> int:
        """The nearest side that is a whole number of tokens."""
        return max(1, round(pixels / self.token)) * self.token

    def time_shift(self, settings: SamplingSettings) -> float:
        """The time shift of the settings or, if None, that of `flow.shift_for_tokens`: larger pictures than the
        training crops spend more steps near noise, so that noise hides as much of them as of a training crop."""
        if settings.shift is not None:
            return settings.shift
        return shift_for_tokens(settings.width * settings.height, self.resolution**2)

    def round_size(self, settings: SamplingSettings) -> SamplingSettings:
        """The settings with sides rounded to whole tokens. Raises ValueError if that is too many tokens, also once the
        picture is enlarged."""
        width, height = self.nearest_size(settings.width), self.nearest_size(settings.height)
        rounded = replace(settings, width=width, height=height)
        self.check_size(self.enlarged(rounded))
        return rounded

    def enlarged(self, settings: SamplingSettings) -> SamplingSettings:
        """The settings of the larger picture that `hires` asks for."""
        if settings.hires == 1:
            return settings
        width, height = (self.nearest_size(settings.hires * side) for side in (settings.width, settings.height))
        return replace(settings, width=width, height=height, hires=1.0, shift=None)

    def check_size(self, settings: SamplingSettings) -> None:
        """Raises ValueError if a side is not a whole number of tokens, or if there are too many tokens."""
        width, height, token = settings.width, settings.height, self.token
        if width % token or height % token:
            raise ValueError(f"{width} x {height} pixels are not a whole number of {token}-pixel tokens")
        tokens = width * height // token**2
        if tokens > _MAX_TOKENS:
            raise ValueError(
                f"{width} x {height} pixels are {tokens} tokens of {token} pixels, more than the {_MAX_TOKENS} that "
                "can be drawn. Ask for a smaller picture."
            )

    def unread(self, request: PictureRequest) -> str:
        """What the model does not read of a prompt or a negative prompt that is too long; "" if it reads both whole."""
        parts = [
            self.encoder.unread(text, self.text_tokens, pads_text(self.model.config))
            for text in (request.prompt, request.settings.negative)
        ]
        return " … ".join(filter(None, parts))

    def max_batch(self, settings: SamplingSettings) -> int:
        """How many pictures of this size `draw` puts into one batch."""
        largest = self.enlarged(settings)
        return max(1, min(MAX_BATCH, _BATCH_TOKENS * self.token**2 // (largest.width * largest.height)))

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings,
        on_drawn: Callable[[int], None] | None = None,
        on_step: OnStep | None = None,
    ) -> list[Pixels]:
        """One picture per prompt and seed. The other pictures of a batch affect only rounding (latents agree to 1e-4 in
        fp32). Raises ValueError as `check_size` does.

        on_drawn: called after each batch with the number of pictures so far. on_step: called after each step.
        """
        pictures: list[Pixels] = []
        size = self.max_batch(settings)
        for start in range(0, len(prompts), size):
            batch = slice(start, start + size)
            latents_BCHW = self.latents(prompts[batch], seeds[batch], settings, on_step)
            pixels_B3HW = self.codec.decode(latents_BCHW)
            pictures += list(pixels_B3HW.permute(0, 2, 3, 1).cpu().numpy())
            if on_drawn is not None:
                on_drawn(len(pictures))
        return pictures

    @torch.no_grad()
    def latents(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings, on_step: OnStep | None = None
    ) -> Tensor:
        """Sampled latents (B, C, H, W), fp32, of all prompts in one batch; those of the larger pictures with `hires`.
        Raises ValueError as `check_size` does."""
        self.check_size(settings)
        larger = self.enlarged(settings)
        self.check_size(larger)
        keys_B = torch.tensor([sample_key(seed, 0, 0) for seed in seeds], device=self.device)
        done, total = 0, settings.steps + settings.hires_steps

        def report(*_: int) -> None:
            nonlocal done
            done += 1
            if on_step is not None:
                on_step(done, total)

        integrate, texts = _SAMPLERS[settings.sampler], list(prompts)
        noise_BCHW = draw_noise(keys_B, self._latent_shape(settings))
        velocity, shift = self._guided(texts, keys_B, settings), self.time_shift(settings)
        latents_BCHW = integrate(velocity, noise_BCHW, settings.steps, shift, report)
        if settings.hires == 1:
            return latents_BCHW
        # Enlarged as pixels: not every codec's latents are a smaller picture.
        pixels_B3HW = self.codec.decode(latents_BCHW).float()
        pixels_B3HW = F.interpolate(pixels_B3HW, (larger.height, larger.width), mode="bicubic").round().clamp(0, 255)
        keys_B = keys_B ^ _SECOND_NOISE
        noise_BCHW = draw_noise(keys_B, self._latent_shape(larger))
        strength_B = keys_B.new_full((len(keys_B),), settings.hires_strength, dtype=torch.float32)
        mixed_BCHW = interpolate(self.codec.encode(pixels_B3HW.to(torch.uint8)), noise_BCHW, strength_B)
        velocity, shift = self._guided(texts, keys_B, larger), self.time_shift(larger)
        return integrate(velocity, mixed_BCHW, settings.hires_steps, shift, report, settings.hires_strength)

    def _latent_shape(self, settings: SamplingSettings) -> tuple[int, int, int]:
        return self.codec.channels, settings.height // self.codec.factor, settings.width // self.codec.factor

    def _guided(self, prompts: list[str], keys_B: Tensor, settings: SamplingSettings) -> Velocity:
        """Velocity with classifier-free guidance: both branches in one forward pass if their routing rates agree."""
        rate, unconditional_rate = settings.selection_rate, settings.unconditional_rate
        if settings.guidance == 1:
            return self._velocity(prompts, keys_B, settings, rate)
        negatives = [settings.negative] * len(prompts)
        if rate == unconditional_rate:
            both = self._velocity([*prompts, *negatives], keys_B.repeat(2), settings, rate)
            return guided(both, settings.guidance)
        conditional = self._velocity(prompts, keys_B, settings, rate)
        unconditional = self._velocity(negatives, keys_B, settings, unconditional_rate)
        return guided_apart(conditional, unconditional, settings.guidance)

    def _velocity(
        self, texts: list[str], keys_B: Tensor, settings: SamplingSettings, selection_rate: float
    ) -> Velocity:
        """The model's forward pass, conditioned on one text per picture."""
        width, height, config = settings.width, settings.height, self.model.config
        map_N2 = picture_positions(config, width, height, self.codec.factor, self.device)
        map_BN2 = camera(map_N2, settings.x_shift, settings.y_shift, settings.zoom).expand(len(texts), -1, -1)
        sides_2B = torch.tensor([[width], [height]], device=self.device).expand(-1, len(texts))
        aspect_B = aspect(config, *sides_2B.double()).float()
        # No graph is compiled for its shape, so no text is padded beyond the longest.
        text_BTD, mask_BT = self.encoder.encode(texts, self.text_tokens, 1, pads_text(config))
        bf16 = self.precision == "bf16"

        def velocity(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                out: Tensor = self.model(
                    x_BCHW,
                    t_B,
                    text=text_BTD,
                    text_mask=mask_BT,
                    position_map=map_BN2,
                    aspect=aspect_B,
                    selection_rate=selection_rate,
                    # Depends on t, so that tokens skipped at one step are seen at the next.
                    routing_key=keys_B + (t_B * 2**32).long() if selection_rate else None,
                )
            return out.float()  # because guidance multiplies the rounding error of bf16

        return velocity


@contextmanager
def _local_folder(folder: str) -> Iterator[str]:
    """The folder itself or, if it is on S3, a temporary copy."""
    if not folder.startswith("s3://"):
        yield folder
        return
    store = Store(folder)
    with tempfile.TemporaryDirectory(prefix="hdm-text-encoder-") as copy:
        for name in store.sizes():
            path = Path(copy, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.read(name))
        yield copy
