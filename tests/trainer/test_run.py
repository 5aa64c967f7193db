"""The training and sampling jobs as users run them: output files, pictures, and refused commands."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.runs.run_folder import lock_run

RunJob = Callable[..., CompletedProcess[str]]


def _train(run_job: RunJob, dataset: Path, run: Path, *arguments: object) -> CompletedProcess[str]:
    return run_job("trainer/run.py", "--stage", "demo", "--dataset", dataset, "--run", run, *arguments)


def _succeeds(finished: CompletedProcess[str]) -> CompletedProcess[str]:
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished


def _refuses(finished: CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and one error line with these words, without a traceback."""
    assert finished.returncode == 2, finished.stderr[-2000:]
    assert "Traceback" not in finished.stderr
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert all(word in last for word in words), last


def test_a_run_writes_metrics_pictures_and_record(resumed: tuple[Path, str]) -> None:
    run, printed = resumed
    folder = run / "demo"
    [began] = [int(step) for step in re.findall(r"going on from step (\d+)", printed)]
    record = json.loads((folder / "run.json").read_text())
    samples = (12 - began) * 32
    assert (record["rows_in"], record["rows_out"], record["steps"]) == (samples, samples, 12)
    [evaluation] = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert evaluation["step"] == 12
    assert evaluation["loss"] > 0
    assert Image.open(folder / "grids/step-00000012.png").size[0] > 64
    assert list((folder / "tensorboard").glob("events.*"))
    state = json.loads((folder / "checkpoints/step-00000012/state.json").read_text())
    assert (state["position"], state["seed"], state["stage_name"]) == (12 * 32, 0, "demo")


def test_the_end_of_a_run_is_posted_to_an_address_that_is_shown_nowhere(resumed: tuple[Path, str], posted: Any) -> None:
    run, printed = resumed
    [body] = posted.bodies
    assert {name: body[name] for name in ("event", "run", "stage", "step", "reason")} == {
        "event": "ended", "run": "resumed", "stage": "demo", "step": 12, "reason": "12 of 12 steps",
    }  # fmt: skip
    [log] = re.findall(r"log: (\S+)", printed)
    [session] = re.findall(r"session folder of Ray: (\S+)", Path(log).read_text())
    files = [Path(log), *(path for folder in (run, session) for path in Path(folder).rglob("*") if path.is_file())]
    assert len(files) > 20
    assert [path for path in files if posted.secret.encode() in path.read_bytes()] == []
    assert posted.secret not in printed


def test_addresses_and_copies_that_cannot_be_used_are_refused(call_job: RunJob, dataset: Path, tmp_path: Path) -> None:
    refused = _train(call_job, dataset, tmp_path / "run", "--notify", "ftp://host/s3cr3t")
    _refuses(refused, "--notify", "https://HOST/PATH")
    assert "s3cr3t" not in refused.stderr + refused.stdout
    _refuses(_train(call_job, dataset, tmp_path / "run", "--checkpoints-copy", tmp_path / "run"), "--checkpoints-copy")
    _refuses(_train(call_job, dataset, tmp_path / "run", "--checkpoints-copy", "gs://bucket"), "--checkpoints-copy")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_takes_no_more_steps(call_job: RunJob, dataset: Path, whole: Path) -> None:
    again = _train(call_job, dataset, whole, "--steps", 12)
    assert again.returncode == 0, again.stderr
    assert "has its 12 steps; --steps N trains longer" in again.stdout


