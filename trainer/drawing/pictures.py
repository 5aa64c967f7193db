"""A run folder -> pictures: the newest checkpoint with its codec and text encoder, ready to draw.

Axes: B batch, C latent channels, H W rows and columns, N image tokens, 3 = RGB.
"""

import hashlib
import json
import re
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from pipeline.storage.shards import Store
from trainer.diffusion.conditioning import aspect, pads_text, picture_positions
from trainer.diffusion.flow import draw_noise, shift_for_tokens
from trainer.diffusion.keyed_random import sample_key
from trainer.diffusion.positions import camera
from trainer.diffusion.sampler import OnStep, Velocity, euler, guided, guided_apart, heun
from trainer.encoders.latents import Codec
from trainer.encoders.load_codec import load_codec
from trainer.encoders.pretrained import first_line
from trainer.encoders.text import TextEncoder, load_text_encoder
from trainer.model.routing import kept_image_tokens
from trainer.model.xut import XUT, XUTConfig
from trainer.runs.checkpoint import Checkpoint
from trainer.runs.lora import WEIGHTS, merge_folder
from trainer.runs.run_folder import config_of, find_checkpoint, text_encoder_of_checkpoint
from trainer.runs.weights import trained_model

Pixels = NDArray[np.uint8]  # (H, W, 3)

# Pictures that are drawn at once, and their tokens together: speed and memory; the pictures are the same.
MOST_AT_ONCE = 32
_TOKENS_AT_ONCE = 32 * 1024
# What is asked for by mistake, or would keep a machine busy for days.
LARGEST_SIDE = 4096  # pixels
MOST_TOKENS = 256 * 256  # of one picture: 4096 x 4096 pixels in tokens of 16
_MOST_STEPS = 1000
_FARTHEST = 100.0  # shifts in frames, and zoom in or out; guidance

Sampler = Literal["euler", "heun"]
_SAMPLERS = {"euler": euler, "heun": heun}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a picture is drawn. Sizes in pixels; shifts and zoom as in `positions.camera`. ValueError, which names the
    limit, for anything out of its range."""

    width: int
    height: int
    negative: str = ""
    steps: int = 20
    guidance: float = 3.0  # 1 is off: the conditional branch alone
    sampler: Sampler = "euler"
    shift: float | None = None  # of time, as in `flow.shift_time`; None: by the number of tokens, 1 at the training's
    x_shift: float = 0.0
    y_shift: float = 0.0
    zoom: float = 1.0
    # TREAD's self-guidance: the shares of tokens that skip the middle blocks with the prompt, and with the negative
    # one. Dense unless asked for.
    selection_rate: float = 0.0
    unconditional_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            if not 1 <= getattr(self, name) <= LARGEST_SIDE:
                raise ValueError(f"{name} {getattr(self, name)}: a side has from 1 to {LARGEST_SIDE} pixels")
        if not 1 <= self.steps <= _MOST_STEPS:
            raise ValueError(f"{self.steps} sampling steps: from 1 to {_MOST_STEPS}")
        for name in ("guidance", "x_shift", "y_shift"):
            if not abs(getattr(self, name)) <= _FARTHEST:  # so that NaN is refused, too
                raise ValueError(f"{name} {getattr(self, name)}: a number from {-_FARTHEST:g} to {_FARTHEST:g}")
        for name in ("zoom", "shift"):
            if getattr(self, name) is not None and not 1 / _FARTHEST <= getattr(self, name) <= _FARTHEST:
                raise ValueError(
                    f"{name} {getattr(self, name)}: a number above 0, from {1 / _FARTHEST} to {_FARTHEST:g}; 1 is none"
                )
        if self.sampler not in get_args(Sampler):
            raise ValueError(f"sampler {self.sampler!r}: one of {', '.join(get_args(Sampler))}")
        for rate in (self.selection_rate, self.unconditional_rate):
            kept_image_tokens(1, rate)  # has rules of its own
        _check_text(self.negative)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture. ValueError for a seed or a prompt that cannot be drawn; an empty prompt is the unconditional one."""

    prompt: str
    seed: int
    settings: Settings

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed {self.seed}: from 0 to {2**62 - 1}")
        _check_text(self.prompt)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the prompt {text!a} is no valid UTF-8 text") from None


