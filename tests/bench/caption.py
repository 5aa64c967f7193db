"""Benchmark: the caption job against a plain loop of `vllm.LLM.chat` over the same pictures, and the job's memory.

The model is a tiny random Pixtral; every answer has the maximum length. In each round both caption the same dataset,
one after the other: the loop with an engine that is loaded before, the job as a user starts it. Each round has a new
dataset, because vLLM's prefix cache still holds the previous one. The loop reads and decodes the shard, makes one call
for all pictures and keeps the answers; the job's rate is the one in its run.json, from its first answers to its last.
The loop's first round is a warm-up and does not count. Then the job runs over a larger dataset.

    .venv-captioner/bin/python tests/bench/caption.py --images 2048 --side 256
"""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from memory import monitored
from PIL import Image

from captioner.engines.vllm import VllmSettings, _engine_args, _sampling_params
from captioner.prompt_layout import detect_layout
from captioner.prompts import TEMPLATES, build_prompt
from captioner.sampling import Sampling
from pipeline.captions.caption_rows import prepare
from pipeline.captions.tag_captions import TAG_COLUMNS, request_from_row
from pipeline.core.records import IMAGES, TAG_CATEGORIES
from pipeline.storage.shards import Store
from pipeline.tagging.tags import TagReader

ROOT = Path(__file__).parents[2]
WARM_UP = 128  # pictures
SAMPLING = Sampling(temperatures=(0.5,), max_tokens=64)
MAX_NUM_SEQS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048, help="Pictures per round. Default: 2048.")
    parser.add_argument(
        "--side", type=int, default=256, help="Width and height of the pictures in pixels. Default: 256."
    )
    parser.add_argument(
        "--times", type=int, nargs="*", default=[8],
        help="Then run the job on so many times the pictures, for its memory. Default: 8.",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="Rounds that count. Default: 3.")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        compare_rates(args.folder, args.rounds, args.side)
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-caption-"))
    try:
        subprocess.run([sys.executable, ROOT / "tests/captioner/tiny_pixtral.py", folder / "model"], check=True)
        for round in range(args.rounds + 1):
            write_images(folder / f"round{round}", f"{round:04d}", args.images if round else WARM_UP, args.side)
        # A separate process, so that its engines' memory is free before the job is measured.
        command = [sys.executable, __file__, "--folder", str(folder), "--rounds", str(args.rounds)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([*command, "--side", str(args.side)], check=True, env=environment)
        for times in args.times:
            for shard in range(times):
                write_images(folder / f"data{times}", f"{shard:04d}", args.images, args.side)
            rate, peak = run_job(folder / f"data{times}", folder / "model", args.side)
            figures = f"{rate:.1f} images/s after the first answers, peak memory {peak / 2**30:.2f} GiB"
            print(f"| caption: the whole job, {times * args.images:,} pictures | {figures} |", flush=True)
    finally:
        shutil.rmtree(folder)


def write_images(root: Path, shard: str, count: int, side: int) -> None:
    generator = np.random.default_rng(list(shard.encode()))
    rows = []
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 255, (side // 16, side // 16, 3), np.uint8))
        encoded = io.BytesIO()
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=90)
        rows.append(
            {
                "id": f"danbooru:{shard}:{number}", "source": "danbooru", "format": "JPEG",
                "width": side, "height": side, "image": encoded.getvalue(), "sha256": "", "phash": number, "page": 0,
                **{f"tags_{category}": [] for category in TAG_CATEGORIES}, "tags_general": ["1girl", "red_star"],
            }
        )  # fmt: skip
    Store(str(root)).write_table(f"images/{shard}.parquet", pa.Table.from_pylist(rows, IMAGES), IMAGES)


def compare_rates(folder: Path, rounds: int, side: int) -> None:
    """Prints the rate of the job against the loop. The loop's engine waits while the job works."""
    chat = chat_loop(folder, side)
    rates: dict[str, list[float]] = {"LLM.chat": [], "job": []}
    for round in range(rounds + 1):
        dataset = folder / f"round{round}"
        (shard,) = Store(str(dataset)).shards("images")
        started = time.perf_counter()
        count = len(chat(dataset, shard))
        if round:
            rates["LLM.chat"].append(count / (time.perf_counter() - started))
            rates["job"].append(run_job(dataset, folder / "model", side)[0])
    ratio = statistics.median(job / loop for job, loop in zip(rates["job"], rates["LLM.chat"], strict=True))
    shown = "; ".join(f"{name} {', '.join(f'{rate:.0f}' for rate in found)}" for name, found in rates.items())
    what = f"caption: the job / a loop of LLM.chat, {count} pictures per round"
    print(f"| {what} | {ratio:.0%} (median); images/s per round: {shown} |", flush=True)
    for process in psutil.Process().children(recursive=True):  # LLM cannot stop its engine
        process.kill()
    os._exit(0)


def chat_loop(folder: Path, side: int) -> Callable[[Path, str], list[object]]:
    """A function that captions one shard with `LLM.chat`. Its engine gets the same arguments as the job's."""
    from vllm import LLM

    settings = VllmSettings(model=str(folder / "model"), max_num_seqs=MAX_NUM_SEQS)
    arguments = asdict(_engine_args(settings, detect_layout(settings.model)))
    defaults = asdict(type(_engine_args(settings, detect_layout(settings.model)))(model=settings.model))
    given = {name: value for name, value in arguments.items() if value != defaults[name] or name == "model"}
    llm = LLM(**given)
    version = next(reversed(TEMPLATES))

    def caption(dataset: Path, shard: str) -> list[object]:
        store, reader = Store(str(dataset)), TagReader()
        table = store.read_table(f"images/{shard}.parquet", [*TAG_COLUMNS, "image"]).to_pylist()
        chats, params = [], []
        for row in table:
            request = request_from_row(row, reader)
            prompt = build_prompt(request, version)
            picture = prepare(row["image"], side)
            content = [
                {"type": "text", "text": prompt.instructions},
                {"type": "image_pil", "image_pil": picture},
                {"type": "text", "text": prompt.hints},
            ]
            chats.append([{"role": "user", "content": content}])
            params.append(_sampling_params(SAMPLING.params(request.id, 0)))
        return list(llm.chat(chats, params, use_tqdm=False))

    return caption


def run_job(dataset: Path, model: Path, side: int) -> tuple[float, int]:
    """Images per second after the first answers, and the peak memory of all processes together in bytes."""
    process = subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "pipeline/caption.py"), "--dataset", str(dataset), "--engine", "vllm"),
            *("--model", str(model), "--temperatures", "0.5", "--max-tokens", "64", "--at-once", str(MAX_NUM_SEQS)),
            *("--max-side", str(side)),
        ],
        stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""},
    )  # fmt: skip
    with monitored(process.pid) as usage:
        assert process.wait() == 0
    record = json.loads((dataset / "captions" / "run.json").read_text())
    return record["this_job"]["images_per_second"], usage.peak


if __name__ == "__main__":
    main()
