"""JOB: image shards -> scores of any image classifier (aesthetic, watermark ...); images are never rewritten.

The classifier is a folder on this machine, in transformers' layout or ONNX: the head of pipeline/classifiers.py says
what it must hold. Nothing is downloaded.
"""

import re
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

from pipeline.jobs import Parser, ShardsFailed, UsageError, default_dataset, local_path, run, write_run_record
from pipeline.shards import Store


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    dataset: str
    model: str  # folder
    name: str  # of the scores
    batch_size: int  # pictures per forward pass
    actors: int | None  # copies of the model; None: as many as the cluster has room for


def parse_args() -> ScoreJob:
    parser = Parser(prog="score.py", description=__doc__)
    parser.add_argument("--dataset", default=default_dataset(), metavar="ROOT", help="folder or s3://bucket/prefix")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="config.json + *.safetensors, or model.onnx")
    parser.add_argument("--name", help="scores/<name>/ is written; default: the folder's own name")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at a time; default 32")
    parser.add_argument(
        "--actors", type=int, metavar="N",
        help="copies of the model; default: one per GPU, without GPUs one per CPU",
    )  # fmt: skip
    args = parser.parse_args()
    folder = local_path("--model", args.model).absolute()
    job = ScoreJob(**vars(args) | {"model": str(folder), "name": args.name or folder.name})
    if not re.fullmatch(r"\w[\w.-]*", job.name):
        raise UsageError(f"--name {job.name!r} names a folder of the dataset: letters, digits, _ . - only")
    if job.batch_size < 1 or (job.actors is not None and job.actors < 1):
        raise UsageError("--batch-size and --actors must be at least 1")
    return job


def main() -> None:
    job = parse_args()
    started = time.time()
    dataset, folder = Store(job.dataset), f"scores/{job.name}"
    if not dataset.shards("images"):
        raise UsageError(
            f"{job.dataset} has no images; run: python pipeline/ingest.py --raw PATH --dataset {job.dataset}"
        )
    # Here and not above: this takes seconds to import, which --help and a mistyped path should not cost.
    from pathlib import Path

    from pipeline.classifiers import digest, load_classifier, uses_gpu
    from pipeline.scoring import Scorer, plan_scores, remove_outdated

    # Loaded here too, for a moment: a folder that cannot be used is refused in one line, before Ray starts.
    classifier = load_classifier(Path(job.model), device="cpu", threads=1)
    labels, preprocessing = classifier.labels, classifier.describe()
    del classifier
    model_digest = digest(Path(job.model))
    plan = plan_scores(dataset, model_digest, preprocessing)
    outdated = remove_outdated(plan, dataset, folder)
    finished = set(dataset.shards(folder))
    todo = {planned.shard: planned for planned in plan if planned.shard not in finished}
    print(f"score: {len(plan)} shards of images, {len(plan) - len(todo)} of them scored before", end="")
    print(f", {outdated} made from another model or other images: removed" if outdated else "", flush=True)
    failed: dict[str, str] = {}
    if todo:
        from pipeline.cluster import cluster
        from pipeline.dataflow import map_shards_with, plan_pool

        with cluster("score"):
            pool = plan_pool(job.actors, len(todo), uses_gpu(Path(job.model)))
            print(f"score: {len(labels)} labels; {pool}", flush=True)
            scorer = partial(
                Scorer, model=job.model, model_digest=model_digest, dataset=dataset.root, folder=folder,
                batch_size=job.batch_size, device="cuda" if pool.gpus else "cpu", threads=pool.cpus,
            )  # fmt: skip
            failed = map_shards_with(scorer, todo, lambda planned: planned.rows, "score", pool)

    done = [planned for planned in plan if planned.shard not in failed]
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