@dataclass(frozen=True)
class PictureModel:
    """A trained model (EMA weights) with the encoders it was trained with."""

    model: XUT
    codec: Codec
    encoder: TextEncoder
    text_tokens: int
    device: torch.device
    steps_taken: int
    record: dict[str, Any]  # what the run was trained with
    precision: str = "fp32"  # of the model's forward pass: "bf16" as in training on a GPU
    metrics: str = ""  # folder of the stage's metrics.jsonl, here or on S3
    checkpoint: Checkpoint | None = None  # that it was loaded from; none while it is trained
    adapters: tuple[dict[str, Any], ...] = ()  # merged since: sha256 of their file, and scale

    @classmethod
    def load(cls, run: str | Path, device: torch.device) -> "PictureModel":
        """From the path of a run, a stage or a checkpoint, here or on S3: see `run_folder.find_checkpoint`.

        On a GPU in the precision of the training; adapters are merged into their base. ValueError where there is no
        finished checkpoint, a damaged one, or one whose codec, text encoder or base is not there.
        """
        root = Store(str(run)).root
        found = find_checkpoint(root)
        if found is None:
            raise ValueError(f"{root} has no checkpoint; train one: python trainer/run.py --stage demo --run {root}")
        record = config_of(found)
        config, stage = XUTConfig.from_dict(record["model"]), record["stage"]
        codec = load_codec(stage["codec"], device)  # before the model: what may be missing is looked for first
        with _local_folder(text_encoder_of_checkpoint(found)) as folder:
            encoder = load_text_encoder(folder, device, layers=config.text_layers)
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
        """This model, whose weights change, with the adapters of a folder of peft's layout. ValueError as
        `lora.merge_folder`."""
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() if (folder / WEIGHTS).is_file() else ""
        merge_folder(self.model, folder, scale)
        return replace(self, adapters=(*self.adapters, {"sha256": digest, "scale": scale}))

    @property
    def made_with(self) -> dict[str, Any]:
        """What besides the settings decides a picture's bits, ready for JSON."""
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
        """Pixels along the side of the crops it was trained on."""
        return int(self.record["stage"]["resolution"])

    @property
    def token(self) -> int:
        """Pixels along the side of a token."""
        return self.codec.factor * self.model.config.patch_size

    def nearest_size(self, pixels: float) -> int:
        """The nearest side that is a whole number of tokens."""
        return max(1, round(pixels / self.token)) * self.token

    def time_shift(self, settings: Settings) -> float:
        """The settings' own or, for another number of tokens than the training's crops had, that of
        `flow.shift_for_tokens`: the same share of the steps at noise that hides as much of the picture."""
        if settings.shift is not None:
            return settings.shift
        return shift_for_tokens(settings.width * settings.height, self.resolution**2)

    def fitting(self, settings: Settings) -> Settings:
        """The settings with the nearest sides that are whole tokens. ValueError for more tokens than can be drawn."""
        width, height = self.nearest_size(settings.width), self.nearest_size(settings.height)
        fitting = replace(settings, width=width, height=height)
        self.check(fitting)
        return fitting

    def check(self, settings: Settings) -> None:
        """ValueError for a size that is no whole number of tokens (see `nearest_size`), or too many of them."""
        width, height, token = settings.width, settings.height, self.token
        if width % token or height % token:
            raise ValueError(f"{width} x {height} pixels are no whole number of {token}-pixel tokens")
        tokens = width * height // token**2
        if tokens > MOST_TOKENS:
            raise ValueError(
                f"{width} x {height} pixels are {tokens} tokens of {token} pixels; this program draws {MOST_TOKENS} at "
                "most: ask for a smaller picture"
            )

    def at_once(self, settings: Settings) -> int:
        """How many pictures of this size `draw` takes through the model together."""
        return max(1, min(MOST_AT_ONCE, _TOKENS_AT_ONCE * self.token**2 // (settings.width * settings.height)))

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        drawn: Callable[[int], None] | None = None,
        on_step: OnStep | None = None,
    ) -> list[Pixels]:
        """One picture per (prompt, seed), the same alone and in any company (latents to 1e-4, in fp32).

        `drawn` hears of each finished group of `at_once` pictures, `on_step` of each step of a group. ValueError as
        `check`.
        """
        pictures: list[Pixels] = []
        at_once = self.at_once(settings)
        for start in range(0, len(prompts), at_once):
            group = slice(start, start + at_once)
            latents_BCHW = self.latents(prompts[group], seeds[group], settings, on_step)
            pixels_B3HW = self.codec.decode(latents_BCHW)
            pictures += list(pixels_B3HW.permute(0, 2, 3, 1).cpu().numpy())
            if drawn is not None:
                drawn(len(pictures))
        return pictures

    @torch.no_grad()
    def latents(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, on_step: OnStep | None = None
    ) -> Tensor:
        """What `draw` decodes, fp32 (B, C, H, W), of all prompts at once. ValueError as `check`."""
        self.check(settings)
        keys_B = torch.tensor([sample_key(seed, 0, 0) for seed in seeds], device=self.device)
        shape = (self.codec.channels, settings.height // self.codec.factor, settings.width // self.codec.factor)
        integrate = _SAMPLERS[settings.sampler]
        return integrate(
            self._guided(list(prompts), keys_B, settings),
            draw_noise(keys_B, shape),
            settings.steps,
            self.time_shift(settings),
            on_step,
        )

    def _guided(self, prompts: list[str], keys_B: Tensor, settings: Settings) -> Velocity:
        """One pass for both branches, unless they are routed at different rates or there is but one."""
        rate, other_rate = settings.selection_rate, settings.unconditional_rate
        if settings.guidance == 1:
            return self._velocity(prompts, keys_B, settings, rate)
        negatives = [settings.negative] * len(prompts)
        if rate == other_rate:
            together = self._velocity([*prompts, *negatives], keys_B.repeat(2), settings, rate)
            return guided(together, settings.guidance)
        conditional = self._velocity(prompts, keys_B, settings, rate)
        unconditional = self._velocity(negatives, keys_B, settings, other_rate)
        return guided_apart(conditional, unconditional, settings.guidance)

    def _velocity(self, texts: list[str], keys_B: Tensor, settings: Settings, selection_rate: float) -> Velocity:
        """XUT's forward pass for these texts, one a picture."""
        width, height, config = settings.width, settings.height, self.model.config
        map_N2 = picture_positions(config, width, height, self.codec.factor, self.device)
        map_BN2 = camera(map_N2, settings.x_shift, settings.y_shift, settings.zoom).expand(len(texts), -1, -1)
        sides_2B = torch.tensor([[width], [height]], device=self.device).expand(-1, len(texts))
        aspect_B = aspect(config, *sides_2B.double()).float()
        text_BTD, mask_BT = self.encoder.encode(texts, self.text_tokens, padding_is_text=pads_text(config))
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
                    # Other tokens at every time: what one step leaves out the next one sees.
                    routing_key=keys_B + (t_B * 2**32).long() if selection_rate else None,
                )
            return out.float()  # guidance multiplies what bf16 rounds away

        return velocity


@contextmanager
def _local_folder(folder: str) -> Iterator[str]:
    """The folder itself or, of one on S3, a copy of its files for as long as the block lasts."""
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


# --- A picture's file -------------------------------------------------------------------------------------------------

_ORIGIN = "hdm"  # key of the text in a PNG
# What Pillow raises for files that are damaged in one way or another.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def picture_png(pixels: Pixels, origin: Mapping[str, Any]) -> bytes:
    """A PNG with all that made it in its text "hdm", as JSON; `read_origin` is the inverse."""
    made_by = PngInfo()
    made_by.add_itxt(_ORIGIN, json.dumps(origin))
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=made_by)
    return buffer.getvalue()


