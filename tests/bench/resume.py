"""BENCH: how soon a killed training takes its next step, by the size of its dataset and the place in its epoch.

Large datasets are simulated: one ingested, curated shard of drawn pictures, linked under as many names, so that every
file is there to be listed, opened and read, and ids repeat. "Planned" is what depends on the dataset: from the
selection's record to the samples of the first batch. "First" has to open two files for each shard; a run that goes on
finds the layout in its folder. The killed run is `trainer/run.py --stage demo` as its users start it, with Ray's start
and torch's imports, killed with all its processes after its fifth step.

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
NAME = "demo"  # of stage and selection
_LINKS = 50_000  # of one file; ext4 allows 65,000
_BATCH = 1024  # samples
_LIMIT = 900  # seconds until a run must have taken a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--rows", type=int, default=100, help="samples a shard; default: 100")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-resume-"))
    try:
        shard = one_shard(folder / "drawn", args.rows)
        small, *_ = datasets = [simulated(shard, folder / str(count), count) for count in args.shards]
        for dataset in datasets:
            planning(dataset, folder)
        for dataset in dict.fromkeys([small, datasets[-1]]):
            killed_and_started_again(dataset, folder)
    finally:
        shutil.rmtree(folder)


# --- Datasets ---------------------------------------------------------------------------------------------------------


def one_shard(dataset: Path, rows: int) -> Path:
    """A dataset of one shard with so many selected rows."""
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


def simulated(drawn: Path, dataset: Path, count: int) -> Path:
    """The one shard under `count` names."""
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


# --- Planning ---------------------------------------------------------------------------------------------------------


def planning(dataset: Path, folder: Path) -> None:
    first = timed(lambda: planned(dataset, folder, 0.0))
    places = {"begins": 0.0, "is half done": 0.5, "ends": 0.999}
    again = {name: [timed(lambda at=at: planned(dataset, folder, at)) for _ in range(3)] for name, at in places.items()}
    shown = ", ".join(f"{statistics.median(seconds):.2f} s where the epoch {name}" for name, seconds in again.items())
    shards = len(list((dataset / "images").iterdir()))
    samples = planned(dataset, folder, 0.0)
    print(f"| planned, {shards:,} shards, {samples:,} samples | first {first:.1f} s; going on {shown} |", flush=True)
    (folder / ROW_INDEX_FILE).unlink()


def planned(dataset: Path, folder: Path, place: float) -> int:
    """Samples of an epoch, of whose first batch at a place from 0 to 1 everything is known."""
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


def killed_and_started_again(dataset: Path, folder: Path) -> None:
    run, encoder = folder / f"run-{dataset.name}", folder / "encoder"
    if not encoder.exists():  # the local one is made of all texts of a dataset; here, once, of the smallest's
        until_a_step(training(dataset, run, "local"), run, 0)
        shutil.move(run / "text_encoder", encoder)
        shutil.rmtree(run)
    first = until_a_step(training(dataset, run, str(encoder)), run, 4)
    again = until_a_step(training(dataset, run, str(encoder)), run, last_step(run))
    shards = len(list((dataset / "images").iterdir()))
    what = f"killed run, {shards:,} shards, from the command to its next step"
    print(f"| {what} | {again:.1f} s; to its fifth when it began {first:.1f} s |", flush=True)


def training(dataset: Path, run: Path, text_encoder: str) -> subprocess.Popen[bytes]:
    script = [sys.executable, ROOT / "trainer" / "run.py", "--stage", NAME, "--dataset", dataset, "--run", run]
    fields = {"text_encoder": text_encoder, "log_every": 1, "checkpoint_every": 2, "evaluate_every": 1_000_000}
    settings = [f"--set={name}={value}" for name, value in fields.items()]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
    return subprocess.Popen([*script, *settings], env=environment, stdout=sys.stderr)


def until_a_step(job: subprocess.Popen[bytes], run: Path, after: int) -> float:
    """Seconds until a step later than `after` is logged; the run is then killed with all its processes."""
    started = time.perf_counter()
    while last_step(run) <= after:
        assert job.poll() is None, f"the training ended with {job.returncode}"
        assert time.perf_counter() - started < _LIMIT, f"no step within {_LIMIT} s"
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
