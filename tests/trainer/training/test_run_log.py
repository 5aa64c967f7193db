"""Logs of a run, read back with the formats' own readers, with full disks and interrupted runs."""

import json
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.core.errors import UsageError
from trainer.training.metrics import EarlierCost
from trainer.training.run_log import (
    Log,
    append_line,
    check_writers,
    earlier_cost,
    remove_lines_after,
    skipped_steps,
)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def noise_png(side: int, seed: int = 0) -> bytes:
    """A PNG of about 3 bytes per pixel."""
    buffer = BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def wandb_rows(path: Path) -> list[dict[str, Any]]:
    """The logged rows of a .wandb file: protobuf messages in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, message, rows = path.read_bytes(), 7, b"", []  # after wandb's own header
    while at + 7 <= len(data):
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0:  # padding at the end of a block
            at += 32768 - at % 32768
            continue
        if at + 7 + length > len(data):  # not written to its end yet
            break
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        at += -at % 32768 if 32768 - at % 32768 < 7 else 0
        if kind in (1, 4):  # whole, or its last part
            record, message = Record.FromString(message), b""
            items = record.history.item
            if items:
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return rows


@contextmanager
def full_beyond(size: int) -> Iterator[None]:
    """Limits files of this process to `size` bytes: a write over the limit is truncated, the next one fails."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


# --- Lines ------------------------------------------------------------------------------------------------------------


def test_lines_are_written_at_once_and_non_finite_values_are_null(tmp_path: Path) -> None:
    log = Log(tmp_path / "run", 0, False, {})
    log.metrics({"step": 1, "loss": 0.5, "dollars": None})
    log.metrics({"step": 2, "loss": float("nan"), "grad_norm": float("inf")})
    log.evaluation({"step": 2, "loss": 0.25})
    assert lines(tmp_path / "run" / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "dollars": None},
        {"step": 2, "loss": None, "grad_norm": None},
    ]
    assert lines(tmp_path / "run" / "evaluation.jsonl") == [{"step": 2, "loss": 0.25}]
    assert log.failures == 0


