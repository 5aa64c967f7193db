"""Counts of the caption workers, and what follows from them: the progress line, run.json and metrics."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from captioner.captioning import ENGINE_FAILURES
from pipeline.core.errors import JobFailed
from pipeline.core.progress import Progress

_MAX_FAILED_SHARE = 0.2  # of the rows: more engine failures than this fail the job,
_MIN_FAILED = 10  # unless they are fewer than this


@dataclass
class CaptionStats:
    """What one worker, or all of them, have done in this job."""

    rows: int = 0  # finished, also by earlier jobs
    kept: int = 0  # of these, finished by earlier jobs
    attempts: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # rows with a caption from tags, by reason
    waited_for_pictures: float = 0.0  # seconds: the engine had a free slot, but no picture was ready
    waited_for_engine: float = 0.0  # seconds: a picture was ready, but the engine was full or starting
    engines_started: int = 0
    seconds_starting: float = 0.0  # of engines

    @property
    def answered(self) -> int:
        """Rows finished in this job."""
        return self.rows - self.kept

    @classmethod
    def total(cls, parts: Sequence["CaptionStats"]) -> "CaptionStats":
        """The sum of all workers' counts and seconds."""
        total = cls()
        for part in parts:
            for name, value in vars(part).items():
                setattr(total, name, getattr(total, name) + value)
        return total


class CaptionMeter:
    """Turns the workers' counts into rates, time left and dollars, which are those of the engines' hours."""

    def __init__(self, rows: int, engines: int, dollars_per_hour: float | None) -> None:
        self._rows, self._engines, self._dollars_per_hour = rows, engines, dollars_per_hour
        self._started = time.monotonic()
        # Time and number of the first answers. Before that, the engines load.
        self._first: tuple[float, int] | None = None
        self._last = self._started  # time of the last finished rows, as closing the engines takes seconds too
        self._now = CaptionStats()

    def __call__(self, parts: Sequence[CaptionStats]) -> Progress:
        before, self._now = self._now.answered, CaptionStats.total(parts)
        now = self._now
        if now.answered > before:
            self._last = time.monotonic()
            self._first = self._first or (self._last, now.answered)
        counts: dict[str, dict[str, float]] = {
            "hdm_caption_rows": {"captioned": now.answered - now.rejected.total(), **now.rejected},
            "hdm_caption_tokens": {"in": now.tokens_in, "out": now.tokens_out},
            "hdm_caption_waiting_seconds": {"pictures": now.waited_for_pictures, "engine": now.waited_for_engine},
        }
        gauges = {"hdm_caption_engines": float(self._engines)}
        if not self._is_starting():
            gauges["hdm_caption_hours_left"] = self._seconds_left() / 3600
        if (dollars := self._dollars(self._seconds)) is not None:
            gauges["hdm_caption_dollars"] = dollars
        # A restarted worker counts rows as kept that it had already counted as answered.
        return Progress(min(now.rows, self._rows), self._line(), counts, gauges)

    def record(self) -> dict[str, Any]:
        """For run.json."""
        now, seconds = self._now, self._seconds
        return {
            "engines": self._engines,
            "seconds": round(seconds, 1),
            "rows_answered": now.answered,
            "rows_kept": now.kept,
            "images_per_second": round(self._rate(), 3),
            "attempts": now.attempts,
            "tokens_in": now.tokens_in,
            "tokens_out": now.tokens_out,
            "rejected": dict(sorted(now.rejected.items())),
            "seconds_waiting_for_pictures": round(now.waited_for_pictures, 1),
            "seconds_waiting_for_engine": round(now.waited_for_engine, 1),
            "engines_started": now.engines_started,
            "dollars": self._dollars(seconds),
        }

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def _rate(self) -> float:
        """Rows per second of all engines, measured from the first answers on if others followed."""
        since, before = self._first or (self._started, 0)
        if self._now.answered == before:
            since, before = self._started, 0
        return (self._now.answered - before) / max(self._last - since, 1e-3)

    def _is_starting(self) -> bool:
        """True until answers follow the first ones, whose time includes loading."""
        now = self._now
        return not now.answered or bool(self._first and now.answered == self._first[1] and now.rows < self._rows)

    def _seconds_left(self) -> float:
        return max(0, self._rows - self._now.rows) / self._rate()  # rows may be counted twice, see __call__

    def _dollars(self, seconds: float) -> float | None:
        if self._dollars_per_hour is None:
            return None
        return round(self._engines * self._dollars_per_hour * seconds / 3600, 2)

    def _line(self) -> str:
        now = self._now
        if self._is_starting():
            return "first answers" if now.answered else "engine starts"
        rate, seconds, left = self._rate(), max(self._seconds, 1e-3), self._seconds_left()
        parts = [
            f"{rate:.2f} images/s",
            f"{now.tokens_in / seconds:.0f} tokens/s in, {now.tokens_out / seconds:.0f} out",
            f"{clock(left)} left",
        ]
        if self._dollars_per_hour is not None:
            parts.append(f"${self._dollars(seconds)} of ${self._dollars(seconds + left)}")
        parts.append(f"waited {now.waited_for_pictures:.0f} s for pictures, {now.waited_for_engine:.0f} s for engine")
        if now.rejected:
            reasons = ", ".join(f"{count} {reason}" for reason, count in now.rejected.most_common(3))
            parts.append(f"{now.rejected.total()} rejected ({reasons}{' ...' if len(now.rejected) > 3 else ''})")
        return "; ".join(parts)


def check_engine(this_job: dict[str, Any]) -> None:
    """Raises JobFailed if, by the meter's record, the engine failed on more rows than pictures can explain."""
    answered, rejected = this_job["rows_answered"], this_job["rejected"]
    failures = Counter({reason: rejected[reason] for reason in ENGINE_FAILURES & rejected.keys()})
    if failures.total() >= min(_MIN_FAILED, answered) and failures.total() > _MAX_FAILED_SHARE * answered:
        [(most_frequent, _)] = failures.most_common(1)
        raise JobFailed(
            f"the engine failed on {failures.total()} of {answered} rows, mostly: {most_frequent}; these have captions "
            "from their tags. Fix it and run the same command with --retry-rejected"
        )


def clock(seconds: float) -> str:
    """The time as "4:05:06", or as "3 d 04:05" from one day on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_of_day = divmod(hours, 24)
    return f"{days} d {hours_of_day:02}:{minutes:02}" if days else f"{hours}:{minutes:02}:{rest:02}"
