"""Benchmark: pictures per second from prompts to PNGs, by batch size, sampler and guidance.

The model is that of a run, or has a preset's shape and random weights, with random encoders of the shapes of Qwen3-0.6B
and SDXL. Each variant draws once for warm-up. Then the variants take turns, and the median over the rounds is reported.

    python tests/bench/sample.py --run demo/run --pictures 32
    python tests/bench/sample.py --preset base --resolution 512 --pictures 8 --device cuda
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from trainer.drawing.picture_files import picture_png
from trainer.drawing.picture_model import PictureModel
from trainer.drawing.settings import SamplingSettings
from trainer.encoders.random_encoders import qwen3_600m, sdxl_vae
from trainer.model.config import XUTConfig
from trainer.model.xut import XUT
from trainer.recipe.stage_config import PRESETS

SHAPES = PRESETS | {"released": XUTConfig.released}


@dataclass(frozen=True)
class Variant:
    name: str
    batch_size: int
    settings: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="DIR", help="Run folder of trainer/run.py.")
    what.add_argument("--preset", choices=SHAPES, help="Random weights in this shape.")
    parser.add_argument("--resolution", type=int, default=512, help="Pixels per side, with --preset. Default: 512.")
    parser.add_argument("--pictures", type=int, default=32, help="Pictures per variant and round. Default: 32.")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds that count. Default: 5.")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Default: %(default)s."
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    model = PictureModel.load(args.run, device) if args.run else random_model(args.preset, args.resolution, device)
    count = args.pictures
    variants = [
        Variant(f"20 Euler steps, batch of {count}", count, {}),
        Variant("20 Euler steps, batch of 1", 1, {}),
        Variant(f"20 Euler steps, batch of {count}, no guidance", count, {"guidance": 1.0}),
        Variant(f"10 Heun steps, batch of {count}", count, {"sampler": "heun", "steps": 10}),
        Variant(f"20 Euler steps, batch of {count}, TREAD self-guidance at 0.5", count, {"unconditional_rate": 0.5}),
    ]
    rates: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(args.rounds + 1):
        for variant in variants:
            rates[variant.name].append(count / draw_all(model, variant, count))
    parameters = sum(p.numel() for p in model.model.parameters()) / 1e6
    name = f"{args.preset or 'run'} of {parameters:.0f}M parameters, {model.resolution} pixels, {args.device}"
    first = statistics.median(rates[variants[0].name][1:])
    for variant in variants:
        middle = statistics.median(rates[variant.name][1:])
        print(f"| sample: {name}: {variant.name} | {middle:.2f} pictures/s, {middle / first:.2f}x the first variant |")


def draw_all(model: PictureModel, variant: Variant, count: int) -> float:
    """Seconds."""
    side = model.nearest_size(model.resolution)
    settings = SamplingSettings(width=side, height=side, **variant.settings)
    started = time.perf_counter()
    for start in range(0, count, variant.batch_size):
        seeds = range(start, start + variant.batch_size)
        for pixels in model.draw(["red star, night sky"] * len(seeds), seeds, settings):
            picture_png(pixels, {})
    return time.perf_counter() - started


def random_model(preset: str, resolution: int, device: torch.device) -> PictureModel:
    precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoder, codec = qwen3_600m(device, dtype), sdxl_vae(device, dtype, compiled=False)
    torch.manual_seed(0)
    config = SHAPES[preset](in_channels=codec.channels, text_dim=encoder.dim)
    record = {"stage": {"resolution": resolution}}
    model = XUT(config).to(device).eval()
    return PictureModel(model, codec, encoder, 256, device, 0, record, precision=precision)


if __name__ == "__main__":
    main()
