"""Benchmark: seconds until a killed training takes its next step, by size of the dataset and position in the epoch.

Large datasets are simulated: one curated shard of drawn pictures is hard-linked under many names, so every file can be
listed, opened and read, but ids repeat. The first measurement covers what depends on the dataset: from reading the
selection's record to knowing the rows of the first batch. The first start opens two files per shard; a resumed run has
the row index in its folder. The second measurement runs `trainer/run.py --stage demo` as a user starts it, including
the start of Ray and the import of torch, and kills all its processes after its fifth step.

    python tests/bench/resume.py --shards 1000 10000 100000
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

from pipeline.storage.shards import Store
from trainer.samples.data import CropConfig, TrainingData
from trainer.samples.row_index import ROW_INDEX_FILE, Selection
from trainer.samples.training_text import CaptionConfig

ROOT = Path(__file__).parents[2]
NAME = "demo"  # of the stage and the selection
_LINKS = 50_000  # hard links per file; ext4 allows 65,000
_BATCH = 1024  # samples
_TIMEOUT = 900  # seconds in which a run must take a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shards", type=int, nargs="+", default=[1_000, 10_000, 100_000],
        help="Sizes of the datasets. The first and the last one also get a killed run. Default: 1000 10000 100000.",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=100, help="Samples per shard. Default: 100.")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-resume-"))
    try:
        shard = write_one_shard(folder / "drawn", args.rows)
        small, *_ = datasets = [simulate(shard, folder / str(count), count) for count in args.shards]
        for dataset in datasets:
            measure_first_batch(dataset, folder)
        for dataset in dict.fromkeys([small, datasets[-1]]):
            measure_killed_run(dataset, folder)
    finally:
        shutil.rmtree(folder)


# --- Datasets ---------------------------------------------------------------------------------------------------------


def write_one_shard(dataset: Path, rows: int) -> Path:
    """Writes a dataset of one shard with `rows` selected rows."""
    raw = str(dataset / "raw")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
    for command in (
        ["sample_data.py", "--images", str(3 * rows), "--out", raw],
        ["ingest.py", "--raw", f"{raw}/danbooru", "--dataset", str(dataset)],
        ["caption.py", "--dataset", str(dataset)],
        ["curate.py", "--dataset", str(dataset), "--stage", NAME],
    ):
        script = [sys.executable, ROOT / "pipeline" / command[0], *command[1:]]
        subprocess.run(script, check=True, env=environment, stdout=sys.stderr)
    store, folder = Store(str(dataset)), f"selections/{NAME}"
    [shard] = store.shards(folder)
    selected = store.read_table(f"{folder}/{shard}.parquet")
    assert selected.num_rows >= rows, selected.num_rows
    store.write_table(f"{folder}/{shard}.parquet", selected.slice(0, rows), selected.schema)
    return dataset


def simulate(drawn: Path, dataset: Path, count: int) -> Path:
    """Writes a dataset that has the one shard under `count` names."""
    files = {"images": next(drawn.glob("images/*.parquet")), "rows": next(drawn.glob(f"selections/{NAME}/*.parquet"))}
    places = {"images": dataset / "images", "rows": dataset / "selections" / NAME}
    for kind, place in places.items():
        place.mkdir(parents=True)
        for number in range(count):
            link = place / f"simulated-{number:06d}.parquet"
            if number % _LINKS == 0:
                shutil.copy(files[kind], link)
                first = link
            else:
                os.link(first, link)
    shutil.copy(drawn / "dataset.json", dataset)
    record = json.loads((drawn / "selections" / NAME / "selection.json").read_text())
    rows = Store(str(drawn)).read_table(f"selections/{NAME}/{files['rows'].name}", ["id"]).num_rows
    record["shards"] = {f"simulated-{number:06d}": rows for number in range(count)}
    record["hash"] = f"simulated {count}"
    (places["rows"] / "selection.json").write_text(json.dumps(record))
    return dataset


# --- First batch ------------------------------------------------------------------------------------------------------


def measure_first_batch(dataset: Path, folder: Path) -> None:
    first = timed(lambda: locate_batch(dataset, folder, 0.0))
    places = {"at the start": 0.0, "in the middle": 0.5, "at the end": 0.999}
    again = {
        name: [timed(lambda at=at: locate_batch(dataset, folder, at)) for _ in range(3)] for name, at in places.items()
    }
    shown = ", ".join(f"{statistics.median(seconds):.2f} s {name}" for name, seconds in again.items())
    shards = len(list((dataset / "images").iterdir()))
    samples = locate_batch(dataset, folder, 0.0)
    what = f"resume: locate the first batch, {shards:,} shards, {samples:,} samples"
    print(f"| {what} | {first:.1f} s at the first start; resumed {shown} of the epoch |", flush=True)
    (folder / ROW_INDEX_FILE).unlink()


def locate_batch(dataset: Path, folder: Path, place: float) -> int:
    """Finds the rows of the batch at `place`, the fraction of the epoch that is done. Returns the samples per epoch."""
    selection = Selection.load(str(dataset), NAME, 64)
    crop = CropConfig(64, CaptionConfig(), seed=0)
    data = TrainingData.load(selection, crop, batch_size=_BATCH, hold_out=0.01, index_folder=str(folder))
    start = int(place * data.order.count)
    data.row_index.locate(data.order.samples(np.arange(start, start + _BATCH)))
    return data.order.count


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# --- A killed run -----------------------------------------------------------------------------------------------------


def measure_killed_run(dataset: Path, folder: Path) -> None:
    run, encoder = folder / f"run-{dataset.name}", folder / "encoder"
    if not encoder.exists():  # the local text encoder is built once, from the texts of the smallest dataset
        run_until_step(start_training(dataset, run, "local"), run, 0)
        shutil.move(run / "text_encoder", encoder)
        shutil.rmtree(run)
    first = run_until_step(start_training(dataset, run, str(encoder)), run, 4)
    again = run_until_step(start_training(dataset, run, str(encoder)), run, last_step(run))
    shards = len(list((dataset / "images").iterdir()))
    what = f"resume: killed run, {shards:,} shards, from the command to the next step"
    print(f"| {what} | {again:.1f} s; at the first start to step 5: {first:.1f} s |", flush=True)


def start_training(dataset: Path, run: Path, text_encoder: str) -> subprocess.Popen[bytes]:
    script = [sys.executable, ROOT / "trainer" / "run.py", "--stage", NAME, "--dataset", dataset, "--run", run]
    fields = {"text_encoder": text_encoder, "log_every": 1, "checkpoint_every": 2, "evaluate_every": 1_000_000}
    settings = [f"--set={name}={value}" for name, value in fields.items()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
    return subprocess.Popen([*script, *settings], env=environment, stdout=sys.stderr)


def run_until_step(job: subprocess.Popen[bytes], run: Path, after: int) -> float:
    """Seconds until a step after step `after` is logged. Then kills all processes of the run."""
    started = time.perf_counter()
    while last_step(run) <= after:
        assert job.poll() is None, f"the training ended with {job.returncode}"
        assert time.perf_counter() - started < _TIMEOUT, f"no step within {_TIMEOUT} s"
        time.sleep(0.05)
    seconds = time.perf_counter() - started
    for process in [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()
    return seconds


def last_step(run: Path) -> int:
    lines = (run / NAME / "metrics.jsonl").read_text().splitlines() if (run / NAME / "metrics.jsonl").exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


if __name__ == "__main__":
    main()
