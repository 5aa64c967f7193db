"""Benchmark: streaming training samples through Ray, a bare thread pool, MosaicML Streaming and WebDataset.

All read the same JPEGs, 512 pixels along the short side, from the local disk (in the page cache) and yield batches of
128 crops of 256 pixels with their texts. "Same work" means the project's crop and text. "Typical user code" resizes the
whole picture with Pillow, crops it and takes a stored text. The thread pool is a minimal reader of the same files, with
a thread per CPU: a task reads row groups one after the other, makes 128 samples and stacks them. MosaicML Streaming and
WebDataset are installed in a separate environment (--environment), read files that they wrote themselves, and use a
worker of torch's DataLoader per CPU.

The readers take turns, each time in new processes, and ratios are taken within a round. Not measured: imports, the
conversion, and the first seconds after the first batch. All readers run at the niceness of the training's read tasks,
so that other work on the machine slows them equally. Row groups are small, so that an epoch has more of them than the
tasks hold, as a real epoch does.

The memory is that of Ray and all its processes together, with shared pages counted once. The datasets of 4 and 16 times
the size hard-link the same files under other names.

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
from memory import process_tree, proportional_memory
from PIL import Image, ImageDraw
from stream_others import BATCH, Figures, measure

from pipeline.core.cluster import cluster
from pipeline.core.records import SELECTION, TEXT_CATEGORIES, TIER
from pipeline.pictures.crops import Crop, downsize, square_crop
from pipeline.pictures.decoder import Header, Picture
from pipeline.storage.shards import Store
from trainer.cluster.launch import keep_freed_memory
from trainer.cluster.sample_stream import stream_source
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
DRAWN = 48  # different pictures; each row has one of them, made unique by appended bytes
GROUP_ROWS = 16  # rows per row group: 2 MB
SHARD_ROWS = 256
OWN = "Ray Data stream"
IGNORED = 2.0  # seconds after the first batch
MEASURED = 4.0  # seconds after the ignored ones
MONITORED = 16.0  # seconds of streaming in which memory is measured
INTERVAL = 0.5  # seconds between measurements of memory
SETTLING = 5.0  # seconds until the processes of the previous stream have ended
NICENESS = 19  # of the training's read tasks on a machine without a GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048, help="Pictures in the dataset. Default: 2048.")
    parser.add_argument("--rounds", type=int, default=4, help="Rounds of turns. Default: 4.")
    parser.add_argument(
        "--times", type=int, nargs="*", default=[1, 4, 16],
        help="Measure memory with this many times --images. Default: 1 4 16.",
    )  # fmt: skip
    parser.add_argument(
        "--environment", type=Path, default=Path(tempfile.gettempdir()) / "bench-stream-environment",
        help="Folder in which MosaicML Streaming and WebDataset are installed and kept. Default: %(default)s.",
    )  # fmt: skip
    parser.add_argument("--thread-pool", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.thread_pool:
        measure_thread_pool(args.thread_pool)
        return
    sys.stdout, rows = sys.stderr, sys.stdout  # jobs print lines that are not rows of the table
    python = prepare_environment(args.environment)
    with tempfile.TemporaryDirectory(prefix="bench-stream-") as temporary:
        folder = Path(temporary)
        for times in sorted({1, *args.times}):
            write_dataset(folder / f"dataset{times}", args.images, times, folder / "dataset1")
        training = resolve_training(folder, 1)
        convert = (training.selection.dataset, training.selection.images, training.selection.name)
        run_others([python, "--folder", folder / "others", "--convert", *convert])
        with cluster("bench", niceness=0):
            for row in compare(folder, training, python, args.rounds):
                print(row, file=rows, flush=True)
            for times in args.times:
                print(memory_row(folder, times), file=rows, flush=True)


# --- The dataset ------------------------------------------------------------------------------------------------------


def write_dataset(root: Path, images: int, times: int, original: Path) -> None:
    """Writes a tier of 512 pixels and a selection of all its rows. With `times` > 1, links the original's files."""
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
    """A picture of shades with the detail of a painting, lines and flat shapes."""
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


# --- The readers ------------------------------------------------------------------------------------------------------


def resolve_training(folder: Path, times: int) -> Training:
    """Stage 256 with a batch that a CPU can hold. Only its settings for samples are used."""
    settings = [f"batch_size={BATCH}", "model=tiny", "codec=dct", "text_encoder=local", f"resolution={SIDE}"]
    command = Command(
        stage="256", dataset=str(folder / f"dataset{times}"), run=str(folder / f"run{times}"), steps=10**6,
        settings=settings,
    )  # fmt: skip
    return resolve(command)


def load_data(training: Training) -> TrainingData:
    stage = training.stage
    return TrainingData.load(
        training.selection, training.crop(), batch_size=stage.batch_size, streams=stage.streams, window=stage.window,
        hold_out=stage.hold_out, workers=training.workers,
    )  # fmt: skip


