"""Ingest raw Danbooru and Pixiv parquet shards into a dataset of checked images.

Every rejected row is kept in rejected/ with its reason. Finished shards are skipped, so a rerun does what is missing or
has changed.
"""

import json
import time
from collections import Counter

from pipeline.core.errors import ShardsFailed
from pipeline.core.jobs import run
from pipeline.core.records import SCHEMA_VERSION
from pipeline.ingestion.command import IngestJob, parse_args
from pipeline.ingestion.preflight import IngestPlan, plan_shards
from pipeline.storage.lease import lease
from pipeline.storage.partial import remove_finished
from pipeline.storage.run_record import versions, write_run_record
from pipeline.storage.shards import Store


def main() -> None:
    job = parse_args(__doc__)
    if job.refresh:
        from pipeline.ingestion.refresh import run_refresh

        run_refresh(job)
        return
    if job.plan:
        make_plan(job)
        return
    with lease(Store(job.dataset), "images", "ingest.py"):
        ingest(job)


def make_plan(job: IngestJob) -> IngestPlan:
    dataset = Store(job.dataset)
    plan = plan_shards(job.raw, job.source, job.rows_per_shard, dataset, job.rules, job.check_ids)
    for line in plan.lines(dataset):
        print(f"ingest: {line}", flush=True)
    return plan


def ingest(job: IngestJob) -> None:
    started = time.time()
    plan, dataset, rules = make_plan(job), Store(job.dataset), job.rules
    plan.save()
    failed: dict[str, str] = {}  # error by shard
    if plan.todo or plan.tiers:
        from pipeline.core.cluster import cluster  # Ray takes seconds to import
        from pipeline.ingestion.steps import downsize_shards, ingest_shards

        if not dataset.exists("dataset.json"):
            about = {"schema_version": SCHEMA_VERSION, "created_by": versions()}
            dataset.write("dataset.json", json.dumps(about).encode())
        folders = ["images", "rejected"] + ([f"images-{rules.downsize}"] if rules.downsize else [])
        with cluster("ingest"):
            for work, names in ((ingest_shards, plan.todo), (downsize_shards, plan.tiers)):
                todo = {name: plan.shards[name] for name in sorted(names)}
                for folder in folders:
                    dataset.remove_partial(folder, todo.keys())
                failed |= work(todo, dataset, rules) if todo else {}
    done = {name: raw.rows for name, raw in plan.shards.items() if name not in failed}
    remove_finished(dataset, "images", done)
    plan.catalog.refresh("images", "rejected")
    kept = sum(footer.rows for footer in plan.catalog.footers("images", done).values())
    reasons = sum(plan.catalog.reasons("rejected", done).values(), Counter[str]())
    plan.catalog.save()
    rows = sum(done.values())
    not_done = plan.unreadable | {plan.shards[name].path: why for name, why in failed.items()}
    write_run_record(dataset.path("images"), "ingest", started, rows, kept, reasons, failed=not_done)
    if not_done:
        raise ShardsFailed(not_done)


if __name__ == "__main__":
    run(main)
