"""Benchmark: the training step of a stage, and what each of its savings is worth.

Drives `Loop` and `encode` like a training worker: texts of realistic lengths, sorted into micro batches, through
encoders of the recipe's sizes with random weights, gradients accumulated over the share of a step, AdamW and the
average of the weights. Switches off each saving with the others on, and then all of them; the variants take turns.
Needs torch, transformers and diffusers, but neither Ray nor pyarrow.

    python tests/bench/train_step.py --stage 256 --preset small --share 8 --micro 4
    python tests/bench/train_step.py --stage 1024 --share 16 --micro 4 --json 1024.json
"""

import argparse
import json
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch import nn

from trainer.encoders.random_encoders import WORDS, qwen3_600m, sdxl_vae
from trainer.encoders.text import TextEncoder
from trainer.encoders.vae import VaeCodec
from trainer.model.attention import Kernel, measure
from trainer.model.blocks import Block
from trainer.model.config import XUTConfig
from trainer.model.flops import count_flops
from trainer.model.xut import XUT, Checkpointing
from trainer.optimization.schedule import Schedule
from trainer.recipe.stages import STAGES, StageConfig
from trainer.training.encoding import by_length, encode
from trainer.training.loop import Loop, TrainingInputs

SHAPES = {"tiny": XUTConfig.tiny, "small": XUTConfig.small, "base": XUTConfig.base, "large": XUTConfig.large}
PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class Variant:
    """How a step is computed. The defaults are the training's."""

    routed: bool = True  # TREAD at the stage's rate
    sorted: bool = True  # micro batches of texts of similar lengths
    trimmed: bool = True  # texts padded to the longest of the micro batch instead of the stage's limit
    kept_activations: bool = True  # no block is computed again in the backward pass
    compiled: bool = True  # on a GPU
    fast_attention: bool = True  # on a GPU: the fastest kernel instead of torch's choice with a mask
    vae_matmul: bool = True  # on a GPU: the VAE's attention by matrix products


