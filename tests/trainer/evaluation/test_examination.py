"""sample.py --evaluate: which rows, which pictures, what is drawn again, and what is refused."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.pictures.decoder import Crop, square_crop
from pipeline.storage.shards import Store
from trainer.drawing.pictures import read_origin
from trainer.evaluation.examined_rows import examined_rows, middle_crops
from trainer.evaluation.inception import Inception
from trainer.samples.layout import Selection, held_out, id_hash

pytestmark = pytest.mark.usefixtures("one_thread")

RunJob = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def selection(dataset: Path) -> Selection:
    return Selection.load(str(dataset), "demo", 64)


# --- Rows -----------------------------------------------------------------------------------------------------------


def test_held_out_rows_come_first_and_each_row_once(selection: Selection) -> None:
    rows = examined_rows(selection, 10**6, hold_out=0.1)
    assert len({row.id for row in rows}) == len(rows) == selection.count
    marked = [row.held_out for row in rows]
    assert 0 < sum(marked) < len(rows)
    assert marked == sorted(marked, reverse=True)
    assert marked == held_out(id_hash(pa.array([row.id for row in rows])), 0.1).tolist()
    assert examined_rows(selection, 5, hold_out=0.1) == rows[:5]
    assert not any(row.held_out for row in examined_rows(selection, 5, hold_out=0.0))


def test_the_pictures_of_the_rows_are_the_middles_of_their_own(selection: Selection) -> None:
    rows = examined_rows(selection, 12, hold_out=0.0)
    crops = {row.id: pixels for row, pixels in middle_crops(selection, rows, 32)}
    assert crops.keys() == {row.id for row in rows}
    store = Store(selection.dataset)
    for shard in selection.shards:
        for picture in store.read_table(f"images/{shard}.parquet", ["id", "image"]).to_pylist():
            if picture["id"] in crops:
                cut = square_crop(picture["image"], 32, 0.5, 0.5)
                assert isinstance(cut, Crop)
                assert np.array_equal(crops[picture["id"]], cut.pixels_HWC)


# --- The job --------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(call_job: RunJob, dataset: Path, tmp_path: Path) -> RunJob:
    run, out = Path(__file__).parent / "demo_run", tmp_path / "out"

    def call(*arguments: object) -> CompletedProcess[str]:
        where = ("--run", run, "--out", out, "--dataset", dataset)
        return call_job("trainer/sample.py", "--evaluate", "demo", *where, *arguments)

    return call


def test_what_is_drawn_already_is_not_drawn_again(evaluate: RunJob, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "pictures"
    done = evaluate("--n", 2, "--steps", 1)
    assert done.returncode == 0, done.stderr
    first = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert len(first) == 2 + 2 * 4  # the camera goes four ways
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["speed"]["pictures"] == 10

    lost = sorted(folder.glob("*.json"))[3]
    lost.unlink()  # as if it had been killed between picture and JSON
    assert evaluate("--n", 2, "--steps", 1).returncode == 0
    second = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert {name for name in first if first[name] != second[name]} == {lost.with_suffix(".png").name}
    lost.with_suffix(".png").unlink()  # by whoever looked through the pictures
    assert evaluate("--n", 2, "--steps", 1).returncode == 0
    assert {path.name for path in folder.glob("*.png")} == first.keys()

    record = tmp_path / "out" / "evaluation.json"
    speed = json.loads(record.read_text())["speed"]
    assert evaluate("--n", 2, "--steps", 1).returncode == 0
    assert json.loads(record.read_text())["speed"] == speed, "nothing was drawn, so it is still the last one's"
    record.unlink()
    assert evaluate("--n", 2, "--steps", 1).returncode == 0
    assert json.loads(record.read_text())["speed"] is None
    assert evaluate("--n", 2, "--steps", 2).returncode == 0
    assert len(list(folder.glob("*.png"))) == 20, "other settings are other pictures"


def test_every_figure_is_there_and_counts_its_pictures(evaluate: RunJob, selection: Selection, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(Inception().state_dict(), tmp_path / "inception.safetensors")
    save_tagger = runpy.run_path(str(Path(__file__).with_name("test_tagger.py")))["save_tagger"]
    judges = ("--inception", tmp_path / "inception.safetensors", "--tagger", save_tagger(tmp_path / "tagger"))
    done = evaluate("--n", 3, "--seed", 7, "--steps", 1, "--guidance", 1, *judges)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    rows = examined_rows(selection, 3, 0.01)
    assert (found["pictures"], found["held_out"]) == (3, sum(row.held_out for row in rows))
    assert found["camera"]["moves"] == 12
    assert (found["colour"]["total"], found["shape"]["total"]) == (3, 3)
    assert found["shape"]["judge"] > 3 * found["shape"]["chance"]
    assert (found["fidelity"]["real"], found["fidelity"]["drawn"]) == (3, 3)
    assert found["tags"] == {"asked": 0, "found": 0, "share": None, "chance": None}, "no text has a tag that it knows"
    assert "2048" in found["notes"][0]
    assert "2048" in done.stdout
    drawn = [read_origin(path) for path in (tmp_path / "out" / "pictures").glob("*.png")]
    still = {origin["seed"]: origin["prompt"] for origin in drawn if origin["x_shift"] == origin["y_shift"] == 0}
    assert still == {7 + number: row.text for number, row in enumerate(rows)}
    [path, *_] = (tmp_path / "out" / "pictures").glob("*.png")
    assert Image.open(path).size == (64, 64)


def test_what_cannot_be_evaluated_is_refused_in_one_line(evaluate: RunJob, call_job: RunJob, tmp_path: Path) -> None:
    def refused(done: CompletedProcess[str], *named: str) -> None:
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert all(name in done.stderr for name in named), done.stderr

    refused(evaluate("--n", 0), "--n 0")
    refused(evaluate("--n", 1, "--inception", tmp_path / "x"), "--n 1", "at least 2")
    refused(evaluate("--inception", tmp_path / "none.safetensors"), "none.safetensors")
    refused(evaluate("--tagger", tmp_path / "none"), "--tagger")
    refused(evaluate("--dataset", tmp_path), "--evaluate demo", "no such selection", "--dataset")
    refused(evaluate("--prompt", "a"), "--evaluate")
    refused(evaluate("--zoom", 2), "--zoom")
    refused(evaluate("--width", 128), "--width")
    refused(call_job("trainer/sample.py", "--run", tmp_path, "--tagger", tmp_path), "--tagger", "--evaluate")
    refused(call_job("trainer/sample.py", "--run", tmp_path, "--n", 8), "--n", "--evaluate")
    assert not (tmp_path / "out").exists()
