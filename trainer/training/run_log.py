"""The figures of a run, kept: metrics.jsonl and evaluation.jsonl always, TensorBoard by default, Weights & Biases when
asked for. The only file that knows the latter two.

Nothing that fails here ends a training: a write that fails is counted and said once, and the next one is tried anew.
"""

import json
import math
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.core.errors import UsageError
from trainer.training.metrics import Line, Spent

METRICS_FILE, EVALUATION_FILE = "metrics.jsonl", "evaluation.jsonl"
_STARTS_FILE = (
    "starts.jsonl"  # a line for each start but the first: the step it went on from, and what was spent before
)
_INSTALL = 'pip install -c deploy/constraints.txt -e ".[{}]"'


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    tensorboard: bool = True
    wandb: str | None = None  # project; WANDB_MODE=offline keeps everything in the run folder


def check_writers(config: LogConfig) -> None:
    """UsageError, with the mend, where what is asked for is not installed or nobody is logged in: before training."""
    if config.tensorboard:
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise UsageError(f"TensorBoard is not installed: {_INSTALL.format('trainer')}, or leave it off") from error
    if config.wandb is None:
        return
    try:
        import wandb
    except ImportError as error:
        raise UsageError(f"wandb is not installed: {_INSTALL.format('wandb')}, or leave it off") from error
    if wandb.setup().settings.mode in ("offline", "disabled"):
        return
    try:
        logged_in = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        raise UsageError(
            f"wandb refuses the login ({str(error).splitlines()[0]}); run: wandb login --relogin"
        ) from error
    if not logged_in:
        raise UsageError("wandb knows no login here; run: wandb login, or set WANDB_API_KEY or WANDB_MODE=offline")


