"""Ends a worker whose group has stopped taking steps although none of it waits for anything.

Its process group lets a collective operation take as long as one worker may wait for samples, which is hours. A worker
that is stuck, as by a hung kernel or network, would hold the others as long. So each worker says whether it waits.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_POLL_SECONDS: Final = 30.0
_LIMIT_SECONDS: Final = 1800.0  # without a step, or longer where steps are long
_TIMES_LONGEST: Final = 10.0


class Activity:
    """What a worker is doing: set by the thread that trains, read by a HangWatch."""

    def __init__(self) -> None:
        self.steps = 0  # finished by this process
        self.waits = True  # may take any time: the start and the first step, samples, checkpoints, evaluations
        self.longest_step = 0.0  # seconds, without waits
        self._since = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        before, self.waits = self.waits, True
        try:
            yield
        finally:
            self.waits, self._since = before, time.monotonic()

    def finish_step(self) -> None:
        now = time.monotonic()
        if self.steps:  # the first one compiles
            self.longest_step = max(self.longest_step, now - self._since)
        self.steps, self.waits, self._since = self.steps + 1, False, now

    @property
    def limit(self) -> float:
        """Seconds without a step of any worker after which they hang."""
        return max(_LIMIT_SECONDS, _TIMES_LONGEST * self.longest_step)


class HangWatch:
    """A context manager with a thread that reports the activity of this worker."""

    def __init__(self, activity: Activity, report: Callable[[int, bool], float], end: Callable[[str], None]) -> None:
        """`report(steps, waits)` returns the seconds for which no worker has finished a step or waited. `end` gets the
        reason and ends the process."""
        self._activity, self._report, self._end = activity, report, end
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="hangs")

    def __enter__(self) -> "HangWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            quiet = self._report(self._activity.steps, self._activity.waits)
            if quiet > self._activity.limit and not self._closed.is_set():
                self._end(
                    f"no worker has finished a step for {quiet / 60:.0f} min, and none waits for samples or storage: "
                    "they hang in a collective operation or on a GPU, and are started again"
                )
                return
