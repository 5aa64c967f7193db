"""BENCH: training with samples loader_source from the dataset against the same ones held in memory, which cost no reading.

One Ray Train job takes turns: a block of steps on loader_source batches, then a block on those again. So both do the same
work (a step's depends on how long its texts are) on the same machine within a minute of each other. The first quarter
of each block is left out: what was read ahead before it began is used up there. The first pair is of a job that still
warms up.

    python tests/bench/train_stream.py --dataset demo/dataset --blocks 6
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace

from trainer.cluster.loader_actors import loader_source

from pipeline.core.cluster import cluster
from trainer.cluster.launch import train
from trainer.recipe.command import Command
from trainer.recipe.resolve import resolve
from trainer.recipe.training import Training
from trainer.samples.data import Batch, TrainingData
from trainer.training.worker_group import WorkerGroup
from trainer.training.worker import SampleSource

STEPS = 40  # of a block


def in_turns(data: TrainingData, training: Training, group: WorkerGroup) -> SampleSource:
    source = loader_source(data, training, group)
    count = STEPS * training.accumulation

    def batches(training: Training) -> Iterator[Batch]:
        read = source.batches(training)
        while True:
            block = []
            for _ in range(count):
                block.append(next(read))
                yield block[-1]
            yield from block

    return replace(source, batches=batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--stage", default="demo")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=6, help="of each kind")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="FIELD=VALUE")
    args = parser.parse_args()
    settings = [*args.settings, f"log_every={STEPS // 4}", "evaluate_every=1000000", "checkpoint_every=1000000"]
    with cluster("bench", niceness=0), tempfile.TemporaryDirectory(prefix="bench-train-") as run:
        command = Command(
            stage=args.stage, dataset=args.dataset, run=run, workers=args.workers, steps=2 * STEPS * args.blocks,
            settings=settings,
        )  # fmt: skip
        lines = train(resolve(command), in_turns).lines
    rates = [line["images_per_second"] or 0 for line in lines]
    blocks = [statistics.mean(rates[start + 1 : start + 4]) for start in range(0, len(rates), 4)]
    pairs = list(zip(blocks[::2], blocks[1::2], strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    shown = ", ".join(f"{loader_source:.1f} / {from_memory:.1f}" for loader_source, from_memory in pairs)
    what = f"training of stage {args.stage}: samples loader_source / the same from memory"
    print(f"| {what} | {ratio:.0%}, median of {len(pairs)}: {shown} images/s |")


if __name__ == "__main__":
    main()