class Log:
    """Of one stage of a run, in its folder. One process of the run has it.

    start_step: of the checkpoint that the run goes on from; what was logged of later steps is forgotten.
    """

    def __init__(self, folder: Path, start_step: int, config: LogConfig, record: Mapping[str, Any]) -> None:
        self.folder = folder
        self.failures = 0  # writes
        self._said = False
        self.before = Spent()
        self._try(folder.mkdir, parents=True, exist_ok=True)
        self._tensorboard: _TensorBoard | None = None
        self._with_tensorboard = config.tensorboard
        self.go_back(start_step)
        self._wandb: Any = None
        if config.wandb is not None:
            self._try(self._start_wandb, config.wandb, record)

    def go_back(self, step: int) -> None:
        """Training goes on from this step's checkpoint: what was logged of later ones is forgotten."""
        self._try(self._go_on, step)
        if self._with_tensorboard:
            self._tensorboard = _TensorBoard(self.folder / "tensorboard", step)

    def metrics(self, line: Line) -> None:
        """One line of `metrics.log_line`; "step" among it."""
        self._write(METRICS_FILE, "train", line)

    def evaluation(self, line: Line, grid: bytes | None = None) -> None:
        """Figures of one evaluation, "step" among them, and its grid, a PNG, kept as grids/step-<step>.png."""
        self._write(EVALUATION_FILE, "validation", line)
        if grid is not None:
            step = _step(line)
            self._try(_write_whole, self.folder / "grids" / f"step-{step:08d}.png", grid)
            if self._tensorboard is not None:
                self._try(self._tensorboard.image, step, "validation/grid", grid)
            if self._wandb is not None:
                self._try(self._send_image, step, grid)

    def close(self) -> None:
        """Waits for what wandb has not sent yet: save what matters first."""
        if self._wandb is not None:
            self._try(self._wandb.finish)

    def _write(self, file: str, part: str, line: Line) -> None:
        step = _step(line)
        finite = {name: value for name, value in line.items() if value is not None and math.isfinite(value)}
        # What is not finite is null: NaN is no JSON.
        self._try(append_line, self.folder / file, {name: finite.get(name) for name in line})
        scalars = {f"{part}/{name}": value for name, value in finite.items() if name != "step"}
        if self._tensorboard is not None:
            self._try(self._tensorboard.scalars, step, scalars)
        if self._wandb is not None:
            self._try(self._wandb.log, {"step": step, **scalars})

    def _try(self, write: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        try:
            write(*arguments, **named)
        except Exception as error:  # from a full disk to whatever wandb makes of a lost network
            self.failures += 1
            if not self._said:
                self._said = True
                why = (str(error).strip().splitlines() or [""])[0]
                said = f"{type(error).__name__}: {why}"
                with suppress(OSError):  # stderr may be a file on the same full disk
                    print(f"log: {self.folder} could not be written ({said}); training goes on", file=sys.stderr)
                    sys.stderr.flush()

    def _go_on(self, start_step: int) -> None:
        self.before = spent(self.folder / METRICS_FILE, self.folder / _STARTS_FILE)
        if self.before != Spent():
            # Before its lines are forgotten: a start that is killed before its own first one has cost something too.
            append_line(self.folder / _STARTS_FILE, {"step": start_step, **asdict(self.before)})
        for file in (METRICS_FILE, EVALUATION_FILE):
            forget_steps_after(start_step, self.folder / file)

    def _start_wandb(self, project: str, record: Mapping[str, Any]) -> None:
        import wandb

        identity = self.folder / "wandb-run"  # a run that goes on is the same one there
        if not identity.exists():
            _write_whole(identity, uuid.uuid4().hex.encode())
        self._wandb = wandb.init(
            project=project,
            id=identity.read_text(),
            resume="allow",
            dir=str(self.folder),
            name="/".join(self.folder.resolve().parts[-2:]),
            config=dict(record),
            settings=wandb.Settings(console="off", silent=True),
        )
        # Steps as an ordinary figure: wandb's own may only grow, and a run that goes on repeats some.
        self._wandb.define_metric("*", step_metric="step")

    def _send_image(self, step: int, png: bytes) -> None:
        import wandb

        self._wandb.log({"step": step, "validation/grid": wandb.Image(Image.open(BytesIO(png)))})


def _step(line: Mapping[str, float | None]) -> int:
    step = line["step"]
    assert step is not None, line
    return int(step)


# --- Lines ------------------------------------------------------------------------------------------------------------


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    _append(path, json.dumps(line).encode() + b"\n")


def forget_steps_after(step: int, path: Path) -> None:
    """Of a run that was stopped: the lines since its last checkpoint, which come again, and a half-written one."""
    if path.exists():
        kept = [line for line in _lines(path) if line["step"] <= step]
        _write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def spent(*paths: Path) -> Spent:
    """What the lines of earlier starts say, steps that were lost since the last checkpoint included."""
    lines = [line for path in paths if path.exists() for line in _lines(path)]
    return Spent(
        seconds=max((line.get("seconds") or 0 for line in lines), default=0),
        dollars=max((line.get("dollars") or 0 for line in lines), default=0),
    )


def skipped_steps(folder: Path) -> int:
    """Counted in the newest line of a stage's folder, 0 where there is none."""
    path = folder / METRICS_FILE
    lines = _lines(path) if path.exists() else []
    return int(lines[-1].get("skipped_steps") or 0) if lines else 0


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
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
    """Handed to the system at once; where that fails the file is as it was before."""
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
    """One event file for each start of a run, in TensorBoard's format.

    Written here and not by torch's SummaryWriter: its thread dies with the first write that fails, and every later call
    raises; and it cannot take back half an event, at which readers stop.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        self._folder = folder
        self._start_step = start_step
        self._file: Path | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))

    def image(self, step: int, tag: str, png: bytes) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = Image.open(BytesIO(png)).size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add(step, Summary(value=[Summary.Value(tag=tag, image=image)]))

    def _add(self, step: int, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Readers take the files of a folder in the order of their names.
            number = 1 + len(list(self._folder.glob("events.out.tfevents.*")))
            self._file = self._folder / f"events.out.tfevents.{number:06d}"
        new = not (self._file.exists() and self._file.stat().st_size)  # empty after a first write that failed
        _append(self._file, (self._beginning() if new else b"") + _record(Event(step=step, summary=summary)))

    def _beginning(self) -> bytes:
        """The format's version, and that the steps from here on replace those of earlier files."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        return _record(Event(file_version="brain.Event:2")) + _record(
            Event(step=self._start_step + 1, session_log=start)
        )


def _record(event: Any) -> bytes:
    """An event as its file has it: length, content and their checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    event.wall_time = time.time()
    buffer = BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
