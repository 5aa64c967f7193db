"""Ingest raw Danbooru and Pixiv parquet shards into a dataset of checked images.

Every rejected row is kept in rejected/ with its reason. Finished shards are skipped, so a rerun does what is missing or
has changed.
"""

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from pipeline.core.errors import ShardsFailed
from pipeline.core.jobs import run
from pipeline.core.records import SCHEMA_VERSION
from pipeline.ingestion.command import parse_args
from pipeline.ingestion.preflight import find_raw, plan_shards
from pipeline.ingestion.validation import downsize_shard, memory_needed, validate_shard
from pipeline.storage.run_record import versions, write_run_record
from pipeline.storage.shards import Store


def main() -> None:
    job = parse_args(__doc__)
    started = time.time()
    dataset, rules = Store(job.dataset), job.rules
    plan = plan_shards(find_raw(job.raw), job.source, job.rows_per_shard, dataset, rules)
    for line in plan.lines(dataset):
        print(f"ingest: {line}", flush=True)
    if job.plan:
        return

    failed: dict[str, str] = {}  # error by shard
    if plan.todo or plan.tiers:
        from pipeline.core.cluster import cluster  # Ray takes seconds to import
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
                    memory = max(map(memory_needed, todo.values()))
                    failed |= map_shards(todo, run_one, lambda raw: raw.rows, "ingest", memory)
    done = [raw for name, raw in plan.shards.items() if name not in failed]
    with ThreadPoolExecutor(8) as readers:
        kept = sum(readers.map(lambda raw: dataset.rows(f"images/{raw.shard}.parquet"), done))
        rejected = readers.map(lambda raw: dataset.tally(f"rejected/{raw.shard}.parquet", "reason"), done)
        reasons = sum(rejected, Counter[str]())
    rows = sum(raw.rows for raw in done)
    not_done = plan.unreadable | {plan.shards[name].path: why for name, why in failed.items()}
    write_run_record(dataset.path("images"), "ingest", started, rows, kept, reasons, failed=not_done)
    if not_done:
        raise ShardsFailed(not_done)


if __name__ == "__main__":
    run(main)
