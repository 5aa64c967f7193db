"""BENCH: the training's stream of samples through Ray against a bare thread pool, MosaicML Streaming and WebDataset.

All read the same JPEGs of 512 pixels along the short side from local disk (in the page cache) and give batches of 128
crops of 256 pixels and their texts, which are dropped. "the same work": our crop and our text. "their users' own":
Pillow's whole picture resized, then cut, and a text as stored. The thread pool is the least that reads our files: a
task reads row groups one after the other, crops and describes 128 rows and stacks them; as many threads as cores.
MosaicML Streaming and WebDataset come into an environment of their own (--environment), and read what they wrote
themselves, with as many workers of torch's DataLoader as there are cores.

Each way is a new process each time, in turns; a ratio is of two in one round. Left out: imports, the conversion, the
first seconds after the first batch. All that reads is as nice as our loaders are, so that other work on the machine
slows all alike. The row groups are small, so that an epoch has more of them than the loaders hold, as a real one has.

The memory is that of Ray and of all its processes together, shared pages counted once. For 4 and 16 times as much data
the files are linked under other names.

    python tests/bench/stream.py --images 2048 --rounds 4
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from memory import family, proportional_memory
from PIL import Image, ImageDraw
from stream_others import BATCH, Figures, measure
from trainer.cluster.loader_actors import loader_source

from pipeline.core.cluster import cluster
from pipeline.core.records import SELECTION, TEXT_CATEGORIES, TIER
from pipeline.pictures.crops import Crop, downsize, square_crop
from pipeline.pictures.decoder import Header, Picture
from pipeline.storage.shards import Store
from trainer.cluster.launch import keep_freed_memory
from trainer.diffusion.keyed_random import Stream, sample_generator
from trainer.recipe.command import Command
from trainer.recipe.resolve import resolve
from trainer.recipe.training import Training
from trainer.samples.data import TrainingData, text_parts
from trainer.samples.row_groups import read_row_group
from trainer.samples.training_text import training_text
from trainer.training.worker_group import WorkerGroup

ROOT = Path(__file__).parents[2]
PINNED = ("mosaicml-streaming==0.13.0", "webdataset==1.0.2")
SIDE = 256  # pixels
DRAWN = 48  # different pictures: a row is one of them, with bytes of its own at its end
GROUP_ROWS = 16  # of a row group: 2 MB
SHARD_ROWS = 256
OURS = "ours through Ray"
LEFT_OUT = 2.0  # seconds after the first batch
MEASURED = 4.0  # seconds after those
WATCHED = 16.0  # seconds of a stream whose memory is looked at
LOOK_SECONDS = 0.5
SETTLES = 5.0  # seconds
NICENESS = 19  # that of launch's loaders on a machine without a GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--times", type=int, nargs="*", default=[1, 4, 16], help="how often over, for the memory")
    parser.add_argument(
        "--environment", type=Path, default=Path(tempfile.gettempdir()) / "bench-stream-environment",
        help="where MosaicML Streaming and WebDataset are installed, and stay",
    )  # fmt: skip
    parser.add_argument("--threads-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads_of:
        print_figures_of_threads(args.threads_of)
        return
    sys.stdout, rows = sys.stderr, sys.stdout  # jobs print what is no figure
    python = environment(args.environment)
    with tempfile.TemporaryDirectory(prefix="bench-stream-") as temporary:
        folder = Path(temporary)
        for times in sorted({1, *args.times}):
            write_dataset(folder / f"dataset{times}", args.images, times, folder / "dataset1")
        training = training_of(folder, 1)
        convert = (training.selection.dataset, training.selection.images, training.selection.name)
        others([python, "--folder", folder / "others", "--convert", *convert])
        with cluster("bench", niceness=0):
            for row in compare(folder, training, python, args.rounds):
                print(row, file=rows, flush=True)
            for times in args.times:
                print(memory_row(folder, times), file=rows, flush=True)


# --- The dataset ------------------------------------------------------------------------------------------------------


def write_dataset(root: Path, images: int, times: int, original: Path) -> None:
    """A tier of 512 pixels and a selection of all of it; `times` > 1 links the original's files so often."""
    shards = {
        f"{number:04d}": min(SHARD_ROWS, images - start) for number, start in enumerate(range(0, images, SHARD_ROWS))
    }
    if times == 1:
        rng = np.random.default_rng(0)
        drawn = [downsize(drawing(rng), 512, "JPEG") for _ in range(DRAWN)]
        for number, (shard, count) in enumerate(shards.items()):
            write_shard(Store(str(root)), shard, [drawn[at] for at in rng.integers(0, DRAWN, count)], number, rng)
    for turn in range(times if times > 1 else 0):
        for folder in ("images-512", "selections/256"):
            (root / folder).mkdir(parents=True, exist_ok=True)
            for shard in shards:
                os.link(original / folder / f"{shard}.parquet", root / folder / f"{turn:02d}-{shard}.parquet")
    names = Store(str(root)).shards("selections/256")
    record = {"shards": {name: shards[name[-4:]] for name in names}, "hash": f"{images} x {times}"}
    Store(str(root)).write("selections/256/selection.json", json.dumps(record).encode())