def through_ray(training: Training, data: Any, ignored: float, seconds: float) -> Figures:
    """Measures in a Ray worker process, as in training. It and its read tasks end with the measurement."""

    @ray.remote(num_cpus=0, max_calls=1)
    def consume(training: Training, data: TrainingData) -> Figures:
        keep_freed_memory()
        started = time.perf_counter()
        source = stream_source(data, training, WorkerGroup(0, 1, None), print)
        return measure(started, source.batches(training), ignored, seconds)

    figures: Figures = ray.get(consume.remote(training, data))
    return figures


def measure_thread_pool(folder: Path) -> None:
    data = load_data(resolve_training(folder, 1))
    started = time.perf_counter()
    print(json.dumps(asdict(measure(started, thread_pool(data), IGNORED, MEASURED))), flush=True)
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


def prepare_environment(folder: Path) -> Path:
    """Path to the Python of an environment with the compared packages on top of this environment's packages."""
    python, ready = folder / "bin" / "python", folder / ".ready"
    wanted = [*PINNED, f"torch=={torch.__version__.partition('+')[0]}"]
    if not ready.exists() or ready.read_text() != "\n".join(wanted):
        venv.create(folder, with_pip=True, clear=True)
        [packages] = folder.glob("lib/python*/site-packages")
        (packages / "project.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True, stdout=sys.stderr)
        ready.write_text("\n".join(wanted))
    return python


def run_others(arguments: list) -> str:
    """Runs stream_others.py and returns its output."""
    python, *rest = map(str, arguments)
    return run_alone([python, str(Path(__file__).with_name("stream_others.py")), *rest])


def run_alone(command: list[str]) -> str:
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=partial(os.nice, NICENESS),
    )  # fmt: skip
    return done.stdout


# --- Measurements -----------------------------------------------------------------------------------------------------


def compare(folder: Path, training: Training, python: Path, rounds: int) -> Iterator[str]:
    shared = ray.put(load_data(training))
    options = ["--folder", folder / "others", "--side", SIDE, "--seconds", IGNORED, MEASURED]

    def other(reader: str, work: str) -> Figures:
        printed = run_others([python, *options, "--reader", reader, "--work", work])
        return Figures(**json.loads(printed.splitlines()[-1]))

    def threads() -> Figures:
        return Figures(
            **json.loads(run_alone([sys.executable, __file__, "--thread-pool", str(folder)]).splitlines()[-1])
        )

    readers = {
        OWN: partial(through_ray, training, shared, IGNORED, MEASURED),
        "bare thread pool": threads,
        "MosaicML Streaming, same work": partial(other, "mosaicml", "same"),
        "WebDataset, same work": partial(other, "webdataset", "same"),
        "MosaicML Streaming, typical user code": partial(other, "mosaicml", "plain"),
        "WebDataset, typical user code": partial(other, "webdataset", "plain"),
    }
    cold = readers[OWN]()
    yield f"| stream: first batch in a new Ray session | {cold.first_batch:.1f} s |"
    figures: dict[str, list[Figures]] = {name: [] for name in readers}
    for turn in range(rounds):
        for name, read in readers.items():
            figures[name].append(read())
            print(f"round {turn + 1}: {name}: {figures[name][-1]}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    for name, found in figures.items():
        rates = ", ".join(f"{one.rate:.0f}" for one in found)
        first = statistics.median(one.first_batch for one in found)
        ratio = statistics.median(own.rate / one.rate for own, one in zip(figures[OWN], found, strict=True))
        against = "" if name == OWN else f"; {OWN} / this, median: {ratio:.0%}"
        yield f"| stream: {name} | {rates} images/s{against}; first batch after {first:.1f} s |"


def memory_row(folder: Path, times: int) -> str:
    """A table row: memory of this process and its descendants, before a stream and while it runs."""
    training = resolve_training(folder, times)
    data = load_data(training)
    time.sleep(SETTLING)
    before = memory()
    with monitored_memory() as measured:
        figures = through_ray(training, ray.put(data), IGNORED, MONITORED)
    quarters = [max(measured[at * len(measured) // 4 : (at + 1) * len(measured) // 4]) for at in range(4)]
    shown = ", ".join(f"{quarter:.2f}" for quarter in quarters)
    return (
        f"| stream: memory with {data.row_index.count} pictures ({times}x), peak in each quarter of {MONITORED:.0f} s "
        f"| {shown} GiB, {before:.2f} before the stream; {figures.rate:.0f} images/s |"
    )


@contextmanager
def monitored_memory() -> Iterator[list[float]]:
    """A list to which measurements of `memory` are appended while the block runs."""
    measured, stopped = list[float](), threading.Event()

    def monitor() -> None:
        while not stopped.wait(INTERVAL):
            measured.append(memory())

    thread = threading.Thread(target=monitor)
    thread.start()
    try:
        yield measured
    finally:
        stopped.set()
        thread.join()


def memory() -> float:
    """Memory of this process and its descendants in GiB."""
    return sum(map(proportional_memory, process_tree(os.getpid()))) / 2**30


if __name__ == "__main__":
    main()
