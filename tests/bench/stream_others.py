"""The baselines of tests/bench/stream.py: MosaicML Streaming and WebDataset, each used as its guide recommends.

That script runs this one in a separate environment. Both read local files through torch's DataLoader with a worker per
CPU, shuffled and endless. A batch is a uint8 tensor (128, side, side, 3) and its texts.
"""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from pipeline.core.records import TEXT_CATEGORIES
from pipeline.pictures.crops import Crop, square_crop
from pipeline.storage.shards import Store
from trainer.samples.data import text_parts
from trainer.samples.training_text import CaptionConfig, full_text, training_text

BATCH = 128  # samples: the micro batch of stage 256
SHARD_BYTES = 1 << 26  # MosaicML Streaming's default
WORKERS = os.cpu_count() or 2
SHUFFLED = 1000  # samples in the shuffle buffer of a WebDataset worker, as in its guide
EPOCH = 100_000  # samples per epoch of MosaicML Streaming: more than a measurement reads, so that no epoch ends


@dataclass(frozen=True)
class Figures:
    first_batch: float  # seconds from the construction of the reader
    rate: float  # images/s after the warm-up


def measure(started: float, batches: Iterable[Any], left_out: float, seconds: float) -> Figures:
    """Ignores the images of `left_out` seconds after the first batch, then counts those of the next `seconds`."""
    first = begun = 0.0
    count = 0
    for _ in batches:
        now = time.perf_counter()
        first = first or now
        if begun:
            count += BATCH
            if now - begun >= seconds:
                return Figures(first - started, count / (now - begun))
        elif now - first >= left_out:
            begun = now
    raise AssertionError("the stream ended")


# --- Work per sample --------------------------------------------------------------------------------------------------

Work = Callable[[bytes, dict[str, Any]], tuple[torch.Tensor, str]]


def same_work(generator: np.random.Generator, side: int, image: bytes, row: dict[str, Any]) -> tuple[torch.Tensor, str]:
    """The project's crop and randomly assembled text."""
    crop = square_crop(image, side, *generator.random(2))
    assert isinstance(crop, Crop)
    return torch.from_numpy(crop.pixels_HWC), training_text(text_parts(row), generator, CaptionConfig())


def plain_work(
    generator: np.random.Generator, side: int, image: bytes, row: dict[str, Any]
) -> tuple[torch.Tensor, str]:
    """Decodes and resizes the whole picture, then crops it. The text is the stored one."""
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    scale = side / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    x0, y0 = generator.integers(0, (width - side + 1, height - side + 1)).tolist()
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized.crop((x0, y0, x0 + side, y0 + side)))), row["text"]


WORKS = {"same": same_work, "plain": plain_work}


# --- The two readers --------------------------------------------------------------------------------------------------


def streaming() -> Any:
    """Imports and returns the package `streaming`.

    It imports torchvision, whose CUDA build can be imported beside torch for CPUs only if two operators are declared.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    import streaming

    return streaming


def mosaicml_batches(folder: Path, work: Work) -> Iterator[Any]:
    package = streaming()

    class Pictures(package.StreamingDataset):
        def __getitem__(self, at: int) -> tuple[torch.Tensor, str]:
            sample = super().__getitem__(at)
            return work(sample["image"], sample["row"])

    pictures = Pictures(local=str(folder / "mosaicml"), shuffle=True, batch_size=BATCH, epoch_size=EPOCH)
    yield from DataLoader(pictures, batch_size=BATCH, num_workers=WORKERS)


def webdataset_batches(folder: Path, work: Work) -> Iterator[Any]:
    import webdataset

    files = sorted(str(path) for path in (folder / "webdataset").glob("*.tar"))
    pictures = (
        webdataset.WebDataset(files, resampled=True, shardshuffle=False)
        .shuffle(SHUFFLED)
        .map(lambda sample: work(sample["jpg"], json.loads(sample["json"])))
        .batched(BATCH, collation_fn=default_collate)
    )
    yield from DataLoader(pictures, batch_size=None, num_workers=WORKERS)


READERS = {"mosaicml": mosaicml_batches, "webdataset": webdataset_batches}


def convert(dataset: str, images: str, selection: str, folder: Path) -> None:
    """Writes the selected pictures and texts in both formats, with the options of their guides."""
    import webdataset

    columns = {"image": "bytes", "row": "json"}
    (folder / "webdataset").mkdir(parents=True)
    pattern = str(folder / "webdataset" / "%05d.tar")
    with (
        streaming().MDSWriter(out=str(folder / "mosaicml"), columns=columns, size_limit=SHARD_BYTES) as mosaicml,
        webdataset.ShardWriter(pattern, maxsize=SHARD_BYTES, verbose=0) as tar,
    ):
        for number, (image, row) in enumerate(samples(Store(dataset), images, selection)):
            mosaicml.write({"image": image, "row": row})
            tar.write({"__key__": f"{number:08d}", "jpg": image, "json": json.dumps(row).encode()})


def samples(store: Store, images: str, selection: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    names = (*TEXT_CATEGORIES, "caption", "quality", "era", "rating")
    for shard in store.shards(f"selections/{selection}"):
        pictures = store.read_table(f"{images}/{shard}.parquet", ["image"])["image"]
        for row in store.read_table(f"selections/{selection}/{shard}.parquet").to_pylist():
            text = full_text(text_parts(row))
            yield pictures[row["row"]].as_py(), {name: row[name] for name in names} | {"text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="Folder of the converted pictures.")
    parser.add_argument("--convert", nargs=3, metavar=("DATASET", "IMAGES", "SELECTION"), help="Convert and exit.")
    parser.add_argument("--reader", choices=READERS, help="Library to measure.")
    parser.add_argument("--work", choices=WORKS, help="Work per sample.")
    parser.add_argument("--side", type=int, help="Side of the crop in pixels.")
    parser.add_argument(
        "--seconds", type=float, nargs=2, help="Seconds to ignore after the first batch, then seconds to measure."
    )
    args = parser.parse_args()
    if args.convert:
        convert(*args.convert, args.folder)
        return
    work = partial(WORKS[args.work], np.random.default_rng(0), args.side)
    if args.reader == "mosaicml":
        streaming()  # imported before the clock starts, like the other packages
    started = time.perf_counter()
    figures = measure(started, READERS[args.reader](args.folder, work), *args.seconds)
    print(json.dumps(asdict(figures)), flush=True)
    os._exit(0)  # also ends the workers of the endless stream


if __name__ == "__main__":
    main()