def drawing(rng: np.random.Generator) -> Picture:
    """Shades with the detail of a painting, lines and flat shapes."""
    width, height = rng.integers(800, 1300, 2).tolist()
    shades = np.zeros((height, width, 3), np.float32)
    for size in (8, 32, 128):
        coarse = rng.normal(0, size**1.6, (height // size + 2, width // size + 2, 3)).astype(np.float32)
        channels = [Image.fromarray(coarse[..., channel]).resize((width, height)) for channel in range(3)]
        shades += np.stack([np.asarray(channel) for channel in channels], axis=-1)
    image = Image.fromarray(np.clip(128 + 32 * shades / shades.std(), 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(16):
        colour = tuple(rng.integers(0, 256, 3).tolist())
        points = [tuple(point) for point in (rng.random((4, 2)) * (width, height)).tolist()]
        pen.line(points, fill=colour, width=int(rng.integers(2, 7)), joint="curve")
        pen.ellipse((*points[0], points[0][0] + 90, points[0][1] + 90), fill=colour, outline="black", width=3)
    return Picture(image, Header(format="PNG", width=width, height=height, frames=1))


def write_shard(store: Store, shard: str, pictures: list, number: int, rng: np.random.Generator) -> None:
    ids = [f"danbooru:{number * SHARD_ROWS + row}" for row in range(len(pictures))]
    tier = {
        "id": ids,
        "image": [picture.data + name.encode() for picture, name in zip(pictures, ids, strict=True)],
        "format": ["JPEG"] * len(ids),
        "width": [picture.width for picture in pictures],
        "height": [picture.height for picture in pictures],
    }
    with store.writing_table(f"images-512/{shard}.parquet", TIER) as write:
        for start in range(0, len(ids), GROUP_ROWS):
            write(pa.table(tier, schema=TIER).slice(start, GROUP_ROWS))
    words = "A girl with long hair stands in a field of flowers under a wide sky and looks back over her shoulder. "
    counts = {"special": 1, "character": 1, "copyright": 1, "artist": 1, "general": 25, "meta": 2}
    texts = [
        {
            "id": name, "row": row, "caption": words * 3, "quality": "good quality", "era": "newest", "rating": "safe",
            **{name: [f"{name} tag {tag}" for tag in rng.integers(0, 9999, counts[name])] for name in TEXT_CATEGORIES},
        }
        for row, name in enumerate(ids)
    ]  # fmt: skip
    store.write_table(f"selections/256/{shard}.parquet", pa.Table.from_pylist(texts, SELECTION), SELECTION)


# --- The ways ---------------------------------------------------------------------------------------------------------


def training_of(folder: Path, times: int) -> Training:
    """Stage 256 with a batch that this machine could train on; nothing but the samples' part is used."""
    settings = [f"batch_size={BATCH}", "model=tiny", "codec=dct", "text_encoder=local", f"resolution={SIDE}"]
    command = Command(
        stage="256", dataset=str(folder / f"dataset{times}"), run=str(folder / f"run{times}"), steps=10**6,
        settings=settings,
    )  # fmt: skip
    return resolve(command)


def data_of(training: Training) -> TrainingData:
    stage = training.stage
    return TrainingData.load(
        training.selection, training.crop(), batch_size=stage.batch_size, streams=stage.streams, window=stage.window,
        hold_out=stage.hold_out, workers=training.workers,
    )  # fmt: skip


def through_ray(training: Training, data: Any, left_out: float, seconds: float) -> Figures:
    """In a process of Ray's, as a training's worker is, that begins and ends with it, and its loaders too."""

    @ray.remote(num_cpus=0, max_calls=1)
    def consume(training: Training, data: TrainingData) -> Figures:
        keep_freed_memory()
        started = time.perf_counter()
        return measure(started, loader_source(data, training, WorkerGroup(0, 1, None)).batches(training), left_out, seconds)

    figures: Figures = ray.get(consume.remote(training, data))
    return figures


def print_figures_of_threads(folder: Path) -> None:
    data = data_of(training_of(folder, 1))
    started = time.perf_counter()
    print(json.dumps(asdict(measure(started, thread_pool(data), LEFT_OUT, MEASURED))), flush=True)
    os._exit(0)


def thread_pool(data: TrainingData) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    threads = os.cpu_count() or 2
    read = lru_cache(2 * threads)(partial(read_row_group, data.row_index))
    rng = np.random.default_rng(0)

    def rows() -> Iterator[tuple[int, int]]:
        while True:
            for group in rng.permutation(len(data.row_index.counts_G)).tolist():
                yield from ((group, row) for row in range(data.row_index.counts_G[group]))

    def batch(places: list[tuple[int, int]], chances: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
        crops, texts = [], []
        for (group, row), (across, down) in zip(places, chances.tolist(), strict=True):
            found = read(group)
            crop = square_crop(found.pictures[row].as_py(), SIDE, across, down)
            assert isinstance(crop, Crop)
            crops.append(crop)
            generator = sample_generator(group * 1000 + row, Stream.CAPTION)
            texts.append(training_text(text_parts(found.rows[row]), generator, data.crop.captions))
        frames = np.array([(crop.x0, crop.y0, crop.width, crop.height) for crop in crops], np.float32)
        return np.stack([crop.pixels_HWC for crop in crops]), frames, texts

    places, ahead = rows(), deque[Any]()
    with ThreadPoolExecutor(threads) as pool:
        while True:
            ahead.append(pool.submit(batch, [next(places) for _ in range(BATCH)], rng.random((BATCH, 2))))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()


def environment(folder: Path) -> Path:
    """The Python of an environment that has, above this one's packages, those that are compared with."""
    python, ready = folder / "bin" / "python", folder / ".ready"
    wanted = [*PINNED, f"torch=={torch.__version__.partition('+')[0]}"]
    if not ready.exists() or ready.read_text() != "\n".join(wanted):
        venv.create(folder, with_pip=True, clear=True)
        [packages] = folder.glob("lib/python*/site-packages")
        (packages / "project.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True, stdout=sys.stderr)
        ready.write_text("\n".join(wanted))
    return python


def others(arguments: list) -> str:
    """What stream_others.py prints."""
    python, *rest = map(str, arguments)
    return in_turn([python, str(Path(__file__).with_name("stream_others.py")), *rest])


def in_turn(command: list[str]) -> str:
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=partial(os.nice, NICENESS),
    )  # fmt: skip
    return done.stdout


# --- What is told -----------------------------------------------------------------------------------------------------


def compare(folder: Path, training: Training, python: Path, rounds: int) -> Iterator[str]:
    shared = ray.put(data_of(training))
    asked = ["--folder", folder / "others", "--side", SIDE, "--seconds", LEFT_OUT, MEASURED]

    def other(reader: str, work: str) -> Figures:
        printed = others([python, *asked, "--reader", reader, "--work", work])
        return Figures(**json.loads(printed.splitlines()[-1]))

    def threads() -> Figures:
        return Figures(**json.loads(in_turn([sys.executable, __file__, "--threads-of", str(folder)]).splitlines()[-1]))

    ways = {
        OURS: partial(through_ray, training, shared, LEFT_OUT, MEASURED),
        "bare thread pool": threads,
        "MosaicML Streaming, the same work": partial(other, "mosaicml", "same"),
        "WebDataset, the same work": partial(other, "webdataset", "same"),
        "MosaicML Streaming, its users' own": partial(other, "mosaicml", "plain"),
        "WebDataset, its users' own": partial(other, "webdataset", "plain"),
    }
    cold = ways[OURS]()
    yield f"| first batch of the first stream of a Ray session | {cold.first_batch:.1f} s |"
    figures: dict[str, list[Figures]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, way in ways.items():
            figures[name].append(way())
            print(f"round {turn + 1}: {name}: {figures[name][-1]}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    for name, found in figures.items():
        rates = ", ".join(f"{one.rate:.0f}" for one in found)
        first = statistics.median(one.first_batch for one in found)
        ratio = statistics.median(mine.rate / one.rate for mine, one in zip(figures[OURS], found, strict=True))
        against = "" if name == OURS else f"; ours / this, median: {ratio:.0%}"
        yield f"| {name} | {rates} images/s{against}; first batch after {first:.1f} s |"


def memory_row(folder: Path, times: int) -> str:
    """Of this process's whole family while a stream runs, and what of it was there before."""
    training = training_of(folder, times)
    data = data_of(training)
    time.sleep(SETTLES)  # until the processes of the stream before are gone
    before = memory()
    with watched() as looks:
        figures = through_ray(training, ray.put(data), LEFT_OUT, WATCHED)
    quarters = [max(looks[at * len(looks) // 4 : (at + 1) * len(looks) // 4]) for at in range(4)]
    shown = ", ".join(f"{quarter:.2f}" for quarter in quarters)
    return (
        f"| memory with {data.row_index.count} pictures ({times}x), peaks of four parts of {WATCHED:.0f} s "
        f"| {shown} GiB, of it {before:.2f} before; {figures.rate:.0f} images/s |"
    )


@contextmanager
def watched() -> Iterator[list[float]]:
    """What `memory` was while the block lasts."""
    looks, ends = list[float](), threading.Event()

    def look() -> None:
        while not ends.wait(LOOK_SECONDS):
            looks.append(memory())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield looks
    finally:
        ends.set()
        watcher.join()


def memory() -> float:
    """GiB of this process and all that it started."""
    return sum(map(proportional_memory, family(os.getpid()))) / 2**30


if __name__ == "__main__":
    main()
