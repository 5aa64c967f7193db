"""Logs of a run: metrics.jsonl, evaluation.jsonl and TensorBoard always, Weights & Biases on request.

Only this file imports tensorboard and wandb. A failed write never ends a training: it is counted and reported once, and
the next one is tried again.
"""

import json
import math
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.core.errors import UsageError
from trainer.training.metrics import EarlierCost, Line

METRICS_FILE, EVALUATION_FILE = "metrics.jsonl", "evaluation.jsonl"
# One line per resumed start: its first step, the cost before it, and the last step logged before it in each file.
_STARTS_FILE = "starts.jsonl"
_INSTALL = 'pip install -c deploy/constraints.txt -e ".[{}]"'
_WANDB_PROJECT = "homemade-diffusion"


def check_writers(with_wandb: bool) -> None:
    """UsageError if a package is missing or wandb has no login. Called before training starts."""
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise UsageError(f"TensorBoard is not installed: {_INSTALL.format('trainer')}") from error
    if not with_wandb:
        return
    try:
        import wandb
    except ImportError as error:
        raise UsageError(f"wandb is not installed: {_INSTALL.format('wandb')}, or omit --wandb") from error
    if wandb.setup().settings.mode in ("offline", "disabled"):
        return
    try:
        logged_in = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        raise UsageError(f"wandb login failed ({str(error).splitlines()[0]}); run: wandb login --relogin") from error
    if not logged_in:
        raise UsageError("wandb has no login; run: wandb login, or set WANDB_API_KEY or WANDB_MODE=offline")


