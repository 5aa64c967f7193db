"""sample.py --evaluate: what it draws, measures and draws again, and what it refuses."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from trainer.drawing.picture_files import read_metadata
from trainer.evaluation.rows import evaluation_rows
from trainer.samples.row_index import Selection

pytestmark = pytest.mark.usefixtures("one_thread")

RunJob = Callable[..., CompletedProcess[str]]
HERE = Path(__file__).parent


@pytest.fixture
def evaluate(call_job: RunJob, dataset: Path, tmp_path: Path) -> RunJob:
    def call(*arguments: object) -> CompletedProcess[str]:
        where = ("--run", HERE / "demo_run", "--out", tmp_path / "out", "--dataset", dataset)
        return call_job("trainer/sample.py", "--evaluate", "demo", *where, *arguments)

    return call


def test_pictures_that_exist_are_not_drawn_again(
    evaluate: RunJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.evaluation.coloured_objects._REFERENCES", 4)  # too few to measure shapes: saves time
    folder, record = tmp_path / "out" / "pictures", tmp_path / "out" / "evaluation.json"

    def run(steps: int = 1) -> None:
        done = evaluate("--n", 2, "--steps", steps)
        assert done.returncode == 0, done.stderr

    run()
    first = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert len(first) == 2 + 2 * 4  # the camera moves in four directions
    assert json.loads(record.read_text())["shape"] is None
    speed = json.loads(record.read_text())["speed"]
    assert speed["pictures"] == 10
    run()
    assert json.loads(record.read_text())["speed"] == speed, "nothing was drawn: the recorded speed is kept"

    without_json, without_png = sorted(folder.glob("*.json"))[3:5]
    without_json.unlink()  # as if the job had been killed between picture and JSON
    without_png.with_suffix(".png").unlink()  # as if the user had removed it
    run()
    second = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    redrawn = {without_json.with_suffix(".png").name, without_png.with_suffix(".png").name}
    assert {name for name in first if first[name] != second[name]} == redrawn
    assert json.loads(record.read_text())["speed"]["pictures"] == 2

    record.unlink()
    run()
    assert json.loads(record.read_text())["speed"] is None
    run(steps=2)
    assert len(list(folder.glob("*.png"))) == 20, "pictures with other settings are other files"


def test_every_measure_is_recorded_and_counts_its_pictures(evaluate: RunJob, dataset: Path, tmp_path: Path) -> None:
    random_weights = runpy.run_path(str(HERE / "test_inception.py"))["random_weights"]
    save_file(random_weights(), tmp_path / "inception.safetensors")
    save_tagger = runpy.run_path(str(HERE / "test_tagger.py"))["save_tagger"]
    networks = ("--inception", tmp_path / "inception.safetensors", "--tagger", save_tagger(tmp_path / "tagger"))
    done = evaluate("--n", 3, "--seed", 7, "--steps", 1, "--guidance", 1, *networks)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    rows = evaluation_rows(Selection.load(str(dataset), "demo", 64), 3, 0.01)
    assert (found["pictures"], found["held_out"]) == (3, sum(row.held_out for row in rows))
    assert found["camera"]["moves"] == 12
    assert (found["colour"]["total"], found["shape"]["total"]) == (3, 3)
    assert found["shape"]["judge"] > 3 * found["shape"]["chance"]
    assert (found["fidelity"]["real"], found["fidelity"]["drawn"]) == (3, 3)
    assert found["tags"] == {"asked": 0, "found": 0, "share": None, "chance": None}, "no text has a tag that it knows"
    assert "2048" in found["notes"][0]
    assert "2048" in done.stdout
    drawn = [read_metadata(path) for path in (tmp_path / "out" / "pictures").glob("*.png")]
    still = {picture["seed"]: picture["prompt"] for picture in drawn if picture["x_shift"] == picture["y_shift"] == 0}
    assert still == {7 + number: row.text for number, row in enumerate(rows)}
    [path, *_] = (tmp_path / "out" / "pictures").glob("*.png")
    assert Image.open(path).size == (64, 64)
    assert np.asarray(Image.open(path)).std() > 0


def test_a_wrong_command_is_refused_in_one_line(evaluate: RunJob, call_job: RunJob, tmp_path: Path) -> None:
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
