"""JOB: raw Danbooru and Pixiv shards -> checked images; every refused row is kept with its reason."""

import json
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

from pipeline.jobs import Parser, ShardsFailed, UsageError, default_dataset, run, versions, write_run_record
from pipeline.records import SCHEMA_VERSION
from pipeline.shards import Store, find_parquet


@dataclass(frozen=True, kw_only=True)
class IngestJob:
    raw: tuple[str, ...]  # files, folders or s3:// prefixes
    source: str  # danbooru | pixiv | auto
    dataset: str


def parse_args() -> IngestJob:
    parser = Parser(prog="ingest.py", description=__doc__)
    parser.add_argument("--raw", nargs="+", required=True, metavar="PATH", help="parquet files or folders of them")
    parser.add_argument("--source", choices=("danbooru", "pixiv", "auto"), default="auto")
    parser.add_argument("--dataset", default=default_dataset(), metavar="ROOT", help="folder or s3://bucket/prefix")
    args = parser.parse_args()
    return IngestJob(raw=tuple(args.raw), source=args.source, dataset=args.dataset)


def main() -> None:
    job = parse_args()
    started = time.time()
    raw_files = find_raw(job.raw)
    # Here and not above: these take seconds to import, which --help and a mistyped path should not cost.
    from pipeline.cluster import cluster
    from pipeline.dataflow import map_shards
    from pipeline.images import Limits
    from pipeline.validation import finished_shards, plan_shards, validate_shard

    plan = plan_shards(raw_files, job.source)
    dataset = Store(job.dataset)
    if not dataset.exists("dataset.json"):
        dataset.write("dataset.json", json.dumps({"schema_version": SCHEMA_VERSION, "created_by": versions()}).encode())
    finished = finished_shards(plan, dataset)
    todo = [raw for raw in plan.shards if raw.shard not in finished]
    print(f"ingest: {len(plan.shards)} raw shards, {len(plan.shards) - len(todo)} of them finished before", flush=True)

    failed = plan.unreadable
    if todo:
        work = partial(validate_shard, dataset=dataset.root, limits=Limits())
        with cluster("ingest"):
            failed = failed | map_shards({raw.path: raw for raw in todo}, work, lambda raw: raw.rows, "ingest")
    finished = finished_shards(plan, dataset)
    done = [raw for raw in plan.shards if raw.shard in finished]
    kept = sum(dataset.rows(f"images/{raw.shard}.parquet") for raw in done)
    reasons = sum((dataset.tally(f"rejected/{raw.shard}.parquet", "reason") for raw in done), Counter[str]())
    rows = sum(raw.rows for raw in done)
    write_run_record(dataset.path("images"), "ingest", started, rows, kept, reasons, failed=failed)
    if failed:
        raise ShardsFailed(failed)


def find_raw(paths: tuple[str, ...]) -> list[str]:
    """Every raw parquet file at these paths; UsageError for a path that holds none."""
    found = {path: find_parquet(path) for path in paths}
    for path, files in found.items():
        if not files:
            raise UsageError(f"no parquet file at {path}; give a .parquet file or a folder that holds some")
    return sorted({file for files in found.values() for file in files})


if __name__ == "__main__":
    run(main)