def test_a_changed_selection_is_refused(call_job: RunJob, dataset: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    state = tmp_path / "run/demo/checkpoints/step-00000012/state.json"
    changed = json.loads(state.read_text())
    changed["config"]["selection"]["hash"] = "another"
    state.write_text(json.dumps(changed))
    _refuses(_train(call_job, dataset, tmp_path / "run", "--steps", 13), "selection.hash", "--new-order", "--run")


def test_a_changed_optimizer_is_refused_by_field(call_job: RunJob, dataset: Path, whole: Path, tmp_path: Path) -> None:
    """The stored state would belong to other positions and parameters."""
    shutil.copytree(whole, tmp_path / "run")
    state = tmp_path / "run/demo/checkpoints/step-00000012/state.json"
    changed = json.loads(state.read_text())
    changed["config"]["stage"]["batch_size"] = 16
    changed["config"]["stage"]["optimizer"]["kind"] = "adamw"
    state.write_text(json.dumps(changed))
    _refuses(_train(call_job, dataset, tmp_path / "run", "--steps", 13), "optimizer.kind: adamw -> muon", "--run")


def test_a_second_job_on_the_same_run_is_refused(call_job: RunJob, dataset: Path, tmp_path: Path) -> None:
    with lock_run(tmp_path / "run"):
        _refuses(_train(call_job, dataset, tmp_path / "run", "--steps", 1), "another job is training", "--run")
        assert not list((tmp_path / "run").iterdir())
    with pytest.raises(BlockingIOError), lock_run(tmp_path / "run"):
        raise BlockingIOError  # raised by the job itself: passed on
    with lock_run(tmp_path / "run"):
        pass


def test_a_refused_job_leaves_no_folder_behind(call_job: RunJob, dataset: Path, tmp_path: Path) -> None:
    _refuses(_train(call_job, dataset, tmp_path / "run", "--workers", 3), "does not divide")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    _refuses(_train(call_job, dataset, tmp_path / "run", "--workers", 3), "does not divide")
    _refuses(_train(call_job, dataset, tmp_path / "run", "--set", f"repa.features={tmp_path}"), "vision model")
    assert (tmp_path / "run").exists(), "the folder was the user's"


def test_the_number_of_workers_defaults_to_the_environment(
    call_job: RunJob, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the same command works on every cluster."""
    monkeypatch.setenv("HDM_WORKERS", "3")
    _refuses(_train(call_job, dataset, tmp_path), "--workers 3 does not divide")
    _refuses(_train(call_job, dataset, tmp_path, "--workers", 5), "--workers 5 does not divide")
    monkeypatch.setenv("HDM_WORKERS", "four")
    _refuses(_train(call_job, dataset, tmp_path), "--workers", "'four'")


def test_impossible_trainings_are_refused_with_a_remedy(call_job: RunJob, dataset: Path, tmp_path: Path) -> None:
    _refuses(_train(call_job, dataset, tmp_path, "--workers", 3), "does not divide", "[2, 4]")
    _refuses(_train(call_job, dataset, tmp_path, "--steps", 0), "--steps")
    _refuses(_train(call_job, tmp_path, tmp_path, "--steps", 1), "pipeline/curate.py")
    _refuses(call_job("trainer/run.py", "--stage", "2048"), "2048", "demo")


def test_a_picture_is_reproducible_and_moves_with_the_camera(call_job: RunJob, whole: Path, tmp_path: Path) -> None:
    names: list[str] = []

    def sample(out: str, *arguments: object) -> np.ndarray:
        prompts = ("--prompt", "red star", "blue fish")
        _succeeds(
            call_job("trainer/sample.py", "--run", whole, *prompts, "--steps", 2, "--out", tmp_path / out, *arguments)
        )
        pictures = sorted((tmp_path / out).glob("*.png"))
        assert [path.name[:-11] for path in pictures] == ["000000-red-star", "000001-blue-fish"]
        names.append(pictures[0].name)
        made_by = json.loads(Image.open(pictures[1]).info["hdm"])
        assert (made_by["prompt"], made_by["seed"]) == ("blue fish", 1)
        return np.stack([np.asarray(Image.open(path)) for path in pictures])

    still = sample("still", "--width", 101, "--height", 48)
    assert still.shape == (2, 48, 104, 3), "101 is rounded to 104, a multiple of the 8-pixel token"
    np.testing.assert_array_equal(still, sample("again", "--width", 101, "--height", 48))
    assert not np.array_equal(still, sample("moved", "--width", 101, "--height", 48, "--x-shift", 0.25))
    assert names[0] == names[1] != names[2], "pictures with other settings have other names"


def test_the_gallery_has_every_section(call_job: RunJob, whole: Path, tmp_path: Path) -> None:
    arguments = ("--gallery", "--steps", 1, "--colour-agreement", 4, "--out", tmp_path, "--prompt", "red star")
    done = _succeeds(call_job("trainer/sample.py", "--run", whole, *arguments))
    assert str(tmp_path / "index.html") in done.stdout.splitlines()[-1]
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png") == 6 + 4 + 9 + 9, "six seeds, four shapes, nine cameras, nine of the sweep"
    for heading in ("Prompts and seeds", "Wide and tall", "Camera", "zoom 0.75", "refused", "Chance"):
        assert heading in page
    figures = json.loads((tmp_path / "gallery.json").read_text())
    assert figures["colour_agreement"]["total"] == figures["shape_agreement"]["total"] == 4
    assert figures["camera"]["moves"] == 4
    assert [record["job"] for record in figures["funnel"]] == ["ingest", "caption", "curate"]


def test_impossible_pictures_are_refused_with_a_remedy(call_job: RunJob, whole: Path, tmp_path: Path) -> None:
    def sample(*arguments: object) -> CompletedProcess[str]:
        return call_job("trainer/sample.py", "--run", whole, "--out", tmp_path, "--prompt", "red star", *arguments)

    _refuses(call_job("trainer/sample.py", "--run", tmp_path / "nowhere"), "no checkpoint", "trainer/run.py")
    _refuses(sample("--width", 0), "--width")
    _refuses(sample("--seed", -1), "--seed")
    _refuses(call_job("trainer/sample.py", "--run", "gs://bucket/run"), "s3://bucket/prefix")
    _refuses(sample("--zoom", 0), "zoom")
    _refuses(sample("--guidance", "nan"), "guidance")
    assert not list(tmp_path.glob("*.png"))
