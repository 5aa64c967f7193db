"""JOB: writes one caption per image, in shards beside those of the images.

Pixtral makes them if --model or HDM_CAPTION_MODEL names it and a node with a GPU has vLLM (make captioner). Otherwise
they are made from tags, and a line says why. --engine vllm insists on the model and also uses a CPU. --engine openai
asks a server; set its key in OPENAI_API_KEY. The same command again captions what is missing or was made otherwise.
"""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from typing import Any

from pipeline.captions.command import CaptionJob, parse_args
from pipeline.captions.engine_choice import CAPTIONER, VllmPlace, choose_engine, make_task
from pipeline.captions.tag_captions import caption_shard, image_shards
from pipeline.core.errors import ShardsFailed, UsageError
from pipeline.core.jobs import run
from pipeline.storage.fingerprints import changes
from pipeline.storage.lease import lease
from pipeline.storage.manifest import Catalog, Footer
from pipeline.storage.run_record import write_run_record
from pipeline.storage.shards import Store


def main() -> None:
    job = parse_args(str(__doc__))
    dataset = Store(job.dataset)
    catalog = Catalog(dataset)
    with ExitStack() as session:
        if not job.trial:
            session.enter_context(lease(dataset, job.folder, "caption.py"))
        catalog.refresh("images", "posts", job.folder)
        images = catalog.images()

        @cache  # called where Ray is needed, it connects once
        def connect() -> None:
            from pipeline.core.cluster import cluster  # Ray takes seconds to import

            session.enter_context(cluster("caption"))

        job, place = choose_engine(job, connect)
        if job.trial:
            from pipeline.captions.trial import run_trial

            rows_of = {shard: file.rows for shard, file in images.items()}
            task = make_task(job, place, dataset.root)
            trial = partial(run_trial, task, rows_of, job.trial, job.engines or 1, job.dollars_per_hour)
            place.run(trial, connect, job.tensor_parallel)
            return
        caption(job, place, catalog, images, connect)


def caption(
    job: CaptionJob, place: VllmPlace, catalog: Catalog, images: dict[str, Footer], connect: Callable[[], object]
) -> None:
    """Captions what is missing and writes the run record. Raises ShardsFailed."""
    started = time.time()
    failed, details = caption_missing(job, place, catalog, images, connect)
    dataset = catalog.dataset
    catalog.refresh(job.folder)
    done = {shard: file.rows for shard, file in images.items() if shard not in failed}
    reasons = sum(catalog.reasons(job.folder, done).values(), Counter[str]())
    total = sum(done.values())
    write_run_record(
        dataset.path(job.folder), "caption", started, total, total - reasons.total(), reasons,
        engine=job.engine, failed=failed, **details,
    )  # fmt: skip
    catalog.save()
    if reasons["truncated"] * 2 > total:
        print("caption: most answers were cut off: give a higher --max-tokens, or a model that was trained to describe")
    if failed:
        raise ShardsFailed(failed)
    if "this_job" in details:
        from pipeline.captions.stats import check_engine

        check_engine(details["this_job"])


def caption_missing(
    job: CaptionJob, place: VllmPlace, catalog: Catalog, images: dict[str, Footer], connect: Callable[[], object]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Failed shards with the reason, and details for the run record."""
    dataset = catalog.dataset
    task = None if job.engine == "tags" else make_task(job, place, dataset.root)
    before = catalog.provenance(job.folder, images)
    models = [made["model"] for _, made in sorted(before.items()) if "engine" in made]
    if task is None and models:  # captions of a model are too expensive to be replaced
        folder = dataset.path(job.folder)
        keep = "give --name tags to keep them, caption with a model, or remove them first"
        raise UsageError(f"{folder} has captions of {models[0]}; {keep}")
    whole = image_shards(catalog, images)
    now = {s: task.settings.provenance(part.digest) if task else part.tag_provenance for s, part in whole.items()}
    todo = changes(before, now)
    if job.retry_rejected:
        from captioner.captioning import MODEL_FAILURES

        reasons = catalog.reasons(job.folder, images.keys() - todo.keys())
        todo |= {shard: "rejected rows" for shard, counts in reasons.items() if MODEL_FAILURES & counts.keys()}
    catalog.save()
    print(f"caption: {len(images)} image shards, {len(images) - len(todo)} already captioned", flush=True)
    details: dict[str, Any] = {"model": task.settings.model} if task else {}
    if not todo:
        return {}, details
    from pipeline.core.cluster import nodes_of
    from pipeline.core.dataflow import map_shards

    parts = {shard: whole[shard] for shard in sorted(todo)}
    connect()
    if task is None:
        work = partial(caption_shard, dataset=dataset.root, folder=job.folder)
        return map_shards(parts, work, lambda part: part.rows, "caption"), details
    from pipeline.captions.engine_pool import plan_pool
    from pipeline.captions.steps import caption_shards, new_meter, pending_shards

    pool = plan_pool(
        job.engines, job.tensor_parallel, nodes_of(CAPTIONER), use_gpus=job.engine == "vllm",
        resources=place.resources, runtime_env=place.runtime_env,
    )  # fmt: skip
    print(f"caption: {job.engine} {task.settings.model}; {pool}", flush=True)
    pending = pending_shards(task, parts.values())
    meter = new_meter(pending, job.dollars_per_hour)
    failed = caption_shards(task, pending, pool, meter)
    return failed, details | {"this_job": meter.record()}


if __name__ == "__main__":
    run(main)
