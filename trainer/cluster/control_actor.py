"""The actor through which driver, controller and workers communicate. Imports no torch: its process imports this file.

It also counts failures and times of waiting, because it survives restarts of the workers.
"""

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.health.notify import Notice
    from trainer.training.metrics import Line

_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 60.0  # seconds between a failure and the next start; each pause doubles
_FIRST_REPORT, _LONGEST_REPORT = 30.0, 900.0  # seconds of waiting until it is reported; each report doubles


class ControlActor:
    """Runs beside the driver."""

    def __init__(self, most_failures: int = 3, workers: int = 0, last_step: float = math.inf) -> None:
        """`most_failures`: in a row without progress, after which the job ends. `workers`: their fixed number, or 0.
        `last_step`: after which the workers end."""
        self.messages: list[Line | str | Notice] = []  # metrics, warnings or events
        self.stops = False
        self.failure = ""
        self.steps = 0
        self._most_failures, self._workers, self._last_step = most_failures, workers, last_step
        self._logged_step = 0.0  # of the newest line of metrics
        self._failures = 0  # in a row without progress
        self._progress: object = self  # at the last failure; equal to no progress
        self._smaller_batches, self._smaller_batches_seen = 0, 0
        self._waiting_since: float | None = None
        self._report_at = 0.0
        self._activities: dict[int, tuple[int, bool]] = {}  # steps finished and whether it waits, by rank
        self._quiet_since = 0.0

    def add_message(self, message: "Line | str | Notice") -> None:
        self.messages.append(message)
        if isinstance(message, dict):
            self._logged_step = message.get("step") or self._logged_step

    def messages_from(self, number: int) -> tuple[list["Line | str | Notice"], str]:
        """The messages after the first `number`, and the reason why the job failed, if it did."""
        return self.messages[number:], self.failure

    def request_stop(self) -> None:
        self.stops = True

    def stop_requested(self) -> bool:
        return self.stops

    def may_resize(self) -> bool:
        """False if the workers are about to end: they were asked to stop, or have taken the last step."""
        return not self.stops and self._logged_step < self._last_step

    def fail(self, why: str) -> None:
        """Marks the job as failed, so that it is not started again."""
        self.failure = self.failure or why

    def finish(self, steps: int) -> None:
        self.steps = steps

    def steps_taken(self) -> int:
        return self.steps

    # --- Starts and failures ------------------------------------------------------------------------------------------

    def begin(self, workers: int) -> None:
        """Called by rank 0 when the workers are ready to train."""
        self._waiting_since = None
        if workers != self._workers:
            self.add_message(f"training on {workers} worker{'s' if workers > 1 else ''}, with the same global batches")
        self._workers = workers
        self._activities = {}

    def note_activity(self, rank: int, steps: int, waits: bool) -> float:
        """Seconds for which no worker has finished a step or has waited for something that may take any time.

        Called by every worker again and again; 0 until all of them have.
        """
        now, before = time.monotonic(), self._activities.get(rank)
        self._activities[rank] = (steps, waits)
        is_complete = len(self._activities) >= self._workers
        if before != (steps, waits) or not is_complete or any(each for _, each in self._activities.values()):
            self._quiet_since = now
        return now - self._quiet_since

    def note_smaller_batch(self) -> None:
        """A worker has run out of memory and recorded a smaller micro batch. The failure that follows is not counted:
        the micro batch cannot be halved for ever."""
        self._smaller_batches += 1

    def note_failure(self, progress: object, why: str) -> float | None:
        """Seconds to wait before the next start; None if the job has failed for good.

        `progress` identifies the newest checkpoint. A failure after a new one is the first in a row again.
        """
        if self._ends(why):
            return None
        if self._smaller_batches > self._smaller_batches_seen:
            self._smaller_batches_seen = self._smaller_batches
            return 0.0
        self._failures = self._failures + 1 if progress == self._progress else 1
        self._progress = progress
        if self._failures >= self._most_failures:
            count = f"{self._failures} failures in a row without a new checkpoint" if self._failures > 1 else "failure"
            self.fail(f"training stopped: {count} ({why}); run the same command to go on")
            return None
        pause: float = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (self._failures - 1))
        self.add_message(
            f"failure {self._failures} without a new checkpoint, of at most {self._most_failures} ({why}): resuming "
            f"from the newest checkpoint in {pause:.0f} s"
        )
        return pause

    def note_waiting(self, why: str, longest: float) -> bool:
        """False if the job has failed for good, as after waiting for more than `longest` seconds.

        Called again and again while nothing else can be done.
        """
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since, self._report_at = now, now + _FIRST_REPORT
        waited = now - self._waiting_since
        if self._ends(why):
            return False
        if waited > longest:
            self.fail(f"training stopped: {why}, given up after {longest / 3600:g} h; run the same command to go on")
            return False
        if now >= self._report_at:
            self._report_at = now + min(_LONGEST_REPORT, max(_FIRST_REPORT, waited))
            self.add_message(f"{why}: waiting for {waited:.0f} s, up to {longest / 3600:g} h")
        return True

    def _ends(self, why: str) -> bool:
        """True if the job has failed, or was asked to stop while there is no worker that could save a checkpoint."""
        if self.stops:
            self.fail(f"asked to stop while there was no worker to save a checkpoint ({why}); run the same command to "
                      "go on from the newest one")  # fmt: skip
        return bool(self.failure)
