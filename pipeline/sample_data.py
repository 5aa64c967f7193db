"""Draw the sample dataset: labelled illustrations in the raw layouts of Danbooru and Pixiv.

A few percent of the rows are broken, unusable or duplicated on purpose, as in real dumps. `planted` in run.json counts
them by site and kind, to check what the later jobs reject.
"""

import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

import pyarrow as pa

from pipeline.core.errors import UsageError
from pipeline.core.jobs import Parser, run
from pipeline.core.progress import progress_bar
from pipeline.drawings.sample_posts import FEWEST_IMAGES, DrawnPost, count_planted, plan, shards
from pipeline.drawings.sample_rows import SITES
from pipeline.storage.run_record import write_run_record
from pipeline.storage.shards import Store

VERSION = 2  # raise it whenever the same seed gives other rows
_GROUP_ROWS = 256  # per row group: about 2 MB


@dataclass(frozen=True, kw_only=True)
class SampleDataJob:
    out: str  # folder that gets danbooru/ and pixiv/
    images: int  # rows of both sites together
    seed: int


def parse_args(argv: list[str] | None) -> SampleDataJob:
    parser = Parser(prog="sample_data.py", description=__doc__)
    parser.add_argument("--out", default="sample-data/raw", metavar="FOLDER", help="default: sample-data/raw")
    parser.add_argument("--images", type=int, default=4400, metavar="N", help="rows of both sites. Default: 4400")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    job = SampleDataJob(**vars(parser.parse_args(argv)))
    if job.seed < 0:
        raise UsageError(f"--seed is {job.seed}; give 0 or more")
    if job.images < FEWEST_IMAGES:
        raise UsageError(f"--images {job.images} has no room for every planted kind. Use {FEWEST_IMAGES} or more.")
    return job


def main(argv: list[str] | None = None) -> None:
    job = parse_args(argv)
    write_samples(job, plan(job.seed, job.images), workers=os.cpu_count() or 1)


def write_samples(job: SampleDataJob, rows: dict[str, list[DrawnPost]], workers: int) -> None:
    """Draw the missing shards with at most `workers` processes. The files do not depend on their number."""
    started = time.time()
    store = Store(job.out)
    _claim_folder(store, job)
    todo = [(name, posts) for name, posts in shards(rows) if not store.exists(f"{name}.parquet")]
    planted = count_planted(rows)
    if not todo and store.exists("run.json"):
        print(f"sample_data: {store.root} already has the {job.images} illustrations of seed {job.seed}", flush=True)
    else:
        context = get_context("spawn")  # forking a process that has threads can deadlock
        with ProcessPoolExecutor(max(1, min(workers, len(todo))), mp_context=context) as pool:
            drawing = [pool.submit(draw_shard, store, name, job.seed, posts) for name, posts in todo]
            for shard in progress_bar(as_completed(drawing), len(drawing), "sample_data", "shard"):
                shard.result()
        write_run_record(store.root, "sample_data", started, job.images, job.images, {}, seed=job.seed, planted=planted)
    for site, kinds in planted.items():
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        print(f"sample_data: planted in {len(rows[site])} rows of {site}: {counts}", flush=True)


def draw_shard(store: Store, name: str, seed: int, posts: list[DrawnPost]) -> None:
    """Draw and write the shard `name`, which is <site>/<number>."""
    schema, raw_row = SITES[name.split("/")[0]]
    with store.writing_table(f"{name}.parquet", schema) as write:
        for start in range(0, len(posts), _GROUP_ROWS):
            group = [raw_row(seed, post) for post in posts[start : start + _GROUP_ROWS]]
            write(pa.Table.from_pylist(group, schema))


def _claim_folder(store: Store, job: SampleDataJob) -> None:
    """Record in sample.json what is drawn here. Raises UsageError if the folder holds anything else."""
    wanted = {"seed": job.seed, "images": job.images, "version": VERSION}
    fix = "Give another --out, or delete that folder."
    if store.exists("sample.json"):
        found = json.loads(store.read("sample.json"))
        if found != wanted:
            raise UsageError(f"{store.root} holds the samples of {found}, not of {wanted}. {fix}")
    elif any(store.shards(site) for site in SITES):
        raise UsageError(f"{store.root} holds shards that this job did not draw. {fix}")
    else:
        store.write("sample.json", json.dumps(wanted).encode())


if __name__ == "__main__":
    run(main)
