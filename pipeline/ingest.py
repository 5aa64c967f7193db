"""JOB: raw Danbooru and Pixiv shards -> checked images; every refused row is kept with its reason."""

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.core.errors import ShardsFailed, UsageError
from pipeline.core.jobs import Parser, default_dataset, run
from pipeline.core.records import SCHEMA_VERSION
from pipeline.sources import ADMISSIBLE, FIELDS, SOURCES
from pipeline.storage.run_record import versions, write_run_record
from pipeline.storage.shards import Store, find_parquet


@dataclass(frozen=True, kw_only=True)
class IngestJob:
    raw: tuple[str, ...]  # files, folders or s3:// prefixes
    source: str  # danbooru | pixiv | auto
    dataset: str
    rules: dict[str, Any]  # of validation.IngestRules, which takes a second to import
    max_megapixels: float
    rows_per_shard: int | None
    plan: bool  # say what would be done, and do nothing


def parse_args() -> IngestJob:
    parser = Parser(prog="ingest.py", description=__doc__)
    parser.add_argument("--raw", nargs="+", required=True, metavar="PATH", help="parquet files or folders of them")
    parser.add_argument("--source", choices=(*SOURCES, "auto"), default="auto", help="default: found out per file")
    parser.add_argument("--dataset", default=default_dataset(), metavar="ROOT", help="folder or s3://bucket/prefix")
    parser.add_argument(
        "--map", nargs="+", default=[], metavar="COLUMN=FIELD", help="a raw column and the field of its site that it is"
    )
    reasons = sorted({reason for reasons in ADMISSIBLE.values() for reason in reasons})
    parser.add_argument(
        "--admit", nargs="+", default=[], choices=reasons, metavar="REASON",
        help=f"take rows that are refused otherwise: {', '.join(map(repr, reasons))}",
    )  # fmt: skip
    parser.add_argument("--max-megapixels", type=float, default=100, help="larger pictures are refused; at most 100")
    parser.add_argument(
        "--rows-per-shard", type=int, metavar="N", help="cut raw files of more rows into several shards"
    )
    parser.add_argument(
        "--downsize", type=int, metavar="SIDE", help="also write images-SIDE/, the short side at most SIDE pixels"
    )
    parser.add_argument("--downsize-format", choices=("JPEG", "WEBP"), default="JPEG", help="quality 92; default: JPEG")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and do nothing")
    args = parser.parse_args()
    for flag, value in (("--rows-per-shard", args.rows_per_shard), ("--downsize", args.downsize)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1: got {value}")
    if not 0 < args.max_megapixels <= 100:  # the trainer's own limit
        raise UsageError(f"--max-megapixels must be above 0, at most 100: got {args.max_megapixels:g}")
    return IngestJob(
        raw=tuple(args.raw),
        source=args.source,
        dataset=args.dataset,
        rules={
            "admit": tuple(sorted(set(args.admit))),
            "renamed": tuple(sorted(map(renamed, args.map))),
            "downsize": args.downsize,
            "downsize_format": args.downsize_format,
        },
        max_megapixels=args.max_megapixels,
        rows_per_shard=args.rows_per_shard,
        plan=args.plan,
    )


def renamed(pair: str) -> tuple[str, str]:
    """COLUMN=FIELD in its two parts; UsageError for a field that no source has."""
    column, equals, name = pair.partition("=")
    if not (column and equals) or name not in FIELDS:
        raise UsageError(f"--map {pair} must be COLUMN=FIELD, the field one of {', '.join(sorted(FIELDS))}")
    return column, name


def main() -> None:
    job = parse_args()
    started = time.time()
    raw_files = find_raw(job.raw)
    # Here and not above: these take seconds to import, which --help and a mistyped path should not cost.
    from pipeline.ingestion.preflight import plan_shards
    from pipeline.ingestion.validation import IngestRules, downsize_shard, validate_shard
    from pipeline.pictures.decoder import Limits

    dataset = Store(job.dataset)
    rules = IngestRules(limits=Limits(max_pixels=int(job.max_megapixels * 1e6)), **job.rules)
    plan = plan_shards(raw_files, job.source, job.rows_per_shard, dataset, rules)
    for line in plan.lines(dataset):
        print(f"ingest: {line}", flush=True)
    if job.plan:
        return

    failed: dict[str, str] = {}  # by shard
    if plan.todo or plan.tiers:
        from pipeline.core.cluster import cluster
        from pipeline.core.dataflow import map_shards

        if not dataset.exists("dataset.json"):
            about = {"schema_version": SCHEMA_VERSION, "created_by": versions()}
            dataset.write("dataset.json", json.dumps(about).encode())
        with cluster("ingest"):
            for work, names in ((validate_shard, plan.todo), (downsize_shard, plan.tiers)):
                todo = {name: plan.shards[name] for name in sorted(names)}
                for folder in ("images", "rejected", f"images-{rules.downsize}"):
                    dataset.remove_partial(folder, todo.keys())
                if todo:
                    run_one = partial(work, dataset=dataset.root, rules=rules)
                    memory = max(raw.memory for raw in todo.values())
                    failed |= map_shards(todo, run_one, lambda raw: raw.rows, "ingest", memory)
    done = [raw for name, raw in plan.shards.items() if name not in failed]
    with ThreadPoolExecutor(8) as readers:
        kept = sum(readers.map(lambda raw: dataset.rows(f"images/{raw.shard}.parquet"), done))
        refused = readers.map(lambda raw: dataset.tally(f"rejected/{raw.shard}.parquet", "reason"), done)
        reasons = sum(refused, Counter[str]())
    rows = sum(raw.rows for raw in done)
    not_done = plan.unreadable | {plan.shards[name].path: why for name, why in failed.items()}
    write_run_record(dataset.path("images"), "ingest", started, rows, kept, reasons, failed=not_done)
    if not_done:
        raise ShardsFailed(not_done)


def find_raw(paths: tuple[str, ...]) -> list[str]:
    """Every raw parquet file at these paths; UsageError for a path that holds none."""
    found = {path: find_parquet(path) for path in paths}
    for path, files in found.items():
        if not files:
            raise UsageError(f"no parquet file at {path}; give a .parquet file or a folder that holds some")
    return sorted({file for files in found.values() for file in files})


if __name__ == "__main__":
    run(main)
