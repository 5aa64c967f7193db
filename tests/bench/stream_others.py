"""What tests/bench/stream.py compares with: MosaicML Streaming and WebDataset, each as its own guide has it.

Run by that bench, in an environment of its own. Both read local files through a DataLoader of torch's with two workers,
shuffled, without an epoch's end; a batch is a uint8 tensor (128, side, side, 3) and its texts.
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

BATCH = 128  # the micro batch of stage 256
SHARD_BYTES = 1 << 26  # MosaicML Streaming's default
WORKERS = os.cpu_count() or 2
SHUFFLED = 1000  # samples that a worker of WebDataset's has in memory, as in its guide
EPOCH = 100_000  # samples of MosaicML Streaming's: of several rounds through the pictures, as none ends here


@dataclass(frozen=True)
class Figures:
    """Of one stream."""

    first_batch: float  # seconds from the making of the reader
    rate: float  # images/s, once it is under way


def measure(started: float, batches: Iterable[Any], left_out: float, seconds: float) -> Figures:
    """`left_out`: seconds after the first batch, whose images do not count; `seconds`: those after them, which do."""
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


# --- What becomes of a sample -----------------------------------------------------------------------------------------

Work = Callable[[bytes, dict[str, Any]], tuple[torch.Tensor, str]]


def same_work(generator: np.random.Generator, side: int, image: bytes, row: dict[str, Any]) -> tuple[torch.Tensor, str]:
    """Our crop, and the text drawn anew."""
    crop = square_crop(image, side, *generator.random(2))
    assert isinstance(crop, Crop)
    return torch.from_numpy(crop.pixels_HWC), training_text(text_parts(row), generator, CaptionConfig())


def plain_work(
    generator: np.random.Generator, side: int, image: bytes, row: dict[str, Any]
) -> tuple[torch.Tensor, str]:
    """Decoded whole, resized whole, cut; the text as it was stored."""
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    scale = side / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    x0, y0 = generator.integers(0, (width - side + 1, height - side + 1)).tolist()
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized.crop((x0, y0, x0 + side, y0 + side)))), row["text"]


WORKS = {"same": same_work, "plain": plain_work}


# --- The two readers --------------------------------------------------------------------------------------------------


def streaming() -> Any:
    """The package. It imports torchvision, whose build for CUDA does not import beside torch for the CPU unless the two
    operators that it looks for are declared."""
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
    """The selected pictures' bytes and texts in both formats, with the options of their guides."""
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
    parser.add_argument("--folder", type=Path, required=True, help="of the converted pictures")
    parser.add_argument("--convert", nargs=3, metavar=("DATASET", "IMAGES", "SELECTION"))
    parser.add_argument("--reader", choices=READERS)
    parser.add_argument("--work", choices=WORKS)
    parser.add_argument("--side", type=int, help="pixels")
    parser.add_argument("--seconds", type=float, nargs=2, help="left out after the first batch, then measured")
    args = parser.parse_args()
    if args.convert:
        convert(*args.convert, args.folder)
        return
    work = partial(WORKS[args.work], np.random.default_rng(0), args.side)
    if args.reader == "mosaicml":
        streaming()  # its import is no part of the stream's start, as those of the others are not
    started = time.perf_counter()
    figures = measure(started, READERS[args.reader](args.folder, work), *args.seconds)
    print(json.dumps(asdict(figures)), flush=True)
    os._exit(0)  # the workers of an endless stream go with it


if __name__ == "__main__":
    main()
