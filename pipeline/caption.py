"""JOB: image shards -> one caption per image; images are never rewritten."""

import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

from captioner.engines import ENGINES
from pipeline.jobs import Parser, ShardsFailed, UsageError, default_dataset, run, write_run_record
from pipeline.shards import Store


@dataclass(frozen=True, kw_only=True)
class CaptionJob:
    dataset: str
    engine: str


def parse_args() -> CaptionJob:
    parser = Parser(prog="caption.py", description=__doc__)
    parser.add_argument("--dataset", default=default_dataset(), metavar="ROOT", help="folder or s3://bucket/prefix")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="tags", help="tags: from the tags, no model")
    return CaptionJob(**vars(parser.parse_args()))


def main() -> None:
    job = parse_args()
    started = time.time()
    dataset = Store(job.dataset)
    rows = {shard: dataset.rows(f"images/{shard}.parquet") for shard in dataset.shards("images")}
    if not rows:
        raise UsageError(
            f"{job.dataset} has no images; run: python pipeline/ingest.py --raw PATH --dataset {job.dataset}"
        )
    failed: dict[str, str] = {}
    todo = sorted(set(rows) - set(dataset.shards("captions")))
    print(f"caption: {len(rows)} shards of images, {len(rows) - len(todo)} of them captioned before", flush=True)
    if todo:
        from pipeline.captioning import caption_shard
        from pipeline.cluster import cluster  # takes seconds to import: not for --help
        from pipeline.dataflow import map_shards

        work = partial(caption_shard, dataset=dataset.root, engine_name=job.engine)
        with cluster("caption"):
            failed = map_shards({shard: shard for shard in todo}, work, rows.__getitem__, "caption")
    done = {shard: count for shard, count in rows.items() if shard not in failed}
    reasons = sum((dataset.tally(f"captions/{shard}.parquet", "reason") for shard in done), Counter[str]())
    total = sum(done.values())
    write_run_record(
        dataset.path("captions"), "caption", started, total, total - reasons.total(), reasons,
        engine=job.engine, failed=failed,
    )  # fmt: skip
    if failed:
        raise ShardsFailed(failed)


if __name__ == "__main__":
    run(main)
