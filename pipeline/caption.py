"""JOB: image shards -> one caption per image; images are never rewritten."""

import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

from captioner.engines import ENGINES
from pipeline.fingerprints import changes, image_footers, made_from
from pipeline.jobs import Parser, ShardsFailed, default_dataset, run, write_run_record
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
    images = image_footers(dataset)
    failed: dict[str, str] = {}
    now = {shard: {"images": footer.digest} for shard, footer in images.items()}
    todo = changes(made_from(dataset, "captions", images), now)
    print(f"caption: {len(images)} shards of images, {len(images) - len(todo)} of them captioned before", flush=True)
    if todo:
        from pipeline.captioning import ImageShard, caption_shard
        from pipeline.cluster import cluster  # takes seconds to import: not for --help
        from pipeline.dataflow import map_shards

        work = partial(caption_shard, dataset=dataset.root, engine_name=job.engine)
        with cluster("caption"):
            parts = {shard: ImageShard(shard, images[shard].rows, images[shard].digest) for shard in sorted(todo)}
            failed = map_shards(parts, work, lambda part: part.rows, "caption")
    done = {shard: footer.rows for shard, footer in images.items() if shard not in failed}
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
