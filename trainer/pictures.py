"""A run folder -> pictures: the newest checkpoint with its codec and text encoder, ready to draw.

Axes: B batch, C latent channels, H W rows and columns, N image tokens, 3 = RGB.
"""

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from pipeline.shards import Store
from trainer.ema import EMA
from trainer.flow import draw_noise, sample_key
from trainer.latents import Codec, load_codec
from trainer.model.xut import XUT, XUTConfig
from trainer.positions import camera, full_position_map
from trainer.run_folder import config_of, find_checkpoint, text_encoder_of_checkpoint
from trainer.sampler import euler, guided
from trainer.text import TextEncoder, load_text_encoder

Pixels = NDArray[np.uint8]  # (H, W, 3)

# Pictures that are drawn at once; the number changes speed and memory, not the pictures.
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a picture is drawn. Sizes in pixels; shifts and zoom as in `positions.camera`."""

    width: int
    height: int
    negative: str = ""
    steps: int = 20
    guidance: float = 3.0
    x_shift: float = 0.0
    y_shift: float = 0.0
    zoom: float = 1.0

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"a picture of {self.width} x {self.height} pixels: width and height must be above 0")
        if self.steps < 1:
            raise ValueError(f"{self.steps} sampling steps: at least 1 is needed")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance {self.guidance} is not a number")
        camera(torch.zeros(1, 2), self.x_shift, self.y_shift, self.zoom)  # has rules of its own


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

    @classmethod
    def load(cls, run: str | Path, device: torch.device) -> "PictureModel":
        """From the path of a run, a stage or a checkpoint, here or on S3: see `run_folder.find_checkpoint`.

        ValueError where there is no finished checkpoint, or a damaged one.
        """
        root = Store(str(run)).root
        found = find_checkpoint(root)
        if found is None:
            raise ValueError(f"{root} has no checkpoint; train one: python trainer/run.py --stage demo --run {root}")
        record = config_of(found)
        config = XUTConfig.from_dict(record["model"])
        model = XUT(config).to(device).eval()
        average = EMA(model, decay=0)
        average.load_state_dict(found.tensors("ema"))
        model.load_state_dict(found.tensors("model") | average.weights)
        with _local_folder(text_encoder_of_checkpoint(found)) as folder:
            encoder = load_text_encoder(folder, device, layers=config.text_layers)
        return cls(
            model,
            load_codec(record["stage"]["codec"], device),
            encoder,
            record["stage"]["text_tokens"],
            device,
            found.step,
            record,
            metrics=found.folder.rsplit("/", 2)[0],
        )

    @property
    def resolution(self) -> int:
        """Pixels along the side of the crops it was trained on."""
        return int(self.record["stage"]["resolution"])

    def nearest_size(self, pixels: float) -> int:
        """The nearest side that is a whole number of tokens."""
        token = self.codec.factor * self.model.config.patch_size
        return max(1, round(pixels / token)) * token

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        drawn: Callable[[int], None] | None = None,
    ) -> list[Pixels]:
        """One picture per (prompt, seed), the same alone and in any company. `drawn` hears of each finished group.

        ValueError for a size that is no whole number of tokens (see `nearest_size`) or a camera out of its range.
        """
        pictures: list[Pixels] = []
        for start in range(0, len(prompts), _BATCH):
            group = slice(start, start + _BATCH)
            pictures += self._draw_group(list(prompts[group]), list(seeds[group]), settings)
            if drawn is not None:
                drawn(len(pictures))
        return pictures

    @torch.no_grad()
    def _draw_group(self, prompts: list[str], seeds: list[int], settings: Settings) -> list[Pixels]:
        token = self.codec.factor * self.model.config.patch_size
        if settings.width % token or settings.height % token:
            raise ValueError(f"{settings.width} x {settings.height} pixels are no whole number of {token}-pixel tokens")
        rows, columns = settings.height // token, settings.width // token
        map_N2 = full_position_map(settings.width, settings.height, rows, columns, device=self.device)
        map_N2 = camera(map_N2, settings.x_shift, settings.y_shift, settings.zoom)
        text_BTD, mask_BT = self.encoder.encode([*prompts, *[settings.negative] * len(prompts)], self.text_tokens)
        bf16 = self.precision == "bf16"
        text_BTD = text_BTD if bf16 else text_BTD.float()
        count = 2 * len(prompts)
        aspect_B = torch.full((count,), math.log(settings.width / settings.height), device=self.device)

        def velocity(x_BCHW: Tensor, t_B: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                out: Tensor = self.model(
                    x_BCHW,
                    t_B,
                    text=text_BTD,
                    text_mask=mask_BT,
                    position_map=map_N2.expand(count, -1, -1),
                    aspect=aspect_B,
                )
            return out.float()  # guidance multiplies what bf16 rounds away

        keys_B = torch.tensor([sample_key(seed, 0, 0) for seed in seeds], device=self.device)
        shape = (self.codec.channels, settings.height // self.codec.factor, settings.width // self.codec.factor)
        latents_BCHW = euler(guided(velocity, settings.guidance), draw_noise(keys_B, shape), settings.steps)
        pixels_B3HW: Tensor = self.codec.decode(latents_BCHW)
        return list(pixels_B3HW.permute(0, 2, 3, 1).cpu().numpy())


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


def save_picture(out: Path, pixels: Pixels, prompt: str, seed: int, settings: Settings) -> Path:
    """Write OUT/<seed>-<prompt>-<hash of the settings>.png, with all that made it in its metadata (key "hdm").

    So the same command gives the same file, and no other command overwrites it. Returns the path.
    """
    out.mkdir(parents=True, exist_ok=True)
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "unconditional"
    origin = json.dumps({"prompt": prompt, "seed": seed, **asdict(settings)})
    made_by = PngInfo()
    made_by.add_itxt("hdm", origin)
    path = out / f"{seed:06d}-{words}-{hashlib.sha256(origin.encode()).hexdigest()[:6]}.png"
    Image.fromarray(pixels).save(path, pnginfo=made_by)
    return path
