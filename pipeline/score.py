"""Score a dataset's images with an image classifier (aesthetic, watermark ...). Images are never rewritten.

The classifier is a folder on this machine, in the layout of transformers or with an ONNX graph; see
pipeline/pictures/classifiers.py. Nothing is downloaded.
"""

import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

from pipeline.core.errors import ShardsFailed, UsageError
from pipeline.core.jobs import run
from pipeline.scores.command import ScoreJob, parse_args
from pipeline.storage.fingerprints import changes, describe_changes
from pipeline.storage.lease import lease
from pipeline.storage.manifest import Catalog
from pipeline.storage.partial import remove_finished
from pipeline.storage.run_record import write_run_record
from pipeline.storage.shards import Store


def main() -> None:
    job = parse_args(__doc__)
    dataset, folder = Store(job.dataset), f"scores/{job.name}"
    with nullcontext() if job.plan else lease(dataset, folder, "score.py"):
        score(job, dataset, folder)


def score(job: ScoreJob, dataset: Store, folder: str) -> None:
    """Plans the job and, without --plan, does the work and writes the run record. Raises ShardsFailed, and UsageError
    for an unusable model or scores of another one."""
    started, model = time.time(), Path(job.model)
    catalog = Catalog(dataset)
    catalog.refresh("images", folder)
    images = catalog.images()
    # These imports take seconds, which --help and a mistyped path should not cost.
    from pipeline.pictures.classifiers import digest, load_classifier, uses_gpu
    from pipeline.scores.scoring import plan_scores

    # Loaded here as well, so that an unusable folder is refused in one line before Ray starts.
    classifier = load_classifier(model, device="cpu", threads=1)
    labels, preprocessing, described = classifier.labels, classifier.preprocessing, classifier.describe()
    del classifier
    model_digest = digest(model)
    plan = plan_scores(images, model_digest, described)
    before = catalog.provenance(folder, plan)
    if not job.replace and any(provenance.get("model") != model_digest for provenance in before.values()):
        raise UsageError(
            f"{dataset.path(folder)} has scores of another model. Give --name {job.name} to replace them, or another "
            "--name to keep both."
        )
    why = changes(before, {shard: planned.provenance for shard, planned in plan.items()})
    print(f"score: {'would do: ' if job.plan else ''}{describe_changes('scoring', why, len(plan))}", flush=True)
    if job.plan:
        return
    catalog.save()
    failed: dict[str, str] = {}
    if why:
        from pipeline.core.cluster import cluster
        from pipeline.scores.steps import ClassifierModel, plan_classifiers, score_shards

        todo = {shard: plan[shard] for shard in why}
        for written in (folder, f"{folder}/rejected"):
            dataset.remove_partial(written, todo.keys())
        used = ClassifierModel(
            folder=job.model, digest=model_digest, labels=labels, preprocessing=preprocessing,
            batch_size=job.batch_size,
        )  # fmt: skip
        with cluster("score"):
            rows = sum(planned.rows for planned in todo.values())
            actors = plan_classifiers(job.actors, rows, job.batch_size, uses_gpu(model))
            print(f"score: {len(labels)} labels; {actors}", flush=True)
            failed = score_shards(todo, dataset, folder, used, actors)

    done = {shard: planned.rows for shard, planned in plan.items() if shard not in failed}
    remove_finished(dataset, folder, done)
    catalog.refresh(folder, f"{folder}/rejected")
    reasons = sum(catalog.reasons(f"{folder}/rejected", done).values(), Counter[str]())
    total = sum(done.values())
    write_run_record(
        dataset.path(folder), "score", started, total, total - reasons.total(), reasons,
        model=model_digest, preprocessing=described, failed=failed,
    )  # fmt: skip
    catalog.footers(folder, done)
    catalog.save()
    if failed:
        raise ShardsFailed(failed)


if __name__ == "__main__":
    run(main)
