"""Benchmark: the report job over a generated dataset: seconds, peak memory, size of the page.

The metadata resemble those of real posts in number and length. The pictures are PNGs of noise: 8 pixels wide, and one
in a thousand 256 pixels wide. Each shard has captions and rows of two selections. The report is a separate process.

    python tests/bench/report.py --rows 1000000
"""

import argparse
import io
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.core.records import CAPTIONS, IMAGES, REJECTED, SELECTION, TAG_CATEGORIES
from pipeline.storage.shards import Store

ROWS_PER_SHARD, ROWS_PER_GROUP = 4000, 200
# By category: size of the vocabulary, tags per picture. Frequencies fall as 1 / rank^1.2.
VOCABULARY = {"artist": 400_000, "character": 100_000, "copyright": 20_000, "general": 60_000, "meta": 500}
PER_PICTURE = {"artist": 1, "character": 2, "copyright": 1, "general": 28, "meta": 3}
WORDS = 45  # per caption


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="Rows to generate. Default: 1000000.")
    parser.add_argument(
        "--dataset", help="Folder to write, or one that an earlier run wrote. Default: a temporary folder."
    )
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        store = Store(args.dataset or f"{folder}/dataset")
        if not store.exists("dataset.json"):
            generate(store, args.rows)
        started = time.perf_counter()
        job = Path(__file__).parents[2] / "pipeline" / "report.py"
        subprocess.run([sys.executable, str(job), "--dataset", store.root], check=True)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        size = len(store.read("report.html")) / 1e6
        rows = sum(store.rows(f"images/{name}.parquet") for name in store.shards("images"))
    print(f"| report: {rows:,} rows | {seconds:.1f} s, peak memory {peak:.0f} MiB, page of {size:.2f} MB |")


def generate(store: Store, rows: int) -> None:
    vocabulary = {name: pa.array([f"{name}_word_{i}" for i in range(size)]) for name, size in VOCABULARY.items()}
    for number, start in enumerate(range(0, rows, ROWS_PER_SHARD)):
        generate_shard(store, f"shard-{number:05}", start, min(ROWS_PER_SHARD, rows - start), vocabulary)
    store.write("dataset.json", b"{}")


