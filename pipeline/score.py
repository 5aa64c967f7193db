"""Score a dataset's images with an image classifier (aesthetic, watermark ...). Images are never rewritten.

The classifier is a folder on this machine, in the layout of transformers or with an ONNX graph; see
pipeline/pictures/classifiers.py. Nothing is downloaded.
"""

import time
from collections import Counter
from functools import partial
from pathlib import Path

from pipeline.core.errors import ShardsFailed, UsageError
from pipeline.core.jobs import run
from pipeline.scores.command import parse_args
from pipeline.storage.fingerprints import changes, describe_changes, image_identities, read_provenance
from pipeline.storage.run_record import write_run_record
from pipeline.storage.shards import Store


def main() -> None:
    job = parse_args(__doc__)
    started = time.time()
    dataset, folder, model = Store(job.dataset), f"scores/{job.name}", Path(job.model)
    images = image_identities(dataset)
    # These imports take seconds, which --help and a mistyped path should not cost.
    from pipeline.pictures.classifiers import digest, load_classifier, uses_gpu
    from pipeline.scores.scoring import Scorer, plan_scores

    # Loaded here as well, so that an unusable folder is refused in one line before Ray starts.
    classifier = load_classifier(model, device="cpu", threads=1)
    labels, preprocessing = classifier.labels, classifier.describe()
    del classifier
    model_digest = digest(model)
    plan = plan_scores(images, model_digest, preprocessing)
    before = read_provenance(dataset, folder, plan)
    if not job.replace and any(provenance.get("model") != model_digest for provenance in before.values()):
        raise UsageError(
            f"{dataset.path(folder)} has scores of another model. Give --name {job.name} to replace them, or another "
            "--name to keep both."
        )
    why = changes(before, {shard: planned.provenance for shard, planned in plan.items()})
    print(f"score: {'would do: ' if job.plan else ''}{describe_changes('scoring', why, len(plan))}", flush=True)
    if job.plan:
        return
    failed: dict[str, str] = {}
    if why:
        from pipeline.core.cluster import cluster
        from pipeline.core.dataflow import map_shards_with, plan_pool

        with cluster("score"):
            pool = plan_pool(job.actors, len(why), uses_gpu(model))
            print(f"score: {len(labels)} labels; {pool}", flush=True)
            scorer = partial(
                Scorer, model=job.model, model_digest=model_digest, dataset=dataset.root, folder=folder,
                batch_size=job.batch_size, device="cuda" if pool.gpus else "cpu", threads=pool.cpus,
            )  # fmt: skip
            todo = {shard: plan[shard] for shard in why}
            failed = map_shards_with(scorer, todo, lambda planned: planned.rows, "score", pool)

    done = [planned for shard, planned in plan.items() if shard not in failed]
    rejected = (dataset.tally(f"{folder}/rejected/{planned.shard}.parquet", "reason") for planned in done)
    reasons = sum(rejected, Counter[str]())
    total = sum(planned.rows for planned in done)
    write_run_record(
        dataset.path(folder), "score", started, total, total - reasons.total(), reasons,
        model=model_digest, preprocessing=preprocessing, failed=failed,
    )  # fmt: skip
    if failed:
        raise ShardsFailed(failed)


if __name__ == "__main__":
    run(main)
