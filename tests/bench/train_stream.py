"""Benchmark: training on samples streamed from the dataset against training on the same samples held in memory.

One Ray Train job alternates between a block of steps on streamed batches and a block on the same batches again, so both
do the same work (a step's time depends on the lengths of its texts) within a minute. The first quarter of each block is
ignored, because it uses up batches that were read before the block began. During the first pair the job still warms up.

    python tests/bench/train_stream.py --dataset demo/dataset --blocks 6
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace

from pipeline.core.cluster import cluster
from trainer.cluster.launch import train
from trainer.cluster.sample_stream import Warn, stream_source
from trainer.recipe.command import Command
from trainer.recipe.resolve import resolve
from trainer.recipe.training import Training
from trainer.samples.data import Batch, TrainingData
from trainer.training.worker import SampleSource
from trainer.training.worker_group import WorkerGroup

STEPS = 40  # per block


def alternate(data: TrainingData, training: Training, group: WorkerGroup, warn: Warn) -> SampleSource:
    source = stream_source(data, training, group, warn)
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
    parser.add_argument("--dataset", required=True, help="Folder or s3:// prefix of the dataset.")
    parser.add_argument("--stage", default="demo", help="Stage to train. Default: demo.")
    parser.add_argument("--workers", type=int, default=1, help="Training workers. Default: 1.")
    parser.add_argument("--blocks", type=int, default=6, help="Blocks of each kind. Default: 6.")
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="FIELD=VALUE",
        help="Change a field of the stage, as in trainer/run.py.",
    )  # fmt: skip
    args = parser.parse_args()
    settings = [*args.settings, f"log_every={STEPS // 4}", "evaluate_every=1000000", "checkpoint_every=1000000"]
    with cluster("bench", niceness=0), tempfile.TemporaryDirectory(prefix="bench-train-") as run:
        command = Command(
            stage=args.stage, dataset=args.dataset, run=run, workers=args.workers, steps=2 * STEPS * args.blocks,
            settings=settings,
        )  # fmt: skip
        lines = train(resolve(command), alternate).lines
    rates = [line["images_per_second"] or 0 for line in lines]
    blocks = [statistics.mean(rates[start + 1 : start + 4]) for start in range(0, len(rates), 4)]
    pairs = list(zip(blocks[::2], blocks[1::2], strict=True))
    ratio = statistics.median(streamed / from_memory for streamed, from_memory in pairs)
    shown = ", ".join(f"{streamed:.1f} / {from_memory:.1f}" for streamed, from_memory in pairs)
    what = f"train_stream: stage {args.stage}, samples streamed / the same samples from memory"
    print(f"| {what} | {ratio:.0%}, median of {len(pairs)} pairs: {shown} images/s |")


if __name__ == "__main__":
    main()
