"""JOB: train one stage on a selection of the dataset; run it again to go on from the newest checkpoint."""

import time
from dataclasses import dataclass

from pipeline.jobs import Parser, default_dataset, default_run, run, write_run_record


@dataclass(frozen=True, kw_only=True)
class RunJob:
    stage: str
    dataset: str
    run: str
    workers: int
    steps: int | None  # optimizer steps in all, instead of the stage's own number


def parse_args() -> RunJob:
    parser = Parser(prog="run.py", description=__doc__)
    parser.add_argument("--stage", required=True, help="demo")
    parser.add_argument("--dataset", default=default_dataset(), metavar="ROOT", help="folder or s3://bucket/prefix")
    parser.add_argument("--run", default=default_run(), metavar="DIR", help="folder of checkpoints and metrics")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="training processes, one per GPU")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps, instead of the stage's number")
    return RunJob(**vars(parser.parse_args()))


def main() -> None:
    job = parse_args()
    started = time.time()
    from pipeline.cluster import cluster  # torch and Ray take seconds to import: not for --help
    from trainer.launch import train
    from trainer.recipe import resolve

    training = resolve(job.stage, job.dataset, job.run, job.workers, job.steps)
    if training.start_step:
        print(f"run: going on from step {training.start_step} of {training.run}", flush=True)
    if training.start_step >= training.stop_step:
        print(f"run: {training.run} has its {training.stop_step} steps; --steps N trains longer", flush=True)
        return
    with cluster("run", dashboard=True):
        metrics = train(training)
    samples = (training.stop_step - training.start_step) * training.stage.batch_size
    write_run_record(training.run, "train", started, samples, samples, {}, steps=training.stop_step, last=metrics[-1])


if __name__ == "__main__":
    run(main)
