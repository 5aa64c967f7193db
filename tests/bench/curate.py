"""Benchmark: time and memory of the curate job over generated metadata, and of a rerun without changes.

The rows resemble Danbooru's: about 30 tags each from a vocabulary with Zipf frequencies, the site's distributions of
ratings, dates and favourites, captions of 300 characters, and one near duplicate per hundred rows. Each picture is one
byte, because curate reads no pictures. Memory is that of all processes together, including Ray.

    python tests/bench/curate.py --rows 10000000
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from memory import Usage, monitored

from pipeline.core.records import CAPTIONS, IMAGES, TAG_CATEGORIES
from pipeline.storage.shards import Store

ROOT = Path(__file__).parents[2]
NAME = "bench"  # of the selection
_GROUP_ROWS = 250  # rows per row group, as in a file whose row groups hold 32 MB of pictures
# By category: mean number of tags per row, size of the vocabulary.
_TAGS = {"general": (25, 30_000), "character": (1.2, 50_000), "copyright": (1.1, 8_000), "artist": (1, 80_000),
         "meta": (2, 300)}  # fmt: skip


def write_shard(number: int, root: str, rows: int) -> None:
    rng = np.random.default_rng(number)
    ids = [f"danbooru:{number * rows + row}" for row in range(rows)]
    content = [rng.bytes(32).hex() for _ in range(rows)]
    phash = rng.integers(1, 2**64, rows, dtype=np.uint64)
    width, height = rng.integers(600, 3000, (2, rows)).astype(np.int32)
    for copy in rng.choice(np.arange(1, rows), rows // 100, replace=False).tolist():
        phash[copy] = phash[copy - 1] ^ np.uint64(1 << int(rng.integers(64)))
        width[copy], height[copy] = width[copy - 1], height[copy - 1]
    years = 2006 + 20 * rng.random(rows) ** 0.6
    columns = {
        "id": ids,
        "source": ["danbooru"] * rows,
        "image": [b"."] * rows,
        "format": ["JPEG"] * rows,
        "width": width,
        "height": height,
        "notes": pa.nulls(rows, pa.string()),
        "sha256": content,
        "phash": phash,
        "thumbnail": [bytes(1536)] * rows,  # alike: every near hash is that of a copy
        "rating": rng.choice(["general", "sensitive", "questionable", "explicit"], rows, p=[0.4, 0.4, 0.1, 0.1]),
        "score": rng.integers(0, 500, rows).astype(np.int32),
        "favourites": np.exp(rng.normal(2, 1.3, rows)).astype(np.int32),
        "created_at": pa.array(((years - 1970) * 31_556_952).astype(np.int64), pa.timestamp("s", tz="UTC")),
        **{f"tags_{category}": tag_lists(rng, category, rows) for category in TAG_CATEGORIES},
        "page": np.zeros(rows, np.int32),
        "parent": pa.nulls(rows, pa.string()),
        "pixiv_id": pa.nulls(rows, pa.int64()),
    }
    store, name = Store(root), f"danbooru-{number:04d}.parquet"
    table = pa.table([pa.array(columns[field.name], field.type) for field in IMAGES], schema=IMAGES)
    with store.writing_table(f"images/{name}", IMAGES, raw=str(number), footer=str(number)) as write:
        for start in range(0, rows, _GROUP_ROWS):
            write(table.slice(start, _GROUP_ROWS))
    same = dict.fromkeys(("engine", "model", "prompt_version"), pa.repeat("none", rows))
    known = {"id": pa.array(ids), "caption": captions(rng, rows)} | same
    table = pa.table([known.get(field.name, pa.nulls(rows, field.type)) for field in CAPTIONS], schema=CAPTIONS)
    store.write_table(f"captions/{name}", table, CAPTIONS)


def captions(rng: np.random.Generator, rows: int) -> pa.Array:
    """Captions of three sentences, 300 characters; almost all are different."""
    sentences = pa.array(
        [
            f"A {size} {who} in {colour} stands {where} under a wide {colour} sky and looks {aim} over the shoulder."
            for size in ("small", "tall", "young", "smiling", "serious")
            for who in ("girl with long hair", "boy with glasses", "cat with a red bow", "knight with a sword")
            for colour in ("red", "pale blue", "green", "dark grey")
            for where in ("in a field of flowers", "on a crowded street", "beside a quiet lake", "before a window")
            for aim in ("back", "down", "to the left")
        ]
    )
    drawn = [sentences.take(pa.array(numbers)) for numbers in rng.integers(0, len(sentences), (3, rows))]
    return pc.binary_join_element_wise(*drawn, " ")


def tag_lists(rng: np.random.Generator, category: str, rows: int) -> pa.Array:
    mean, vocabulary = _TAGS[category]
    counts = rng.poisson(mean, rows)
    weights = 1 / np.arange(1, vocabulary + 1)
    drawn = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(counts.sum()))
    names = pa.array([f"{category}_tag_number_{rank}" for rank in range(vocabulary + 1)])
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), names.take(pa.array(drawn)))


def run_curate(root: str) -> tuple[float, Usage]:
    """Wall-clock seconds of the job, and the resources used by all its processes."""
    command = [sys.executable, ROOT / "pipeline" / "curate.py", "--dataset", root, "--stage", "256", "--name", NAME]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=sys.stderr) as job, monitored(job.pid) as usage:
        assert job.wait() == 0
    return time.perf_counter() - started, usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="Rows to generate. Default: 1000000.")
    parser.add_argument("--shards", type=int, help="Number of shards. Default: one per 25,000 rows.")
    parser.add_argument(
        "--keep",
        metavar="FOLDER",
        help="Where to keep the dataset. Existing shards are reused. Default: a temporary folder.",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root, shards = args.keep or temporary, args.shards or max(1, args.rows // 25_000)
        shard_rows = args.rows // shards
        missing = sorted(set(range(shards)) - {int(name[-4:]) for name in Store(root).shards("captions")})
        with ProcessPoolExecutor(os.cpu_count()) as writers:
            list(writers.map(partial(write_shard, root=root, rows=shard_rows), missing))
        shutil.rmtree(Path(root, "selections", NAME), ignore_errors=True)
        rows = sum(Store(root).rows(f"images/{name}.parquet") for name in Store(root).shards("images"))
        for title in ("", ", rerun without changes"):
            seconds, usage = run_curate(root)
            print(
                f"| curate: {rows:,} rows{title} | {seconds:.0f} s, {rows / seconds:,.0f} rows/s, "
                f"{usage.cpu_seconds:.0f} s of CPU time; peak memory {usage.peak / 2**30:.2f} GiB, "
                f"of which the driver {usage.peak_of_root / 2**30:.2f} GiB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
