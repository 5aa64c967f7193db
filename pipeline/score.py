"""JOB: image shards -> scores of any image classifier (aesthetic, watermark ...); images are never rewritten.

The classifier is a folder on this machine, in transformers' layout or ONNX: the head of pipeline/pictures/classifiers.py says
what it must hold. Nothing is downloaded.
"""

import re
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.core.errors import ShardsFailed, UsageError
from pipeline.core.jobs import Parser, default_dataset, local_path, run
from pipeline.storage.fingerprints import changes, described, image_footers, made_from
from pipeline.storage.run_record import write_run_record
from pipeline.storage.shards import Store


@dataclass(frozen=True, kw_only=True)
class ScoreJob:
    dataset: str
    model: str  # folder
    name: str | None  # of the scores; None: the folder's, which must not replace another model's
    batch_size: int  # pictures per forward pass
    actors: int | None  # copies of the model; None: as many as the cluster has room for
    plan: bool


def parse_args() -> ScoreJob:
    parser = Parser(prog="score.py", description=__doc__)
    parser.add_argument("--dataset", default=default_dataset(), metavar="ROOT", help="folder or s3://bucket/prefix")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="config.json + *.safetensors, or model.onnx")
    parser.add_argument("--name", help="scores/<name>/ is written, over another model's too; default: as FOLDER")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at a time; default 32")
    parser.add_argument(
        "--actors", type=int, metavar="N",
        help="copies of the model; default: one per GPU, without GPUs one per CPU",
    )  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="say what would be done and why, and write nothing")
    args = parser.parse_args()
    folder = local_path("--model", args.model).absolute()
    job = ScoreJob(**vars(args) | {"model": str(folder)})
    if not re.fullmatch(r"\w[\w.-]*", name := job.name or folder.name):
        raise UsageError(f"--name {name!r} names a folder of the dataset: letters, digits, _ . - only")
    if job.batch_size < 1 or (job.actors is not None and job.actors < 1):
        raise UsageError("--batch-size and --actors must be at least 1")
    return job


def main() -> None:
    job = parse_args()
    started = time.time()
    name = job.name or Path(job.model).name
    dataset, folder = Store(job.dataset), f"scores/{name}"
    images = image_footers(dataset)
    # Here and not above: this takes seconds to import, which --help and a mistyped path should not cost.
    from pipeline.pictures.classifiers import digest, load_classifier, uses_gpu
    from pipeline.scores.scoring import Scorer, plan_scores

    # Loaded here too, for a moment: a folder that cannot be used is refused in one line, before Ray starts.
    classifier = load_classifier(Path(job.model), device="cpu", threads=1)
    labels, preprocessing = classifier.labels, classifier.describe()
    del classifier
    model_digest = digest(Path(job.model))
    plan = plan_scores(images, model_digest, preprocessing)
    before = made_from(dataset, folder, plan)
    if not job.name and any(made.get("model") != model_digest for made in before.values()):
        raise UsageError(
            f"{dataset.path(folder)} has scores of another model; give --name {name} to replace them, or another "
            "--name to keep both"
        )
    why = changes(before, {shard: planned.made_from for shard, planned in plan.items()})
    print(f"score: {'would do: ' if job.plan else ''}{described('scoring', why, len(plan))}", flush=True)
    if job.plan:
        return
    failed: dict[str, str] = {}
    if why:
        from pipeline.core.cluster import cluster
        from pipeline.core.dataflow import map_shards_with, plan_pool

        with cluster("score"):
            pool = plan_pool(job.actors, len(why), uses_gpu(Path(job.model)))
            print(f"score: {len(labels)} labels; {pool}", flush=True)
            scorer = partial(
                Scorer, model=job.model, model_digest=model_digest, dataset=dataset.root, folder=folder,
                batch_size=job.batch_size, device="cuda" if pool.gpus else "cpu", threads=pool.cpus,
            )  # fmt: skip
            todo = {shard: plan[shard] for shard in why}
            failed = map_shards_with(scorer, todo, lambda planned: planned.rows, "score", pool)

    done = [planned for planned in plan.values() if planned.shard not in failed]
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
