"""Benchmark: the ingest job against two processes that do the same validation and writing in a loop, and its memory.

The input is raw shards of noisy JPEG drawings with one row group each, the worst case for a reader's memory. The job
runs as a user starts it and is timed twice: from its command, and from the moment when Ray has started.

    python tests/bench/ingest.py --shards 8 --rows 100 --times 1 8
"""

import argparse
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from memory import monitored
from PIL import Image

from pipeline.core.records import IMAGES
from pipeline.core.tables import labelled
from pipeline.ingestion.commit import row_groups
from pipeline.ingestion.preflight import plan_shards
from pipeline.ingestion.raw_rows import all_rows, read_raw
from pipeline.ingestion.rules import IngestRules
from pipeline.ingestion.validation import check_rows
from pipeline.storage.shards import Store

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8, help="Raw shards. Default: 8.")
    parser.add_argument("--rows", type=int, default=100, help="Pictures per shard. Default: 100.")
    parser.add_argument("--side", type=int, default=1100, help="Width of the pictures in pixels. Default: 1100.")
    parser.add_argument(
        "--times", type=int, nargs="+", default=[1, 8], help="Run with this many times --shards. Default: 1 8."
    )
    parser.add_argument("--downsize", type=int, help="Let the job, but not the loop, also write a tier of this size.")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-ingest-"))
    try:
        pictures = drawings(args.side)
        for shard in range(args.shards * max(args.times)):
            write_raw(folder / "raw" / f"{shard:04d}.parquet", pictures, shard, args.rows)
        for times in args.times:
            files = sorted((folder / "raw").iterdir())[: args.shards * times]
            rows = len(files) * args.rows
            before = bare_loop(files, folder / f"before{times}")
            seconds, working, memory = run_job(files, folder / f"job{times}", args.downsize)
            bare = (before + bare_loop(files, folder / f"after{times}")) / 2
            megabytes = sum(file.stat().st_size for file in files) / 1e6
            print(
                f"| ingest: {rows:,} JPEGs, {megabytes:.0f} MB, job / loop in two processes | "
                f"{rows / working:.1f} / {rows / bare:.1f} rows/s = {bare / working:.0%}; {bare / seconds:.0%} with "
                f"the start of Ray, {seconds:.0f} s in total; peak memory {memory / 2**30:.2f} GiB |",
                flush=True,
            )
    finally:
        shutil.rmtree(folder)


def drawings(side: int) -> list[bytes]:
    generator = np.random.default_rng(0)
    pictures = []
    for _ in range(16):
        coarse = Image.fromarray(generator.integers(0, 255, (side // 16, side // 16, 3), np.uint8))
        buffer = io.BytesIO()
        coarse.resize((side, side * 5 // 4), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
        pictures.append(buffer.getvalue())
    return pictures


def write_raw(path: Path, pictures: list[bytes], shard: int, rows: int) -> None:
    path.parent.mkdir(exist_ok=True)
    posts = [
        # The appended number makes the bytes of each file unique.
        {
            "id": shard * rows + row,
            "image": pictures[row % len(pictures)] + b"%d" % (shard * rows + row),
            "tag_string_general": "long_hair blue_eyes smile " * 8,
            "rating": "g",
            "fav_count": row,
        }
        for row in range(rows)
    ]
    pq.write_table(pa.Table.from_pylist(posts), path, row_group_size=rows)


def bare_loop(files: list[Path], dataset: Path) -> float:
    """Seconds that two processes take, each with every second file."""
    plan = plan_shards([str(file) for file in files], "auto", None, Store(str(dataset)), IngestRules())
    parts = list(plan.shards.values())
    started = time.perf_counter()
    workers = [multiprocessing.Process(target=validate_all, args=(parts[i::2], str(dataset))) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    return time.perf_counter() - started


def validate_all(parts: list, dataset: str) -> None:
    """The same checks, and each shard written once: without partial files, and lost if the process is killed."""
    for raw in parts:
        with row_groups(Store(dataset), f"images/{raw.shard}.parquet", IMAGES, {}) as append:
            for table in read_raw(raw, all_rows(raw), IngestRules()):
                for checked in check_rows(labelled(table, raw.shard), IngestRules()):
                    checked = checked.append_column("image", table["image"])
                    append(checked.select(IMAGES.names).cast(IMAGES))


def run_job(files: list[Path], dataset: Path, downsize: int | None) -> tuple[float, float, int]:
    """Seconds in total, seconds from the start of Ray on, and the peak memory of all processes together in bytes."""
    command = [sys.executable, str(ROOT / "pipeline/ingest.py"), "--raw", *map(str, files), "--dataset", str(dataset)]
    command += ["--downsize", str(downsize)] if downsize else []
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"RAY_ADDRESS": ""})
    working = None
    with monitored(process.pid) as usage:
        for line in process.stdout or ():
            if "Ray with" in line:
                working = time.perf_counter()
        assert process.wait() == 0
    assert working is not None
    ended = time.perf_counter()
    return ended - started, ended - working, usage.peak


if __name__ == "__main__":
    main()