def generate_shard(store: Store, shard: str, start: int, rows: int, vocabulary: dict[str, pa.Array]) -> None:
    rng = np.random.default_rng(start)
    ids = pa.array([f"danbooru:{number}" for number in range(start, start + rows)])
    tags = {name: random_lists(rng, rows, vocabulary[name], PER_PICTURE[name]) for name in TAG_CATEGORIES}
    pictures = [png(rng, 256) if number % 1000 == 0 else png(rng, 8) for number in range(rows)]
    captions = words(rng, rows, vocabulary["general"])
    images = {
        "id": ids,
        "source": pa.array(np.where(rng.random(rows) < 0.8, "danbooru", "pixiv")),
        "image": pa.array(pictures, pa.binary()),
        "format": pa.array(["PNG"] * rows),
        "width": pa.array(rng.integers(200, 4000, rows), pa.int32()),
        "height": pa.array(rng.integers(200, 4000, rows), pa.int32()),
        "notes": pa.nulls(rows, pa.string()),
        "sha256": pa.array([f"{number:064x}" for number in range(start, start + rows)]),
        "phash": pa.array(rng.integers(0, 2**63, rows), pa.uint64()),
        "thumbnail": pa.nulls(rows, pa.binary(1536)),
        "rating": pa.array(rng.choice(["general", "sensitive", "questionable", "explicit"], rows)),
        "score": pa.array(rng.lognormal(2, 2, rows), pa.float64()).cast(pa.int32(), safe=False),
        "favourites": pa.array(rng.lognormal(3, 2, rows), pa.float64()).cast(pa.int32(), safe=False),
        "created_at": pa.array(rng.integers(1.1e9, 1.75e9, rows), pa.timestamp("s", tz="UTC")),
        **{f"tags_{name}": lists for name, lists in tags.items()},
        "page": pa.array(np.zeros(rows), pa.float64()).cast(pa.int32()),
        "parent": pa.nulls(rows, pa.string()),
        "pixiv_id": pa.nulls(rows, pa.int64()),
    }
    table = pa.table(images, IMAGES)
    with store.writing_table(f"images/{shard}.parquet", IMAGES) as write:
        for group in range(0, rows, ROWS_PER_GROUP):
            write(table.slice(group, ROWS_PER_GROUP))
    refused = rejected(rng, [f"danbooru:{start}x{number}" for number in range(rows // 20)], ["truncated", "empty"], "")
    store.write_table(f"rejected/{shard}.parquet", refused, REJECTED)
    known = {"id": ids, "caption": captions}
    known |= {name: pa.array([name] * rows) for name in ("engine", "model", "prompt_version")}
    captioned = pa.table([known.get(field.name, pa.nulls(rows, field.type)) for field in CAPTIONS], schema=CAPTIONS)
    store.write_table(f"captions/{shard}.parquet", captioned, CAPTIONS)
    for name, share in (("512", 0.8), ("1024", 0.3)):
        kept = np.flatnonzero(rng.random(rows) < share)
        write_selection(store, f"selections/{name}", shard, rng, table, captions, kept)


def write_selection(
    store: Store, folder: str, shard: str, rng: np.random.Generator, images: pa.Table, captions: pa.Array,
    kept: np.ndarray,
) -> None:  # fmt: skip
    others = np.setdiff1d(np.arange(images.num_rows), kept)
    texts = {name: images[f"tags_{name}"].take(kept) for name in TAG_CATEGORIES}
    texts["special"] = texts["meta"]
    columns = {
        "id": images["id"].take(kept),
        "row": pa.array(kept, pa.int32()),
        **texts,
        "caption": captions.take(kept),
    }
    for name, choices in (("quality", ["masterpiece", "worst quality"]), ("era", ["old"]), ("rating", ["safe"])):
        columns[name] = pa.array(rng.choice(choices, len(kept)))
    columns |= {name: pa.nulls(len(kept), pa.int32()) for name in ("bookmarks", "views")}
    store.write_table(f"{folder}/{shard}.parquet", pa.table(columns).select(SELECTION.names), SELECTION)
    reasons = ["duplicate", "too small", *(f"tag number {i}" for i in range(20))]
    keys = images["id"].take(others).to_pylist()
    refused = rejected(rng, keys, reasons, f"of {images['id'][0].as_py()}")
    store.write_table(f"{folder}/rejected/{shard}.parquet", refused, REJECTED)


def rejected(rng: np.random.Generator, keys: list[str], reasons: list[str], detail: str) -> pa.Table:
    columns = [keys, rng.choice(reasons, len(keys)).tolist(), [detail] * len(keys), [None] * len(keys)]
    return pa.table(dict(zip(REJECTED.names, columns, strict=True)), REJECTED)


def random_lists(rng: np.random.Generator, rows: int, vocabulary: pa.Array, per_row: int) -> pa.Array:
    tags = vocabulary.take(pa.array(ranks(rng, len(vocabulary), rows * per_row)))
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1) * per_row, pa.int32()), tags)


def ranks(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Random ranks below `size` whose frequency falls as 1 / rank^1.2."""
    drawn = (1 - rng.random(count) * (1 - size**-0.2)) ** -5
    return np.minimum(drawn.astype(np.int64) - 1, size - 1)


def words(rng: np.random.Generator, rows: int, vocabulary: pa.Array) -> pa.Array:
    several = vocabulary.take(pa.array(ranks(rng, len(vocabulary), WORDS * 50))).to_pylist()
    texts = [" ".join(several[i : i + WORDS]) for i in range(0, len(several), WORDS)]
    return pa.array(texts).take(pa.array(rng.integers(0, len(texts), rows)))


def png(rng: np.random.Generator, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
