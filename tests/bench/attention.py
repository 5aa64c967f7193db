"""Benchmark: attention kernels at the shapes of training, and the VAE's attention.

Forward and backward passes of XUT-base's heads with texts of unequal lengths, by each kernel that runs on the device
and agrees with torch's default; and the forward pass of the VAE's single head of 512 dims by torch's kernel and by
matrix products. Needs torch and diffusers.

    python tests/bench/attention.py
    python tests/bench/attention.py --device cpu --sides 16
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from trainer.model.attention import measure

HEADS, HEAD_DIM = 8, 128
TEXT_TOKENS = {16: 256, 32: 256, 48: 256, 64: 512}  # by the tokens along a side of the crop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="Default: %(default)s.")
    parser.add_argument(
        "--sides", type=int, nargs="+", choices=TEXT_TOKENS, default=[16, 64],
        help="Tokens along a side: 16, 32, 48 and 64 for crops of 256 to 1024 pixels. Default: 16 64.",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write all figures to this file.")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: dict[str, Mapping[str, float]] = {}
    for side in args.sides:
        tokens = side * side + TEXT_TOKENS[side]
        found = measure(device, HEADS, HEAD_DIM, side * side, TEXT_TOKENS[side], dtype)
        rows[f"attention of {tokens} tokens, heads of {HEAD_DIM}"] = dict(found)
        rows[f"the VAE's attention, {side * side * 4} tokens, one head of 512"] = vae_attention(2 * side, device, dtype)
    for what, seconds in rows.items():
        times = ", ".join(f"{name} {each * 1e3:.2f} ms" for name, each in seconds.items())
        print(f"| attention: {what} | {times} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


@torch.no_grad()
def vae_attention(side: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds for one picture of side x side latents."""
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    attention = Attention(512, heads=1, dim_head=512, residual_connection=True, upcast_softmax=True, norm_num_groups=32)
    attention = attention.to(device, dtype).eval()
    x_1Dhw = torch.randn(1, 512, side, side, device=device, dtype=dtype)
    found = {}
    for name, processor in (("torch", AttnProcessor2_0()), ("matrix products", AttnProcessor())):
        attention.set_processor(processor)
        times = []
        for _ in range(5):
            _wait(device)
            started = time.perf_counter()
            attention(x_1Dhw)
            _wait(device)
            times.append(time.perf_counter() - started)
        found[name] = min(times)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
