"""BENCH: pictures a second, from prompts to PNGs, by how many are drawn at once, the sampler and the guidance.

The model of a run, or one of random weights in a preset's shape with encoders of Qwen3-0.6B's and SDXL's: only time
counts. Each way draws once before it is measured; then the ways take turns, and medians count.

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
class Way:
    name: str
    at_once: int
    settings: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", metavar="DIR", help="of trainer/run.py")
    what.add_argument("--preset", choices=SHAPES)
    parser.add_argument("--resolution", type=int, default=512, help="pixels, with --preset")
    parser.add_argument("--pictures", type=int, default=32, help="of each way in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    drawing = PictureModel.load(args.run, device) if args.run else random_model(args.preset, args.resolution, device)
    count = args.pictures
    ways = [
        Way(f"20 Euler steps, {count} at once", count, {}),
        Way("the same, one at a time", 1, {}),
        Way("the same without guidance", count, {"guidance": 1.0}),
        Way("10 steps of Heun", count, {"sampler": "heun", "steps": 10}),
        Way("20 Euler steps, TREAD's self-guidance at 0.5", count, {"unconditional_rate": 0.5}),
    ]
    rates: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(args.rounds + 1):
        for way in ways:
            rates[way.name].append(count / draw_all(drawing, way, count))
    parameters = sum(p.numel() for p in drawing.model.parameters()) / 1e6
    name = f"{args.preset or 'run'} of {parameters:.0f}M parameters, {drawing.resolution} pixels, {args.device}"
    first = statistics.median(rates[ways[0].name][1:])
    for way in ways:
        middle = statistics.median(rates[way.name][1:])
        print(f"| sampling, {name}: {way.name} | {middle:.2f} pictures/s, {middle / first:.2f} of the first |")


def draw_all(drawing: PictureModel, way: Way, count: int) -> float:
    """Seconds."""
    side = drawing.nearest_size(drawing.resolution)
    settings = SamplingSettings(width=side, height=side, **way.settings)
    started = time.perf_counter()
    for start in range(0, count, way.at_once):
        seeds = range(start, start + way.at_once)
        for pixels in drawing.draw(["red star, night sky"] * len(seeds), seeds, settings):
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
