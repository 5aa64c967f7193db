"""What captioning costs, while it runs: counts of the actors -> the progress line, run.json, metrics."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core.progress import Standing


@dataclass
class Costs:
    """What one actor, or all of them, have done in this job."""

    rows: int = 0  # finished, in whatever job
    kept: int = 0  # of these, finished by an earlier job
    attempts: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # rows that have the tags' caption, by reason
    waited_for_pictures: float = 0.0  # seconds: the engine had room, and no picture was ready
    waited_for_engine: float = 0.0  # seconds: pictures were ready, and the engine was full, or starting
    engines_started: int = 0

    @property
    def answered(self) -> int:
        """Rows that were finished in this job."""
        return self.rows - self.kept


def total(parts: Sequence[Costs]) -> Costs:
    """All actors' counts together; their seconds too."""
    names = [name for name in vars(Costs()) if name != "rejected"]
    summed = Costs(**{name: sum(getattr(part, name) for part in parts) for name in names})
    summed.rejected = sum((part.rejected for part in parts), Counter[str]())
    return summed


class Meter:
    """Turns the actors' counts into what a reader wants to know. Dollars are those of the engines' hours."""

    def __init__(self, rows: int, engines: int, dollars_per_hour: float | None) -> None:
        self._rows, self._engines, self._dollars_per_hour = rows, engines, dollars_per_hour
        self._started = time.monotonic()
        # When the first answers were counted, and how many: before that the engines load.
        self._first: tuple[float, int] | None = None
        self._last = self._started  # when rows were finished: the engines' end takes seconds that are no captioning
        self._now = Costs()

    def __call__(self, parts: Sequence[Costs]) -> Standing:
        before, self._now = self._now.answered, total(parts)
        if self._now.answered > before:
            self._last = time.monotonic()
        if self._first is None and self._now.answered:
            self._first = time.monotonic(), self._now.answered
        counts: dict[str, dict[str, float]] = {
            "hdm_caption_rows": {"captioned": self._now.answered - self._now.rejected.total(), **self._now.rejected},
            "hdm_caption_tokens": {"in": self._now.tokens_in, "out": self._now.tokens_out},
            "hdm_caption_waiting_seconds": {
                "pictures": self._now.waited_for_pictures,
                "engine": self._now.waited_for_engine,
            },
        }
        gauges = {"hdm_caption_engines": float(self._engines)}
        if not self._is_starting():
            gauges["hdm_caption_hours_left"] = self._seconds_left() / 3600
        if (dollars := self._dollars(self._seconds)) is not None:
            gauges["hdm_caption_dollars"] = dollars
        # An actor that Ray started again finds rows that its former life has told of.
        return Standing(min(self._now.rows, self._rows), self._line(), counts, gauges)

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
        """Rows per second, of all engines; from the first answers on, where there are some after them."""
        since, before = self._first or (self._started, 0)
        if self._now.answered == before:
            since, before = self._started, 0
        return (self._now.answered - before) / max(self._last - since, 1e-3)

    def _is_starting(self) -> bool:
        """There are no answers after the first ones, whose time says nothing."""
        now = self._now
        return not now.answered or bool(self._first and now.answered == self._first[1] and now.rows < self._rows)

    def _seconds_left(self) -> float:
        return max(0, self._rows - self._now.rows) / self._rate()  # as in __call__, rows may have been told of twice

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


def clock(seconds: float) -> str:
    """ "3 d 04:05" from a day on, "4:05:06" below."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_of_day = divmod(hours, 24)
    return f"{days} d {hours_of_day:02}:{minutes:02}" if days else f"{hours}:{minutes:02}:{rest:02}"
