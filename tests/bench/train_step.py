"""Benchmark: one training step of XUT: images/s, TFLOP/s, share of the measured matmul peak, peak memory.

Needs torch and this checkout, and transformers and diffusers with --encoders, but neither Ray nor an installed package.
The rates of --tread take turns, so that their ratio is reliable on a noisy machine. TFLOP/s count the operations of XUT
only, while the seconds include the encoders. Peak memory on a CPU is that of the process since its start.

    python tests/bench/train_step.py --preset base --resolution 512 --batch 1 --tread 0 0.5
    python tests/bench/train_step.py --preset base --resolution 256 --batch 128 --device cuda --dtype bf16 --compile
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from trainer.diffusion.flow import draw_noise, draw_times, flow_loss, interpolate, velocity_target
from trainer.diffusion.keyed_random import sample_key
from trainer.diffusion.positions import crop_position_map
from trainer.encoders.random_encoders import WORDS, qwen3_600m, sdxl_vae
from trainer.model.config import XUTConfig
from trainer.model.flops import count_flops
from trainer.model.xut import XUT, compiled
from trainer.optimization.optimizers import OptimizerConfig, build_optimizer

# Repeats PRESETS of trainer.recipe, which needs packages that a bare GPU machine may not have.
SHAPES = {
    "tiny": XUTConfig.tiny,
    "small": XUTConfig.small,
    "base": XUTConfig.base,
    "large": XUTConfig.large,
    "released": XUTConfig.released,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PIXELS_PER_LATENT = 8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=SHAPES, default="base", help="Shape of the model. Default: base.")
    parser.add_argument("--resolution", type=int, default=256, help="Side of the crop in pixels. Default: 256.")
    parser.add_argument("--batch", type=int, default=1, help="Images per step. Default: 1.")
    parser.add_argument(
        "--text-tokens", type=int, default=96,
        help="Padded length of the texts, whose real lengths are a quarter of it to all of it. Default: 96.",
    )  # fmt: skip
    parser.add_argument(
        "--tread", type=float, nargs="+", default=[0.0, 0.5], help="TREAD selection rates. Default: 0 0.5."
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Default: %(default)s."
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="bf16 means autocast with fp32 weights. Default: fp32."
    )
    parser.add_argument("--checkpointing", choices=["none", "blocks", "all"], default="none", help="Default: none.")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="Default: adamw.")
    parser.add_argument("--compile", action="store_true", help="Compile the model and the VAE.")
    parser.add_argument(
        "--encoders",
        action="store_true",
        help="Include a text encoder and a VAE with random weights in --dtype, shaped like Qwen3-0.6B and SDXL's.",
    )
    parser.add_argument(
        "--steps", type=int, default=5, help="Measured steps per rate; the median is reported. Default: 5."
    )
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="Also list the N slowest operations.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    peak = matmul_peak(device, DTYPES[args.dtype])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    what = f"train_step: {args.dtype} matmul peak, {name}, torch {torch.__version__}"
    print(f"| {what} | {peak / 1e12:.3f} TFLOP/s |", flush=True)
    step, config, image_tokens = training_step(args, device)
    seconds: dict[float, list[float]] = {rate: [] for rate in args.tread}
    memory: dict[float, float] = {}
    for rate in args.tread:
        step(rate)  # compiles and allocates
    for _ in range(args.steps):
        for rate in args.tread:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds[rate].append(timed(lambda rate=rate: step(rate), device))  # type: ignore[misc]
            memory[rate] = peak_memory(device)

    how = [name for name in ("compile", "encoders") if getattr(args, name)]
    kind = ", ".join([args.preset, f"{args.resolution} pixels", f"batch {args.batch}", args.dtype, *how])
    first = statistics.median(seconds[args.tread[0]])
    for rate in args.tread:
        middle = statistics.median(seconds[rate])
        done = args.batch * count_flops(config, image_tokens, args.text_tokens, rate).step / middle
        speed = f"{middle:.3f} s, {args.batch / middle:.2f} images/s, {done / 1e12:.3f} TFLOP/s"
        shares = f"{done / peak:.0%} of the matmul peak, {middle / first:.3f}x the time of the first rate"
        print(f"| train_step: {kind}, TREAD {rate:g} | {speed}, {shares}, {memory[rate]:.1f} GiB |")
    if args.profile:
        for operation, share in profiled(lambda: step(args.tread[-1]), device)[: args.profile]:
            print(f"| train_step: share of the device's time in {operation} | {share:.0%} |")


def profiled(work: Callable[[], None], device: torch.device) -> list[tuple[str, float]]:
    """Operations and their shares of the device's time, largest first."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        timed(work, device)
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    taken = {event.key: float(getattr(event, field)) for event in trace.key_averages()}
    total = sum(taken.values())
    return sorted(((name, time / total) for name, time in taken.items()), key=lambda pair: -pair[1])


def training_step(args: argparse.Namespace, device: torch.device) -> tuple[Callable[[float], None], XUTConfig, int]:
    """A function that takes one step at a given selection rate, the model's config and its number of image tokens."""
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    encoder = qwen3_600m(device, dtype) if args.encoders else None
    codec = sdxl_vae(device, dtype, args.compile) if args.encoders else None
    config = SHAPES[args.preset](**({"text_dim": encoder.dim} if encoder else {}))
    side = args.resolution // PIXELS_PER_LATENT
    grid = side // config.patch_size
    model = XUT(config, checkpointing=args.checkpointing).to(device)
    optimizer = build_optimizer(model, OptimizerConfig(kind=args.optimizer))
    forward = compiled(model) if args.compile else model

    batch = args.batch
    keys_B = torch.tensor([sample_key(0, 0, position) for position in range(batch)], device=device)
    latents_BCHW = torch.randn(batch, config.in_channels, side, side, device=device)
    shape = (batch, 3, args.resolution, args.resolution)
    pixels_B3HW = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    text_BTD = torch.randn(batch, args.text_tokens, config.text_dim, device=device)
    lengths_B = torch.linspace(args.text_tokens / 4, args.text_tokens, batch, device=device)
    mask_BT = torch.arange(args.text_tokens, device=device) < lengths_B[:, None]
    zero_B = torch.zeros(batch, device=device)
    wide_B, tall_B = zero_B + 1.5 * args.resolution, zero_B + args.resolution
    map_BN2 = crop_position_map(zero_B, zero_B, args.resolution, wide_B, tall_B, grid)

    def step(rate: float) -> None:
        text = encoder.encode([WORDS * args.text_tokens] * batch, args.text_tokens)[0] if encoder else text_BTD
        x_BCHW = codec.encode(pixels_B3HW) if codec else latents_BCHW
        noise_BCHW, t_B = draw_noise(keys_B, x_BCHW.shape[1:]), draw_times(keys_B)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
            velocity_BCHW = forward(
                interpolate(x_BCHW, noise_BCHW, t_B),
                t_B,
                text=text,
                text_mask=mask_BT,
                position_map=map_BN2,
                aspect=torch.log(wide_B / tall_B),
                selection_rate=rate,
                routing_key=keys_B,
            )
        loss = flow_loss(velocity_BCHW, velocity_target(x_BCHW, noise_BCHW)).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step, config, grid * grid


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of ten large square matrix products."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = min(timed(lambda: torch.mm(a, b), device) for _ in range(10))
    return 2 * side**3 / best


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: of the device since the last reset, or of this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