class Log:
    """The log of one stage of a run, written by one process.

    `start_step`: step of the checkpoint that the run resumes from. Lines of later steps are removed, also from
    TensorBoard's curves. wandb cannot replace what it has, so a repeated step keeps its first values there.
    """

    def __init__(self, folder: Path, start_step: int, with_wandb: bool, record: Mapping[str, Any]) -> None:
        self.folder = folder
        self.failures = 0  # writes that failed
        self.before = EarlierCost()
        self._logged: dict[str, int] = {}  # file -> last step in it, also if the line has been removed since
        self._wandb: Any = None
        self._try(folder.mkdir, parents=True, exist_ok=True)
        self.rewind(start_step)
        if with_wandb:
            self._try(self._start_wandb, record)

    def rewind(self, step: int) -> None:
        """Training continues from this step's checkpoint: removes what was logged of later steps."""
        self._try(self._rewind_files, step)
        self._tensorboard = _TensorBoard(self.folder / "tensorboard", step)

    def metrics(self, line: Line) -> None:
        """Logs a line of `metrics.log_line`."""
        self._write(METRICS_FILE, "train", line)

    def evaluation(self, line: Line, grid: bytes | None = None) -> None:
        """Logs the results of an evaluation. `grid` is a PNG, stored as grids/step-<step>.png."""
        is_new = self._write(EVALUATION_FILE, "validation", line)
        if grid is not None:
            step = _step(line)
            self._try(_write_whole, self.folder / "grids" / f"step-{step:08d}.png", grid)
            self._try(self._tensorboard.image, step, "validation/grid", grid)
            if is_new and self._wandb is not None:
                self._try(self._send_image, step, grid)

    def close(self) -> None:
        """Waits until wandb has sent everything, so save checkpoints first."""
        if self._wandb is not None:
            self._try(self._wandb.finish)

    def _write(self, file: str, part: str, line: Line) -> bool:
        """False if the step was logged before, by an earlier start or before a rollback."""
        step = _step(line)
        is_new = step > self._logged.get(file, 0)
        self._logged[file] = max(step, self._logged.get(file, 0))
        finite = {name: value for name, value in line.items() if value is not None and math.isfinite(value)}
        # JSON has no NaN: values that are not finite become null.
        self._try(append_line, self.folder / file, {name: finite.get(name) for name in line})
        scalars = {f"{part}/{name}": value for name, value in finite.items() if name != "step"}
        self._try(self._tensorboard.scalars, step, scalars)
        if is_new and self._wandb is not None:
            self._try(self._wandb.log, {"step": step, **scalars})
        return is_new

    def _try(self, write: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        try:
            write(*arguments, **named)
        except Exception as error:  # a full disk, or anything wandb raises when the network is down
            self.failures += 1
            if self.failures == 1:
                why = (str(error).strip().splitlines() or [""])[0]
                text = f"log: {self.folder} could not be written ({type(error).__name__}: {why}); training goes on"
                with suppress(OSError):  # stderr may be a file on the same full disk
                    print(text, file=sys.stderr, flush=True)

    def _rewind_files(self, step: int) -> None:
        starts = self.folder / _STARTS_FILE
        self.before = earlier_cost(self.folder / METRICS_FILE, starts)
        for file in (METRICS_FILE, EVALUATION_FILE):
            self._logged[file] = max(self._logged.get(file, 0), _last_step(self.folder / file, starts))
        if self.before != EarlierCost() or any(self._logged.values()):
            # Stored before its lines are removed: a start that is killed before its first line has a cost, too.
            append_line(starts, {"step": step, **asdict(self.before), **self._logged})
        for file in (METRICS_FILE, EVALUATION_FILE):
            remove_lines_after(step, self.folder / file)

    def _start_wandb(self, record: Mapping[str, Any]) -> None:
        import wandb

        identity = self.folder / "wandb-run"  # so that a resumed run continues the same wandb run
        if not identity.exists():
            _write_whole(identity, uuid.uuid4().hex.encode())
        self._wandb = wandb.init(
            project=_WANDB_PROJECT,
            id=identity.read_text(),
            resume="allow",
            dir=str(self.folder),
            name="/".join(self.folder.resolve().parts[-2:]),
            config=dict(record),
            settings=wandb.Settings(console="off", silent=True),
        )
        # The x-axis of all curves. wandb's own step counts calls of `log`, from 0 again in each offline start.
        self._wandb.define_metric("*", step_metric="step")

    def _send_image(self, step: int, png: bytes) -> None:
        import wandb

        self._wandb.log({"step": step, "validation/grid": wandb.Image(Image.open(BytesIO(png)))})


def _step(line: Mapping[str, float | None]) -> int:
    step = line["step"]
    assert step is not None, line
    return int(step)


# --- Files of JSON lines ----------------------------------------------------------------------------------------------


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Appends a JSON line. If that fails the file is unchanged."""
    _append(path, json.dumps(line).encode() + b"\n")


def remove_lines_after(step: int, path: Path) -> None:
    """Removes the lines of later steps, which will be repeated, and a half-written one."""
    if path.exists():
        kept = [line for line in _lines(path) if line["step"] <= step]
        _write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def earlier_cost(*paths: Path) -> EarlierCost:
    """Cost of earlier starts according to their lines, including steps lost since the last checkpoint."""
    lines = [line for path in paths for line in _lines(path)]
    return EarlierCost(
        seconds=max((line.get("seconds") or 0 for line in lines), default=0),
        dollars=max((line.get("dollars") or 0 for line in lines), default=0),
    )


def _last_step(path: Path, starts: Path) -> int:
    """Last step that has ever been in a file, according to its lines and those of the starts; 0 without any."""
    steps = [line["step"] for line in _lines(path)] + [line.get(path.name, 0) for line in _lines(starts)]
    return max(steps, default=0)


def skipped_steps(folder: Path) -> int:
    """Skipped steps according to the last line of a stage's metrics; 0 without any."""
    lines = _lines(folder / METRICS_FILE)
    return int(lines[-1].get("skipped_steps") or 0) if lines else 0


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                found.append(line)
    return found


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            rest = memoryview(data)
            while rest:  # a nearly full disk takes only the beginning
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(before)
            raise


# --- TensorBoard ------------------------------------------------------------------------------------------------------


class _TensorBoard:
    """Writes one event file per start of a run.

    torch's SummaryWriter does not fit: a failed write kills its thread, which prints a traceback and leaves half an
    event in the file, and its file names order starts by the clock of the machine instead of by number.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder = folder
        self._start_step = start_step
        self._file: Path | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, [{"tag": tag, "simple_value": value} for tag, value in values.items()])

    def image(self, step: int, tag: str, png: bytes) -> None:
        width, height = Image.open(BytesIO(png)).size
        image = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": png}
        self._add(step, [{"tag": tag, "image": image}])

    def _add(self, step: int, values: list[dict[str, Any]]) -> None:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Readers take the files of a folder in the order of their names.
            number = 1 + len(list(self._folder.glob("events.out.tfevents.*")))
            self._file = self._folder / f"events.out.tfevents.{number:06d}"
        records = _record(step=step, summary={"value": values})
        if not (self._file.exists() and self._file.stat().st_size):
            # Format version, and the START (1) after which readers drop these and later steps of earlier files.
            start = _record(step=self._start_step + 1, session_log={"status": 1})
            records = _record(file_version="brain.Event:2") + start + records
        _append(self._file, records)


def _record(**fields: Any) -> bytes:
    """An Event in the file format: length, content and their checksums."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = BytesIO()
    RecordWriter(buffer).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return buffer.getvalue()
