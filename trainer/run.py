"""JOB: trains one stage on a selection of the dataset. The same command resumes from the newest checkpoint."""

import os
import time

from pipeline.core.jobs import local_path, run
from pipeline.storage.run_record import write_run_record
from trainer.recipe.command import Command, parse_args


def main() -> None:
    command = parse_args(__doc__)
    from trainer.runs.run_folder import lock_run  # after parsing, so that --help does not wait for torch

    with lock_run(local_path("--run", command.run)):
        _train(command)


def _train(command: Command) -> None:
    started = time.time()
    import torch

    from pipeline.core.cluster import cluster
    from trainer.cluster.launch import train
    from trainer.health.notify import Notifier
    from trainer.recipe.memory import check_device
    from trainer.recipe.resolve import resolve

    training = resolve(command)
    for note in training.notes:
        print(f"run: {note}", flush=True)
    if training.start_step >= training.stop_step:
        print(f"run: {training.folder} has its {training.stop_step} steps; --steps N trains longer", flush=True)
        return
    if not os.environ.get("RAY_ADDRESS"):
        check_device(training, torch.cuda.device_count())  # before starting Ray; an existing cluster is asked later
    auto = torch.cuda.is_available() and "auto" in (training.stage.micro_batch, training.stage.checkpointing)
    batches = (
        "micro batches that fit the GPU" if auto else f"{training.accumulation} micro batches of {training.micro_batch}"
    )
    counts = training.worker_counts()
    others = f" (or {', '.join(map(str, counts[:-1]))} workers, as nodes come and go)" if len(counts) > 1 else ""
    print(
        f"run: steps {training.start_step} to {training.stop_step} of {training.stage.batch_size} samples: "
        f"{training.workers} workers x {batches}{others}",
        flush=True,
    )
    starting = time.monotonic()
    notifier = Notifier(command.notify, training.run, training.stage_name, training.start_step, training.stop_step)
    with notifier, cluster("run", dashboard=True, niceness=0):
        trained = train(training, ray_seconds=time.monotonic() - starting, notifier=notifier)
    samples = (trained.steps - training.start_step) * training.stage.batch_size
    write_run_record(
        training.folder, "train", started, samples, samples, {}, steps=trained.steps, last=trained.lines[-1]
    )
    if trained.was_stopped and trained.steps < training.stop_step:
        print(f"run: stopped after step {trained.steps}, which is saved: resume with the same command", flush=True)


if __name__ == "__main__":
    run(main)
