"""Time of curate.py on generated metadata: `python tests/bench/curate.py [--rows 1000000] [--keep FOLDER]`.

The rows are Danbooru's in their numbers: about 30 tags each from a vocabulary with Zipf's frequencies, ratings, dates
and favourites as on the site, one row in a hundred a copy. The pictures are one byte each: curate reads none. The job
runs as its user runs it, in a process of its own with a Ray of its own; its peak memory is the driver's.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.records import CAPTIONS, IMAGES, TAG_CATEGORIES
from pipeline.shards import Store

ROOT = Path(__file__).parents[2]
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
    words = "A girl with long hair stands in a field of flowers under a wide sky and looks back over her shoulder. "
    captions = {
        "id": ids, "caption": [words * 3] * rows, "reason": [None] * rows, "engine": ["none"] * rows,
        "model": [""] * rows, "prompt_version": [""] * rows,
    }  # fmt: skip
    store.write_table(f"captions/{name}", pa.table(captions, schema=CAPTIONS), CAPTIONS)


def tag_lists(rng: np.random.Generator, category: str, rows: int) -> pa.Array:
    mean, vocabulary = _TAGS[category]
    counts = rng.poisson(mean, rows)
    odds = 1 / np.arange(1, vocabulary + 1)
    drawn = np.searchsorted(np.cumsum(odds) / odds.sum(), rng.random(counts.sum()))
    names = pa.array([f"{category}_tag_number_{rank}" for rank in range(vocabulary + 1)])
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), names.take(pa.array(drawn)))


def peak_memory(process: int) -> float:
    """GiB of this process alone, without Ray's workers; Linux only."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--keep", metavar="FOLDER", help="where to generate the dataset, used again if it is there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.keep or temporary
        missing = sorted(set(range(args.shards)) - {int(name[-4:]) for name in Store(root).shards("captions")})
        with ProcessPoolExecutor(2) as writers:
            list(writers.map(partial(write_shard, root=root, rows=args.rows // args.shards), missing))
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        for title in ("first", "again, nothing changed"):
            started, peak = time.time(), 0.0
            command = [sys.executable, ROOT / "pipeline" / "curate.py", "--dataset", root, "--stage", "256"]
            with subprocess.Popen(command, env=environment) as job:
                while job.poll() is None:
                    peak = max(peak, peak_memory(job.pid))
                    time.sleep(0.1)
            seconds = time.time() - started
            print(f"{title}: exit code {job.returncode}, {seconds:.1f} s, {args.rows / seconds:,.0f} rows/s, "
                  f"driver's peak memory {peak:.2f} GiB")  # fmt: skip


if __name__ == "__main__":
    main()
