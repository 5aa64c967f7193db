"""BENCH: curate over generated metadata, as its user runs it: time and memory; and again where nothing changed.

The rows are Danbooru's in their numbers: about 30 tags each from a vocabulary with Zipf's frequencies, ratings, dates
and favourites as on the site, 300 characters of caption, one row in a hundred a copy. The pictures are one byte each:
curate reads none. Nothing is compared; memory is that of all processes together, Ray's too.

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
from memory import Usage, watching

from pipeline.core.records import CAPTIONS, IMAGES, TAG_CATEGORIES
from pipeline.storage.shards import Store

ROOT = Path(__file__).parents[2]
NAME = "bench"  # of the selection
_GROUP_ROWS = 250  # of a row group: 32 MB of pictures
# Mean number of tags of a row and size of the vocabulary, by category.
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
    """Three sentences each, 300 characters; all but a few are different texts."""
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
    odds = 1 / np.arange(1, vocabulary + 1)
    drawn = np.searchsorted(np.cumsum(odds) / odds.sum(), rng.random(counts.sum()))
    names = pa.array([f"{category}_tag_number_{rank}" for rank in range(vocabulary + 1)])
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), names.take(pa.array(drawn)))


def curate(root: str) -> tuple[float, Usage]:
    """Seconds of the job, and what all of its processes used."""
    command = [sys.executable, ROOT / "pipeline" / "curate.py", "--dataset", root, "--stage", "256", "--name", NAME]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
    started = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=sys.stderr) as job, watching(job.pid) as usage:
        assert job.wait() == 0
    return time.perf_counter() - started, usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, help="default: of 25,000 rows each")
    parser.add_argument("--keep", metavar="FOLDER", help="where to generate the dataset, used again if it is there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root, shards = args.keep or temporary, args.shards or max(1, args.rows // 25_000)
        shard_rows = args.rows // shards
        missing = sorted(set(range(shards)) - {int(name[-4:]) for name in Store(root).shards("captions")})
        with ProcessPoolExecutor(os.cpu_count()) as writers:
            list(writers.map(partial(write_shard, root=root, rows=shard_rows), missing))
        shutil.rmtree(Path(root, "selections", NAME), ignore_errors=True)
        rows = sum(Store(root).rows(f"images/{name}.parquet") for name in Store(root).shards("images"))
        for title in ("", ", again where nothing changed"):
            seconds, usage = curate(root)
            print(
                f"| curate, {rows:,} rows{title} | {seconds:.0f} s, {rows / seconds:,.0f} rows/s, "
                f"{usage.cpu_seconds:.0f} s of CPU; peak memory {usage.peak / 2**30:.2f} GiB, "
                f"of it the driver's {usage.peak_of_first / 2**30:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
