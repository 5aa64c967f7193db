"""JOB: train one stage on a selection of the dataset; run it again to go on from the newest checkpoint."""

import os
import time
from argparse import Namespace
from typing import TYPE_CHECKING

from pipeline.core.jobs import Parser, default_dataset, default_run, local_path, run
from pipeline.storage.run_record import write_run_record

if TYPE_CHECKING:
    from trainer.recipe.resolve import Command


def parse_args() -> Namespace:
    """The fields of recipe.Command."""
    parser = Parser(prog="run.py", description=__doc__)
    parser.add_argument("--stage", required=True, help="demo, 256, 512, 768 or 1024")
    parser.add_argument("--dataset", default=default_dataset(), metavar="ROOT", help="folder or s3://bucket/prefix")
    parser.add_argument(
        "--run",
        default=default_run(),
        metavar="DIR",
        help="folder of all stages: DIR/<stage> gets metrics, checkpoints",
    )
    parser.add_argument(
        "--checkpoints", metavar="HOME", help="folder or s3://bucket/prefix for HOME/<stage>/checkpoints; default: DIR"
    )
    parser.add_argument(
        "--workers", type=int, default=os.environ.get("HDM_WORKERS") or 1, metavar="N",
        help="training processes, one per GPU; default: HDM_WORKERS, then 1",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps in all, instead of the stage's number")
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="FIELD=VALUE",
        help="any field of the stage, as samples=1000 optimizer.learning_rate=1e-3 captions.tag_dropout=0.1 model=tiny "
        "model.text_layers=average; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--from", dest="start_from", metavar="FOLDER",
        help="begin with the weights of this run, stage or checkpoint folder, or with new ones: nothing; "
        "default: the newest of the stage before; with --lora also a model folder of export.py --from-released",
    )  # fmt: skip
    parser.add_argument(
        "--lora", type=int, metavar="RANK",
        help="train low-rank adapters on the weights of --from, which stay as they are, instead of a whole model",
    )  # fmt: skip
    parser.add_argument(
        "--new-order", action="store_true",
        help="where the selection, batch_size, seed ... changed since the checkpoint: begin a new epoch",
    )  # fmt: skip
    parser.add_argument("--audit", metavar="FILE", help="append a JSON line per step and worker: the ids it trained on")
    parser.add_argument(
        "--price-per-hour", type=float, metavar="DOLLARS", help="of the whole cluster: shows what was spent"
    )
    parser.add_argument("--wandb", action="store_true", help="metrics also to Weights & Biases")
    parser.add_argument("--tagger", metavar="FOLDER", help="classifier that judges the pictures drawn while training")
    parser.add_argument(
        "--prompts", metavar="FILE", help="of those pictures, one a line; default: texts of the selection"
    )
    parser.add_argument(
        "--max-failures",
        type=int,
        default=3,
        metavar="N",
        help="of workers or nodes, before the job gives up; default: 3",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from trainer.recipe.resolve import Command  # torch and Ray take seconds to import: not for --help
    from trainer.runs.run_folder import only_job

    with only_job(local_path("--run", args.run)):
        _train(Command(**vars(args)))


def _train(command: "Command") -> None:
    started = time.time()
    import torch

    from pipeline.core.cluster import cluster
    from trainer.cluster.launch import train
    from trainer.recipe.resolve import check_device, resolve

    training = resolve(command)
    for note in training.notes:
        print(f"run: {note}", flush=True)
    if training.start_step >= training.stop_step:
        print(f"run: {training.folder} has its {training.stop_step} steps; --steps N trains longer", flush=True)
        return
    if not os.environ.get("RAY_ADDRESS"):
        check_device(training, torch.cuda.device_count())  # before a Ray of its own starts; another's is asked later
    print(
        f"run: steps {training.start_step} to {training.stop_step} of {training.stage.batch_size} samples: "
        f"{training.workers} workers x {training.accumulation} micro batches of {training.micro_batch}",
        flush=True,
    )
    with cluster("run", dashboard=True, niceness=0):
        trained = train(training)
    samples = (trained.steps - training.start_step) * training.stage.batch_size
    write_run_record(
        training.folder, "train", started, samples, samples, {}, steps=trained.steps, last=trained.lines[-1]
    )
    if trained.was_stopped and trained.steps < training.stop_step:
        print(f"run: stopped after step {trained.steps}, which is saved: resume with the same command", flush=True)


if __name__ == "__main__":
    run(main)