def read_origin(path: Path) -> dict[str, Any]:
    """What made a picture of `save_picture`. ValueError for any other file, and for a damaged one."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            origin = json.loads(image.info.get(_ORIGIN, "null"))
    except FileNotFoundError:
        raise ValueError(f"{path} is not there") from None
    except _DAMAGED as error:
        mend = "give a picture of trainer/sample.py"
        raise ValueError(f"{path} is no PNG, or a damaged one ({first_line(error)}); {mend}") from error
    if not isinstance(origin, dict):
        raise ValueError(f"{path} does not say what made it; give a PNG of trainer/sample.py that no program rewrote")
    if "prompt" not in origin:
        raise ValueError(f"{path} is a sheet of many pictures; give one of trainer/sample.py's single pictures")
    return origin


def save_picture(
    out: Path,
    pixels: Pixels,
    prompt: str,
    seed: int,
    settings: Settings,
    made_with: Mapping[str, Any] | None = None,
    company: Mapping[str, Any] | None = None,
) -> Path:
    """Write OUT/<picture_name>.png, with all that made it in its metadata, and then a JSON of the same name with the
    same. Returns the path of the PNG.

    made_with: `PictureModel.made_with`. company: the prompts and seeds that were drawn together and this one's place
    among them; a batch of another size rounds otherwise, so that only the same company gives the same bits.
    """
    name = picture_name(prompt, seed, settings, made_with)
    origin = _origin(prompt, seed, settings, made_with)
    origin |= {"company": dict(company)} if company else {}
    store = Store(str(out))
    store.write(f"{name}.png", picture_png(pixels, origin))
    store.write(f"{name}.json", json.dumps(origin, indent=1, ensure_ascii=False).encode())
    return out / f"{name}.png"


def picture_name(prompt: str, seed: int, settings: Settings, made_with: Mapping[str, Any] | None = None) -> str:
    """<seed>-<prompt>-<hash>: the hash is of all that decides the picture, so that the same command gives the same
    file, and no other command overwrites it."""
    origin = json.dumps(_origin(prompt, seed, settings, made_with))
    return f"{seed:06d}-{file_words(prompt)}-{hashlib.sha256(origin.encode()).hexdigest()[:6]}"


def _origin(prompt: str, seed: int, settings: Settings, made_with: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"prompt": prompt, "seed": seed, **asdict(settings), **(made_with or {})}


def file_words(prompt: str) -> str:
    """What of a prompt is for the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "unconditional"