WITHOUT = {
    "TREAD": {"routed": False},
    "sorting texts by length": {"sorted": False},
    "padding only to the longest text": {"trimmed": False, "sorted": False},
    "keeping activations": {"kept_activations": False},
    "compiling": {"compiled": False},
    "the fastest attention kernel": {"fast_attention": False},
    "the VAE's attention by matrix products": {"vae_matmul": False},
}
ON_A_GPU = ("compiling", "the fastest attention kernel", "the VAE's attention by matrix products")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = [name for name in STAGES if name != "demo"]
    parser.add_argument("--stage", choices=stages, default="256", help="Default: 256.")
    parser.add_argument("--preset", choices=SHAPES, default="base", help="Shape of the model. Default: base.")
    parser.add_argument("--share", type=int, default=8, help="Samples of a step of one worker. Default: 8.")
    parser.add_argument("--micro", type=int, default=4, help="Samples computed at once. Default: 4.")
    parser.add_argument(
        "--texts", choices=["danbooru", "demo", "full"], default="danbooru",
        help="Lengths of the texts: as of Danbooru captions and tags, of the demo, or all as long as the stage allows.",
    )  # fmt: skip
    parser.add_argument(
        "--checkpointing", choices=["none", "blocks", "all"], default="none",
        help="Recomputed blocks of the variant with all savings. Default: none.",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=2, help="Measured steps per variant; the median counts.")
    parser.add_argument("--only-all-on", action="store_true", help="Measure no variant without a saving.")
    parser.add_argument(
        "--syncs", action="store_true", help="Also name the lines of a step at which the host waits for a GPU."
    )
    parser.add_argument("--peer", choices=["prx"], help="Also a step of diffusers' transformer of equal parameters.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="Default: %(default)s.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write all figures to this file.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    peak = matmul_peak(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    print(f"| train_step: matmul peak, {name_of(device)}, torch {torch.__version__} | {peak / 1e12:.3f} TFLOP/s |")
    step = Step(args, device)
    rows = measured(step, variants(args, step.stage, device), args.rounds)
    kind = f"train_step: {args.stage} pixels, {args.preset}, {args.share} samples in micro batches of {args.micro}"
    first = rows["all savings"]
    for name, row in rows.items():
        ratio = "" if row is first else f", {row['seconds'] / first['seconds']:.2f}x the time with all savings"
        shares = f"VAE {row['vae']:.0%}, text encoder {row['text']:.0%}, model {1 - row['vae'] - row['text']:.0%}"
        speed = f"{row['seconds']:.2f} s, {args.share / row['seconds']:.2f} images/s{ratio}"
        print(f"| {kind}, {args.texts} texts, {name} | {speed}; {shares}; {row['memory']:.1f} GiB |")
    model_seconds = first["seconds"] * (1 - first["vae"] - first["text"])
    print(f"| {kind}, the model's share of the matmul peak | {first['flops'] / model_seconds / peak:.0%} |")
    if args.syncs:
        print(f"| {kind}, lines at which the host waits for the device | {waits(step)} |")
    if args.peer:
        rows["peer"] = row = peer(step, args.rounds)
        sizes = f"{row['parameters'] / 1e6:.0f}M parameters against {step.parameters / 1e6:.0f}M"
        ratio = f"{row['seconds']:.2f} s, {row['seconds'] / model_seconds:.2f}x the time of XUT; {sizes}"
        print(f"| {kind}, diffusers' PRX on the same latents and texts, without encoders | {ratio} |")
    if args.json:
        facts = {"device": name_of(device), "torch": torch.__version__, "peak": peak, "kind": kind, "rows": rows}
        args.json.write_text(json.dumps(facts, indent=1))


def variants(args: argparse.Namespace, stage: StageConfig, device: torch.device) -> dict[str, Variant]:
    if args.only_all_on:
        return {"all savings": Variant()}
    names = [name for name in WITHOUT if device.type == "cuda" or name not in ON_A_GPU]
    names = [name for name in names if stage.selection_rate or name != "TREAD"]
    found = {f"without {name}": Variant(**WITHOUT[name]) for name in names}
    off = {field: value for name in names for field, value in WITHOUT[name].items()}
    return {"all savings": Variant(), **found, "without any": Variant(**off)}


def measured(step: "Step", variants: dict[str, Variant], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each variant, the shares of the encoders, and peak memory in GiB. Variants take turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for variant in variants.values():
        step(variant)  # compiles and allocates
    for _ in range(rounds):
        for name, variant in variants.items():
            found[name].append(step(variant))
    return {name: sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2] for name, runs in found.items()}


class Step:
    """A worker's share of a training step, computed as a Variant says."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.device, self.args = device, args
        self.encoder: TextEncoder = qwen3_600m(device, dtype)
        self.encoder.prefix, self.encoder._prefix_tokens = True, [self.encoder._empty_token]
        self.codec: VaeCodec = sdxl_vae(device, dtype, compiled=device.type == "cuda")
        self.stage: StageConfig = replace(STAGES[args.stage], batch_size=args.share, ema_snapshots=0)
        self.config = SHAPES[args.preset](text_dim=self.encoder.dim)
        model = XUT(self.config).to(device)
        self.parameters = sum(p.numel() for p in model.parameters())
        schedule = Schedule(self.stage.optimizer, 1000)
        precision = "bf16" if device.type == "cuda" else "fp32"
        self.loop = Loop(model, self.stage, schedule, self.codec.loss_weight_C, precision, device.type == "cuda")
        self.kernel: Kernel = "default"
        if device.type == "cuda":
            side = self.stage.resolution // PIXELS_PER_LATENT // self.config.patch_size
            heads = self.config.heads
            seconds = measure(device, heads, self.config.dim // heads, side * side, self.stage.text_tokens)
            self.kernel = min(seconds, key=lambda kernel: seconds[kernel])
            print(
                f"| train_step: attention kernels | {', '.join(f'{k} {s * 1e3:.2f} ms' for k, s in seconds.items())} |"
            )
        self.lengths = text_lengths(args.texts, args.share, self.stage.text_tokens)
        self.batch = synthetic(self.stage.resolution, self.lengths)
        self.processors = {name: each.processor for name, each in self._vae_attention()}

    def __call__(self, variant: Variant) -> dict[str, float]:
        """Seconds, the shares of VAE and text encoder in them, peak memory in GiB, operations of the model."""
        for block in (module for module in self.loop.model.modules() if isinstance(module, Block)):
            kept: Checkpointing = self.args.checkpointing if variant.kept_activations else "all"
            block.recompute = kept == "all"
        self.loop.model.attention_kernel = self.kernel if variant.fast_attention else "default"
        self._attend_in_vae(by_matmul=variant.vae_matmul and self.device.type == "cuda")
        rate = self.stage.selection_rate if variant.routed else 0.0
        self.loop.stage = replace(self.stage, selection_rate=rate)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        clock = {"vae": 0.0, "text": 0.0, "flops": 0.0}
        eager = not variant.compiled and self.device.type == "cuda"
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager") if eager else nullcontext()
        with stance:
            seconds = timed(lambda: self.loop.step(self.micro_batches(variant, clock)), self.device)
        memory = peak_memory(self.device)
        shares = {"vae": clock["vae"] / seconds, "text": clock["text"] / seconds}
        return {"seconds": seconds, **shares, "memory": memory, "flops": clock["flops"]}

    def micro_batches(self, variant: Variant, clock: dict[str, float]) -> Iterator[TrainingInputs]:
        stage = self.stage if variant.trimmed else replace(self.stage, text_multiple=self.stage.text_tokens)
        lengths = self.encoder.lengths(self.batch.texts, stage.text_tokens)
        parts = by_length(lengths if variant.sorted else [0] * len(lengths), self.args.micro)
        codec = Timed(self.codec, clock, "vae", self.device)
        encoder = Timed(self.encoder, clock, "text", self.device)
        for numbers in parts:
            inputs = encode(taken(self.batch, numbers), codec, encoder, stage, self.device)  # type: ignore[arg-type]
            tokens = (inputs.latents_BCHW.shape[-1] // self.config.patch_size) ** 2
            rate = self.loop.stage.selection_rate
            clock["flops"] += len(numbers) * count_flops(self.config, tokens, inputs.text_BTD.shape[1], rate).step
            yield inputs

    def _vae_attention(self) -> list[tuple[str, Any]]:
        return [(str(i), each) for i, each in enumerate(self.codec.vae.encoder.mid_block.attentions)]

    def _attend_in_vae(self, *, by_matmul: bool) -> None:
        if by_matmul:
            from trainer.encoders.load_codec import attend_by_matmul

            attend_by_matmul(self.codec.vae)
        else:
            for name, each in self._vae_attention():
                each.set_processor(self.processors[name])


class Timed:
    """An encoder whose calls add to a clock. On a GPU it waits for the device before and after each."""

    def __init__(self, inner: Any, clock: dict[str, float], name: str, device: torch.device) -> None:
        self._inner, self._clock, self._name, self._device = inner, clock, name, device

    def encode(self, *args: Any) -> Any:
        result: list[Any] = []
        self._clock[self._name] += timed(lambda: result.append(self._inner.encode(*args)), self._device)
        return result[0]


def text_lengths(kind: str, count: int, most: int) -> list[int]:
    """Tokens of texts. danbooru: mean 96, deviation 45, a tenth empty. demo: measured on its dataset."""
    draw = np.random.default_rng(0)
    empty = draw.random(count) < 0.1
    if kind == "full":
        return [most] * count
    found = draw.gamma((96 / 45) ** 2, 45**2 / 96, count) if kind == "danbooru" else draw.normal(19, 5, count)
    return [int(length) for length in np.where(empty, 0, found.clip(1, most))]


def synthetic(side: int, lengths: list[int]) -> SimpleNamespace:
    """A batch of noise with texts of these lengths."""
    count = len(lengths)
    return SimpleNamespace(
        texts=[" ".join((WORDS.split() * length)[:length]) for length in lengths],
        pixels_BHW3=np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8),
        frame_B4=np.tile(np.array([0, 0, 1.5 * side, side], np.float32), (count, 1)),
        keys_B=np.arange(count, dtype=np.int64),
    )


def taken(batch: SimpleNamespace, numbers: list[int]) -> Any:
    arrays = {name: getattr(batch, name)[numbers] for name in ("pixels_BHW3", "frame_B4", "keys_B")}
    return SimpleNamespace(texts=[batch.texts[number] for number in numbers], **arrays)


def waits(step: Step) -> str:
    """Lines of a step that wait for a GPU, as torch warns of them. It does not warn of waits that are asked for."""
    if step.device.type != "cuda":
        return "not measured: no GPU"
    clock = {"vae": 0.0, "text": 0.0, "flops": 0.0}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step.loop.step(step.micro_batches(Variant(), clock))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = {f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)}
    return ", ".join(sorted(found)) or "none"


def peer(step: Step, rounds: int) -> dict[str, float]:
    """A step of diffusers' PRX transformer on the same latents, texts and micro batches, with fused AdamW."""
    from diffusers import PRXTransformer2DModel

    config, device = step.config, step.device
    head = config.dim // config.heads

    def build(depth: int) -> nn.Module:
        return PRXTransformer2DModel(
            in_channels=config.in_channels, patch_size=config.patch_size, context_in_dim=config.text_dim,
            hidden_size=config.dim, num_heads=config.heads, depth=depth, mlp_ratio=3.0, axes_dim=[head // 2, head // 2],
        )  # fmt: skip

    def parameters(depth: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build(depth).parameters())

    depth = min(range(2, 60), key=lambda depth: abs(parameters(depth) - step.parameters))
    model = build(depth).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    inputs = list(step.micro_batches(Variant(), {"vae": 0.0, "text": 0.0, "flops": 0.0}))
    bf16 = device.type == "cuda"

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        for each in inputs:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                time_B = torch.full((len(each.keys_B),), 0.5, device=device)
                out = model(each.latents_BCHW, time_B, each.text_BTD, each.text_mask_BT, return_dict=False)[0]
            torch.autograd.backward(out.float().square().mean())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    run()
    seconds = statistics.median(timed(run, device) for _ in range(rounds))
    return {"seconds": seconds, "parameters": float(parameters(depth))}


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


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    main()
