"""JOB: writes one caption per image, in shards beside those of the images.

--engine tags needs no model. --engine vllm runs Pixtral on the GPUs of this machine or cluster, or on a CPU (install it
with: make captioner). --engine openai asks a server; set its key in OPENAI_API_KEY. Run the same command again to
continue: only shards that are unfinished or were made otherwise are captioned.
"""

import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from pipeline.captions.command import CaptionJob, parse_args
from pipeline.core.errors import ShardsFailed, UsageError
from pipeline.core.jobs import run
from pipeline.storage.fingerprints import FileIdentity, changes, image_identities, read_provenance
from pipeline.storage.run_record import write_run_record
from pipeline.storage.shards import Store


def main() -> None:
    job = parse_args(str(__doc__))
    started = time.time()
    dataset = Store(job.dataset)
    images = image_identities(dataset)
    if job.trial:
        from pipeline.captions.trial import run_trial

        rows_of = {shard: file.rows for shard, file in images.items()}
        run_trial(job.task(dataset), rows_of, job.trial, job.engines or 1, job.dollars_per_hour)
        return
    failed, details = caption(job, dataset, images)
    done = {shard: file.rows for shard, file in images.items() if shard not in failed}
    reasons = sum(count_reasons(dataset, job.folder, done).values(), Counter[str]())
    total = sum(done.values())
    write_run_record(
        dataset.path(job.folder), "caption", started, total, total - reasons.total(), reasons,
        engine=job.engine, failed=failed, **details,
    )  # fmt: skip
    if reasons["truncated"] * 2 > total:
        print("caption: most answers were cut off: give a higher --max-tokens, or a model that was trained to describe")
    if failed:
        raise ShardsFailed(failed)
    if "this_job" in details:
        from pipeline.captions.stats import check_engine

        check_engine(details["this_job"])


def caption(job: CaptionJob, dataset: Store, images: dict[str, FileIdentity]) -> tuple[dict[str, str], dict[str, Any]]:
    """Failed shards with the reason, and details for the run record."""
    task = None if job.engine == "tags" else job.task(dataset)
    before = read_provenance(dataset, job.folder, images)
    models = [made["model"] for _, made in sorted(before.items()) if "engine" in made]
    if task is None and models:  # captions of a model are too expensive to be replaced
        folder = dataset.path(job.folder)
        raise UsageError(f"{folder} has captions of {models[0]}; give --name tags to keep them, or remove them first")
    now = {s: task.settings.provenance(file.digest) if task else {"images": file.digest} for s, file in images.items()}
    todo = changes(before, now)
    if job.retry_rejected:
        from captioner.captioning import MODEL_FAILURES

        reasons = count_reasons(dataset, job.folder, images.keys() - todo.keys())
        todo |= {shard: "rejected rows" for shard, counts in reasons.items() if MODEL_FAILURES & counts.keys()}
    print(f"caption: {len(images)} image shards, {len(images) - len(todo)} already captioned", flush=True)
    details: dict[str, Any] = {"model": task.settings.model} if task else {}
    if not todo:
        return {}, details
    # Imported here, because importing Ray takes seconds.
    from pipeline.captions.tag_captions import ImageShard, caption_shard
    from pipeline.core.cluster import cluster
    from pipeline.core.dataflow import map_shards, map_shards_with, plan_engines

    parts = {shard: ImageShard(shard, images[shard].rows, images[shard].digest) for shard in sorted(todo)}
    with cluster("caption"):
        if task is None:
            work = partial(caption_shard, dataset=dataset.root, folder=job.folder)
            return map_shards(parts, work, lambda part: part.rows, "caption"), details
        from pipeline.captions.model_captions import CaptionWorker
        from pipeline.captions.stats import CaptionMeter

        pool = plan_engines(job.engines, job.tensor_parallel, len(todo), use_gpus=job.engine == "vllm")
        print(f"caption: {job.engine} {task.settings.model}; {pool}", flush=True)
        meter = CaptionMeter(sum(part.rows for part in parts.values()), pool.actors, job.dollars_per_hour)
        make_worker = partial(CaptionWorker, replace(task, threads=pool.cpus))
        failed = map_shards_with(make_worker, parts, lambda part: part.rows, "caption", pool, meter)
    return failed, details | {"this_job": meter.record()}


def count_reasons(dataset: Store, folder: str, shards: Iterable[str]) -> dict[str, Counter[str]]:
    """Rows by reason of each shard, read by threads because S3 takes most of the time."""
    names = sorted(shards)
    with ThreadPoolExecutor(8) as pool:
        counts = pool.map(lambda name: dataset.tally(f"{folder}/{name}.parquet", "reason"), names)
        return dict(zip(names, counts, strict=True))


if __name__ == "__main__":
    run(main)
