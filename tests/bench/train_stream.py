"""BENCH: training with samples streamed from the dataset against the same batch over and over, which costs no reading.

Both are whole Ray Train jobs of the stage, in turns; images/s are those of the steps after the first log line.

    python tests/bench/train_stream.py --dataset demo/dataset --steps 120 --rounds 3
"""

import argparse
import itertools
import statistics
import tempfile

from pipeline.cluster import cluster
from trainer.data import TrainingData, load_batch
from trainer.launch import streamed, train
from trainer.order import micro_batches
from trainer.recipe import Command, Training, resolve
from trainer.team import Team
from trainer.worker import Source


def synthetic(data: TrainingData, training: Training, team: Team) -> Source:
    """The first micro batch again and again; it is read before the first step."""
    batch_size = training.stage.batch_size
    batch = load_batch(data, micro_batches(0, batch_size, team.rank, team.size, training.micro_batch)[0])
    return Source(data, lambda _: itertools.repeat(batch), held_out=lambda _: batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--stage", default="demo")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="FIELD=VALUE")
    args = parser.parse_args()
    settings = [*args.settings, f"log_every={args.steps // 4}", "evaluate_every=1000000"]
    ways = {"streamed": streamed, "synthetic": synthetic}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with cluster("bench"):
        for _ in range(args.rounds):
            for name, samples in ways.items():
                with tempfile.TemporaryDirectory(prefix="bench-train-") as run:
                    command = Command(
                        stage=args.stage, dataset=args.dataset, run=run, workers=args.workers, steps=args.steps,
                        settings=settings,
                    )  # fmt: skip
                    lines = train(resolve(command), samples).lines[1:]
                rates[name].append(statistics.mean(line["images_per_second"] or 0 for line in lines))
                waiting = statistics.mean(line["data_wait_share"] or 0 for line in lines)
                print(f"{name}: {rates[name][-1]:.1f} images/s, waiting {waiting:.1%}", flush=True)
    ratio = statistics.median(a / b for a, b in zip(rates["streamed"], rates["synthetic"], strict=True))
    print(f"streamed / synthetic, median of {args.rounds} rounds: {ratio:.0%}")


if __name__ == "__main__":
    main()
