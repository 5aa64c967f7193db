"""sample.py: which pictures and files it writes, and what it refuses in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.drawing.picture_files import read_metadata

pytestmark = pytest.mark.usefixtures("one_thread")

RunJob = Callable[..., CompletedProcess[str]]
Sample = Callable[..., list[Path]]


@pytest.fixture
def sample(call_job: RunJob, random_run: Path, tmp_path: Path) -> Sample:
    """sample("out", "--prompt", ...) -> the PNGs in tmp_path / "out" that the command printed."""

    def call(out: str, *arguments: object) -> list[Path]:
        done = call_job("trainer/sample.py", "--run", random_run, "--out", tmp_path / out, *arguments)
        assert done.returncode == 0, done.stderr
        call.printed = done.stdout  # type: ignore[attr-defined]
        return [Path(line) for line in done.stdout.splitlines() if line.endswith(".png")]

    return call


def refused(done: CompletedProcess[str], *named: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for name in named:
        assert name in done.stderr


SIZE = ("--width", 64, "--height", 48, "--steps", 2)


# --- --like ---------------------------------------------------------------------------------------------------------


def test_a_picture_is_reproduced_to_the_byte_from_its_file_alone(sample: Sample) -> None:
    """Each of a batch of three, because a batch of another size may round differently."""
    settings = ("--sampler", "heun", "--time-shift", 2, "--unconditional-rate", 0.5, "--x-shift", 0.1, "--zoom", 1.3)
    drawn = sample("first", "--prompt", "空 cat", "", "red star, night", *SIZE, *settings, "--negative", "blue")
    assert len(drawn) == 3
    for path in drawn:
        [again] = sample("again", "--like", path)
        assert again.name == path.name
        assert again.read_bytes() == path.read_bytes()
        assert again.with_suffix(".json").read_bytes() == path.with_suffix(".json").read_bytes()


def test_flags_override_the_settings_of_the_picture_of_like(sample: Sample) -> None:
    [path] = sample("first", "--prompt", "red star", *SIZE, "--seed", 5)
    [other] = sample("other", "--like", path, "--guidance", 2, "--prompt", "blue fish")
    before, after = read_metadata(path), read_metadata(other)
    assert (after.pop("guidance"), after.pop("prompt")) == (2.0, "blue fish")
    assert before.items() >= after.items()


def test_another_checkpoint_is_reported(call_job: RunJob, random_run: Path, sample: Sample, tmp_path: Path) -> None:
    [path] = sample("first", "--prompt", "red star", *SIZE)
    run = shutil.copytree(random_run, tmp_path / "run")
    [state] = run.glob("demo/checkpoints/*/state.json")
    state.write_text(json.dumps(json.loads(state.read_text()) | {"saved_at": 1.0}))
    done = call_job("trainer/sample.py", "--run", run, "--out", tmp_path, "--like", path)
    assert "drawn with checkpoint of step 1, now checkpoint of step " in done.stdout


def test_files_that_cannot_be_drawn_again_are_refused(
    call_job: RunJob, random_run: Path, sample: Sample, tmp_path: Path
) -> None:
    *drawn, sheet = sample("first", "--prompt", "a", "b", *SIZE, "--grid")

    def like(path: Path, *arguments: object) -> CompletedProcess[str]:
        return call_job("trainer/sample.py", "--run", random_run, "--out", tmp_path, "--like", path, *arguments)

    refused(like(tmp_path / "none.png"), "does not exist")
    refused(like(sheet), "sheet")
    half = tmp_path / "half.png"
    half.write_bytes(drawn[0].read_bytes()[:-100])
    refused(like(half), "damaged")
    refused(like(drawn[0], "--prompts", "x.txt"), "--like", "--prompts")
    refused(like(drawn[0], "--zoom", 0), "zoom")


# --- Prompt files ---------------------------------------------------------------------------------------------------


def test_a_text_file_has_a_prompt_per_line(sample: Sample, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffred star\r\n\r\n  blue fish, 空\r\n".encode())
    origins = [read_metadata(path) for path in sample("out", "--prompts", file, *SIZE, "--seed", 7)]
    assert [(origin["prompt"], origin["seed"]) for origin in origins] == [("red star", 7), ("blue fish, 空", 8)]


def test_settings_of_a_line_override_the_flags(sample: Sample, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "", "width": 101, "zoom": 2, "sampler": "heun", "shift": 1.5, "seed": 40},
        {"prompt": "blue fish", "guidance": 1, "negative": "red", "selection_rate": 0.25},
        {"prompt": "red star", "steps": 3},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    origins = {origin["prompt"]: origin for origin in map(read_metadata, sample("out", "--prompts", file, *SIZE))}
    assert origins[""].items() >= (lines[0] | {"width": 104, "height": 48, "steps": 2}).items()
    assert origins["blue fish"].items() >= (lines[1] | {"seed": 1, "width": 64, "sampler": "euler"}).items()
    assert origins["red star"].items() >= (lines[2] | {"seed": 2, "shift": (48 / 64) ** 0.5}).items()
    assert "101 x 48 pixels rounded to 104 x 48" in sample.printed  # type: ignore[attr-defined]


# --- Sheets ---------------------------------------------------------------------------------------------------------


def test_the_sheet_of_a_sweep_shows_each_picture_in_its_row_and_column(sample: Sample) -> None:
    axes = ("--sweep", "zoom=0.5,1", "--sweep", "seed=1,2,3")
    *drawn, sheet = sample("out", "--prompt", "red star", *SIZE, *axes)
    assert len(drawn) == 6
    found = np.asarray(Image.open(sheet))
    by_place = {
        (read_metadata(path)["zoom"], read_metadata(path)["seed"]): np.asarray(Image.open(path)) for path in drawn
    }
    corners = {}
    for (zoom, seed), pixels in by_place.items():
        enlarged = pixels.repeat(4, axis=0).repeat(4, axis=1)  # 192 is the first multiple of 48 that is at least 160
        corners[zoom, seed] = _corner_of(enlarged, found)
    tops, lefts = sorted({y for y, _ in corners.values()}), sorted({x for _, x in corners.values()})
    assert {place: (tops.index(y), lefts.index(x)) for place, (y, x) in corners.items()} == {
        (zoom, seed): (row, column) for row, zoom in enumerate((0.5, 1)) for column, seed in enumerate((1, 2, 3))
    }
    for x in lefts:
        assert (found[: tops[0], x : x + 256] < 128).any(), "a label above each column"
    for y in tops:
        assert (found[y : y + 192, : lefts[0]] < 128).any(), "a label beside each row"


def _corner_of(picture: np.ndarray, sheet: np.ndarray) -> tuple[int, int]:
    height, width = picture.shape[:2]
    starts = np.argwhere((sheet[: 1 - height, : 1 - width] == picture[0, 0]).all(axis=2))
    [corner] = [(y, x) for y, x in starts if np.array_equal(sheet[y : y + height, x : x + width], picture)]
    return int(corner[0]), int(corner[1])


def test_a_grid_has_pictures_of_all_sizes_with_labels_and_metadata(sample: Sample, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    sizes = [(64, 64), (128, 64), (64, 160)]
    file.write_text("\n".join(json.dumps({"prompt": "a", "width": w, "height": h, "steps": 1}) for w, h in sizes))
    *drawn, sheet = sample("out", "--prompts", file, "--grid")
    found = Image.open(sheet)
    assert [(p["width"], p["height"]) for p in json.loads(found.info["hdm"])["pictures"]] == sizes
    pixels = np.asarray(found)
    for path, factor in zip(sorted(drawn), (3, 3, 3), strict=True):
        picture = np.asarray(Image.open(path)).repeat(factor, axis=0).repeat(factor, axis=1)
        y, x = _corner_of(picture, pixels)
        assert (pixels[y + picture.shape[0] : y + picture.shape[0] + 48, x : x + picture.shape[1]] < 128).any()


# --- Refusals -------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_be_drawn_are_refused_in_one_line(
    call_job: RunJob, random_run: Path, tmp_path: Path
) -> None:
    def call(*arguments: object) -> CompletedProcess[str]:
        return call_job("trainer/sample.py", "--run", random_run, "--out", tmp_path / "out", *arguments)

    for flag in ("--zoom", "--x-shift", "--y-shift", "--guidance", "--time-shift", "--selection-rate"):
        name = {"--time-shift": "shift"}.get(flag, flag[2:].replace("-", "_"))
        refused(call(flag, "nan"), name)
        refused(call(flag, "inf"), name)
    refused(call("--zoom", -1), "zoom")
    refused(call("--width", 0), "--width")
    refused(call("--height", -64), "--height")
    refused(call("--width", 10**30), "4096")
    refused(call("--width", 4096, "--height", 4096), "65536")
    refused(call("--width", "wide"), "--width")
    refused(call("--sampler", "ddim"), "euler, heun")
    refused(call("--seed", 2**62 - 1, "--prompt", "a", "b"), "seed")
    refused(call("--sweep", "zoom=1,0"), "zoom")
    refused(call("--sweep", "zoom=1", "--sweep", "zoom=2"), "--sweep")
    refused(call("--sweep", "zoom=1", "--zoom", 2), "--zoom")
    refused(call("--sweep", "seed=" + ",".join(map(str, range(401)))), "400")
    refused(call("--gallery", "--grid"), "--gallery")
    refused(call("--prompt", "a", "--prompts", "b"), "--prompts")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "zoom": NaN}')
    refused(call("--prompts", tmp_path / "p.jsonl"), "p.jsonl, line 2", "zoom")
    refused(call_job("trainer/sample.py", "--run", tmp_path / "empty"), "no checkpoint", "trainer/run.py")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_an_unknown_codec_is_refused(call_job: RunJob, random_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(random_run, tmp_path / "run")
    [path] = run.glob("demo/checkpoints/*/state.json")
    path.write_text(path.read_text().replace('"codec": "dct"', '"codec": "wavelet"'))
    refused(call_job("trainer/sample.py", "--run", run, "--out", tmp_path / "out"), "wavelet", "dct")


def test_the_examples_of_the_run_are_the_default_prompts(sample: Sample) -> None:
    [path] = sample("out", "--steps", 1)
    assert path.name.startswith("000000-red-star-")
    assert Image.open(path).size == (64, 64)
