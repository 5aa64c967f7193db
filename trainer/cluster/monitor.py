"""Beside Ray Train in the driver: progress bar, Prometheus gauges, and SIGTERM. Also the workers' side of it."""

import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import ray
from ray.util.metrics import Gauge

from pipeline.core.progress import StallDetector, progress_bar
from trainer.health.notify import Event, Notice, Notifier
from trainer.health.stacks import has_stalled, request_stacks
from trainer.recipe.training import Training
from trainer.training.metrics import COMPILE, FIRST_STEP, GAUGE_PREFIX, LABELS, METRICS, Line, progress_text
from trainer.training.run_log import skipped_steps

_POLL_SECONDS: Final = 1.0
# Gauges without a line in METRICS: the time without a finished step, and use of the disk with the run folder.
_JOB_GAUGES: Final = ("idle_seconds", "longest_idle_seconds", "disk_used_share")

# Without tqdm's rate and remaining time, which would count steps of earlier starts and the time of starting.
_BAR: Final = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
_PHASE: Final = "startup_seconds/"


class JobMonitor:
    """Context manager around TorchTrainer.fit. Shows the messages of the workers and forwards SIGTERM to them."""

    def __init__(
        self,
        control: Any,
        training: Training,
        phases: Mapping[str, float] | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        """`phases`: seconds of the phases of the start so far. `notifier` gets the events of the run."""
        self.control, self.training, self.notifier = control, training, notifier
        self._has_stalled = False
        self.lines: list[Line] = []
        self.failure = ""
        self.was_stopped = False
        self._seen = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        texts = {name: f"{metric.description} ({metric.unit})" for name, metric in METRICS.items()}
        texts |= {name: name.replace("_", " ") for name in _JOB_GAUGES}
        self._gauges = {
            name: Gauge(GAUGE_PREFIX + name, text, tag_keys=("stage", LABELS[name]) if name in LABELS else ("stage",))
            for name, text in texts.items()
        }
        self._stall = StallDetector(time.monotonic())
        # Shown before the first line, so that an increase of skipped steps by this start is visible.
        skipped = skipped_steps(Path(training.folder))
        self._values: dict[str, float] = {"step": training.start_step, "skipped_steps": skipped}
        self._values |= {_PHASE + name: seconds for name, seconds in (phases or {}).items()}
        self._began = time.monotonic()
        self._phase = "workers"

    def __enter__(self) -> "JobMonitor":
        self._handler = signal.signal(signal.SIGTERM, self._stop)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._handler)
        self._ends.set()
        self._thread.join(timeout=30)

    def _stop(self, number: int, frame: Any) -> None:
        if self.was_stopped:
            signal.default_int_handler(number, frame)
        self.was_stopped = True  # the thread tells the workers, because a signal handler must not wait

    def _watch(self) -> None:
        requested = False
        name = f"train {self.training.stage_name}"
        start, stop = self.training.start_step, self.training.stop_step
        with progress_bar(iter(()), stop, name, "steps", initial=start, bar_format=_BAR) as bar:
            bar.set_postfix_str(f"start: {self._phase}")
            while True:
                ends = self._ends.wait(_POLL_SECONDS)
                if self.was_stopped and not requested:
                    requested = True
                    ray.get(self.control.request_stop.remote())
                    bar.write("run: asked to stop: the workers save a checkpoint first", file=sys.stderr)
                messages, self.failure = ray.get(self.control.messages_from.remote(self._seen))
                self._seen += len(messages)
                for message in messages:
                    self._show(message, bar)
                idle = self._stall.update(bar.n - self.training.start_step, time.monotonic())
                self._note_stall(idle, bar)
                used: dict[str, float] = {}
                with suppress(OSError):  # a network folder may be away for a moment; SIGTERM must still be forwarded
                    disk = shutil.disk_usage(Path(self.training.folder))
                    used["disk_used_share"] = disk.used / (disk.used + disk.free)  # like df, without root's reserve
                # Set at every poll: Ray drops a gauge after 20 seconds, so a gauge that exists shows a running job.
                for metric, value in (self._values | idle | used).items():
                    name, _, label = metric.partition("/")
                    tags = {LABELS[name]: label} if label else {}
                    self._gauges[name].set(value, tags={"stage": self.training.stage_name, **tags})
                if ends:
                    return

    def _note_stall(self, idle: Mapping[str, float], bar: Any) -> None:
        """Once per stall: a message, the event, and a request for the stacks of all workers."""
        before, self._has_stalled = self._has_stalled, has_stalled(**idle)
        if self._has_stalled and not before:
            try:
                stacks = f"the workers write their stacks to {request_stacks(self.training.folder)}"
            except OSError as error:
                stacks = f"the workers cannot write their stacks ({error})"
            text = f"no step was logged for {idle['idle_seconds'] / 60:.0f} min after step {bar.n}: {stacks}"
            bar.write(f"run: {text}", file=sys.stderr)
            self._notify("stalled", text)

    def _notify(self, event: Event, reason: str) -> None:
        if self.notifier:
            self.notifier.send(event, reason)

    def _show(self, message: Line | str | Notice, bar: Any) -> None:
        if isinstance(message, Notice):
            self._notify(message.event, message.reason)
            message = message.reason
        if isinstance(message, str):
            bar.write(f"run: {message}", file=sys.stderr)
            return
        finite = {name: value for name, value in message.items() if value is not None and math.isfinite(value)}
        # A metric that is no longer finite is not set at all: Ray would ignore the value and keep the last one.
        kept = {name: value for name, value in self._values.items() if name not in message}
        if "step" in message:  # without the ranks that a smaller number of workers no longer has
            kept = {name: value for name, value in kept.items() if LABELS.get(name.partition("/")[0]) != "rank"}
        values = (kept | finite).items()
        self._values = {name: value for name, value in values if name.partition("/")[0] in self._gauges}
        if (step := message.get("step")) is not None:
            self.lines.append(message)
            bar.set_postfix_str(progress_text(message), refresh=False)
            bar.update(int(step) - bar.n)
            if self.notifier:
                self.notifier.step = int(step)
        for name, value in message.items():
            if name.startswith(_PHASE):
                self._show_phase(name.removeprefix(_PHASE), value, bar)

    def _show_phase(self, phase: str, seconds: float | None, bar: Any) -> None:
        """Shows the phase of the start that begins or, at the end of the last one, the times of all."""
        if seconds is None:
            if self._phase == "workers":
                self._values[_PHASE + self._phase] = time.monotonic() - self._began
            if self._phase in (COMPILE, FIRST_STEP):  # the workers start again
                self._values = {name: value for name, value in self._values.items() if not name.startswith(_PHASE)}
            self._phase = phase
            bar.set_postfix_str(f"start: {phase}")
        elif phase in (COMPILE, FIRST_STEP):
            phases = {name.removeprefix(_PHASE): n for name, n in self._values.items() if name.startswith(_PHASE)}
            times = ", ".join(f"{name} {n:.1f} s" for name, n in phases.items())
            bar.write(f"run: started in {sum(phases.values()):.0f} s: {times}", file=sys.stderr)
            bar.set_postfix_str("")


class ActorReporter:
    """The `Reporter` of a worker. Never waits for the driver's node."""

    def __init__(self, control: Any) -> None:
        self._control = control
        self._asked = control.stop_requested.remote()
        self._stops = False

    def stop_requested(self) -> bool:
        """The answer to the question asked one step before."""
        if not self._stops and ray.wait([self._asked], timeout=0)[0]:
            self._stops = ray.get(self._asked)
            self._asked = self._control.stop_requested.remote()
        return self._stops

    def report(self, line: Line) -> None:
        self._control.add_message.remote(line)

    def warn(self, text: str) -> None:
        self._control.add_message.remote(text)

    def notify(self, notice: Notice) -> None:
        self._control.add_message.remote(notice)