def test_a_resumed_run_removes_repeated_lines_but_keeps_their_cost(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        append_line(tmp_path / "metrics.jsonl", {"step": step, "seconds": 2.0 * step, "dollars": step / 10})
        append_line(tmp_path / "evaluation.jsonl", {"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    log = Log(tmp_path, 20, False, {})
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [10, 20]
    assert [line["step"] for line in lines(tmp_path / "evaluation.jsonl")] == [10, 20]
    assert log.before == EarlierCost(seconds=60.0, dollars=3.0)


def test_starts_that_end_before_their_first_line_keep_the_cost(tmp_path: Path) -> None:
    append_line(tmp_path / "metrics.jsonl", {"step": 30, "seconds": 60.0, "dollars": 3.0})
    for _ in range(3):
        assert Log(tmp_path, 20, False, {}).before == EarlierCost(seconds=60.0, dollars=3.0)
    assert lines(tmp_path / "metrics.jsonl") == []


def test_skipped_steps_of_earlier_starts_are_read_from_the_last_line(tmp_path: Path) -> None:
    assert skipped_steps(tmp_path) == 0
    for step, skipped in ((10, 0), (20, 3), (30, None)):
        append_line(tmp_path / "metrics.jsonl", {"step": step, "skipped_steps": skipped})
        assert skipped_steps(tmp_path) == (skipped or 0)


def test_a_new_run_has_no_earlier_cost(tmp_path: Path) -> None:
    remove_lines_after(0, tmp_path / "metrics.jsonl")
    assert earlier_cost(tmp_path / "metrics.jsonl") == EarlierCost()
    assert not list(tmp_path.iterdir())


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_reads_metrics_and_grid(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, False, {})
    log.metrics({"step": 1, "loss": 0.5, "dollars": None})
    log.metrics({"step": 2, "loss": 0.25, "dollars": 1.5})
    grid = noise_png(20)
    log.evaluation({"step": 2, "loss": 0.125, "loss_at_0.0625": 1.0}, grid)
    found = events(tmp_path / "tensorboard")
    assert sorted(found.Tags()["scalars"]) == [
        "train/dollars", "train/loss", "validation/loss", "validation/loss_at_0.0625",
    ]  # fmt: skip
    assert scalars(tmp_path / "tensorboard", "train/loss") == [(1, 0.5), (2, 0.25)]
    assert scalars(tmp_path / "tensorboard", "train/dollars") == [(2, 1.5)]
    [image] = found.Images("validation/grid")
    assert (image.step, image.width, image.height, image.encoded_image_string) == (2, 20, 20, grid)
    assert (tmp_path / "grids" / "step-00000002.png").read_bytes() == grid


# --- Restarts ---------------------------------------------------------------------------------------------------------

# Starts of a run: the step of the checkpoint that each one begins from, and the last step that it logs. The second is
# killed before it has repeated what was logged before it, and the third resumes from the same checkpoint.
STARTS = ((0, 6), (4, 5), (4, 8), (8, 9))
JOINED = [(1, 0.0), (2, 0.0), (3, 0.0), (4, 0.0), (5, 2.0), (6, 2.0), (7, 2.0), (8, 2.0), (9, 3.0)]  # step, its start


def log_start(log: Log, number: int, last: int) -> None:
    """Logs the steps of a start after the checkpoint, and an evaluation at every second step."""
    for step in range(STARTS[number][0] + 1, last + 1):
        log.metrics({"step": step, "loss": float(number)})
        if step % 2 == 0:
            log.evaluation({"step": step, "loss": float(number)}, noise_png(20, seed=number))


def test_after_each_resume_the_newest_values_of_repeated_steps_remain(tmp_path: Path) -> None:
    for number, (step, last) in enumerate(STARTS):
        log = Log(tmp_path, step, False, {})
        log_start(log, number, last)
        assert log.failures == 0
        curve = scalars(tmp_path / "tensorboard", "train/loss")
        steps = [step for step, _ in curve]
        assert steps == list(range(1, last + 1)), "no step twice, none of a lost attempt"
        assert [(line["step"], line["loss"]) for line in lines(tmp_path / "metrics.jsonl")] == curve
    assert curve == JOINED
    evaluated = [(step, number) for step, number in JOINED if step % 2 == 0]
    assert scalars(tmp_path / "tensorboard", "validation/loss") == evaluated
    assert [(line["step"], line["loss"]) for line in lines(tmp_path / "evaluation.jsonl")] == evaluated
    grids = [
        (image.step, image.encoded_image_string) for image in events(tmp_path / "tensorboard").Images("validation/grid")
    ]
    assert grids == [(step, noise_png(20, seed=int(number))) for step, number in evaluated]


def test_after_a_rollback_the_values_of_the_other_samples_remain(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, False, {})
    log_start(log, 0, 6)
    log.rewind(2)
    log.metrics({"step": 3, "loss": 30.0})
    assert scalars(tmp_path / "tensorboard", "train/loss") == [(1, 0.0), (2, 0.0), (3, 30.0)]
    assert scalars(tmp_path / "tensorboard", "validation/loss") == [(2, 0.0)]


def test_wandb_gets_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a recorder in place of wandb, which cannot replace what it was sent. Also after a rollback."""
    sent: list[dict[str, Any]] = []
    ids: list[str] = []

    def init(*, id: str, **_: Any) -> Any:
        ids.append(id)
        return SimpleNamespace(define_metric=lambda *_, **__: None, log=sent.append, finish=lambda: None)

    fake = SimpleNamespace(init=init, Settings=dict, Image=lambda image: image)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for number, (step, last) in enumerate(STARTS):
        log = Log(tmp_path, step, True, {})
        log_start(log, number, last)
        log.rewind(step)
        log_start(log, number, last)
        assert log.failures == 0
    assert len(set(ids)) == 1, "one run of wandb"
    for name, wanted in (
        ("train/loss", range(1, 10)),
        ("validation/loss", (2, 4, 6, 8)),
        ("validation/grid", (2, 4, 6, 8)),
    ):
        assert [row["step"] for row in sent if name in row] == list(wanted)


# --- Failing writes ---------------------------------------------------------------------------------------------------


def test_a_full_disk_is_counted_reported_once_and_leaves_no_partial_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(tmp_path, 0, False, {})
    log.metrics({"step": 1, "loss": 1.0})
    for name in ("metrics.jsonl", "evaluation.jsonl"):
        append_line(tmp_path / name, {"step": 1, "why": "x" * 200_000})
    grid = noise_png(300)
    with full_beyond(200_020):
        log.metrics({"step": 2, "loss": 2.0})  # only TensorBoard's file is below the limit
        log.evaluation({"step": 2, "loss": 2.0}, grid)
        assert log.failures == 4  # two lines, the grid's file and its event
    log.metrics({"step": 3, "loss": 3.0})
    log.evaluation({"step": 3, "loss": 3.0}, grid)
    assert log.failures == 4
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert f"{tmp_path} could not be written" in said
    assert "training goes on" in said
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 1, 3]
    assert [line["step"] for line in lines(tmp_path / "evaluation.jsonl")] == [1, 3]
    assert [path.name for path in (tmp_path / "grids").iterdir()] == ["step-00000003.png"]
    assert scalars(tmp_path / "tensorboard", "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert [image.step for image in events(tmp_path / "tensorboard").Images("validation/grid")] == [3]


def test_logging_starts_when_a_disk_full_from_the_start_has_space_again(tmp_path: Path) -> None:
    log = Log(tmp_path, 0, False, {})
    with full_beyond(10):
        log.metrics({"step": 1, "loss": 1.0})
    assert log.failures == 2
    log.metrics({"step": 2, "loss": 2.0})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 2, "loss": 2.0}]
    assert scalars(tmp_path / "tensorboard", "train/loss") == [(2, 2.0)]


def test_an_unwritable_folder_costs_only_the_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("a file")
    log = Log(tmp_path / "run", 0, False, {})
    log.metrics({"step": 1, "loss": 1.0})
    assert log.failures > 0
    (tmp_path / "run").unlink()
    log = Log(tmp_path / "run", 0, False, {})
    log.metrics({"step": 2, "loss": 2.0})
    assert log.failures == 0
    assert scalars(tmp_path / "run" / "tensorboard", "train/loss") == [(2, 2.0)]
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- Checks before training -------------------------------------------------------------------------------------------


def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_writers(with_wandb=False)
    with pytest.raises(UsageError, match=r'wandb.*pip install .* -e "\.\[wandb\]"'):
        check_writers(with_wandb=True)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UsageError, match=r'TensorBoard.*pip install .* -e "\.\[trainer\]"'):
        check_writers(with_wandb=False)


@pytest.fixture
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """wandb without a key or user settings."""
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


@pytest.mark.usefixtures("no_login")
def test_wandb_without_a_login_is_refused_unless_it_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()
    with pytest.raises(UsageError, match="wandb login"):
        check_writers(with_wandb=True)
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_writers(with_wandb=True)


@pytest.mark.usefixtures("no_login")
def test_wandb_offline_stores_the_run_in_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    for number, (step, last) in enumerate(STARTS):
        log = Log(tmp_path / "run", step, True, {"stage": {"resolution": 64}})
        log_start(log, number, last)
        log.close()
        assert log.failures == 0
    kept = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.name for path in kept} == {f"run-{(tmp_path / 'run' / 'wandb-run').read_text()}.wandb"}
    rows: list[dict[str, Any]] = []
    until = time.monotonic() + 60
    while not any(row["step"] == 9 for row in rows):  # wandb's process may write the last rows after `close`
        assert time.monotonic() < until, rows
        rows = [row for path in kept for row in wandb_rows(path)]
    assert sorted(row["step"] for row in rows if "train/loss" in row) == list(range(1, 10))
    assert sorted(row["step"] for row in rows if "validation/loss" in row) == [2, 4, 6, 8]
