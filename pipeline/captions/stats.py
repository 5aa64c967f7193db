"""Counts of caption actors, and what follows from them: the progress line, run.json and metrics."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

from captioner.captioning import ENGINE_FAILURES, Outcome
from pipeline.core.errors import JobFailed
from pipeline.core.progress import Progress

_MAX_FAILED_SHARE = 0.2  # of the rows: more engine failures than this fail the job,
_MIN_FAILED = 10  # unless they are fewer than this
_RUNNING_SECONDS: Final = 600.0  # an actor whose last report is older is taken for ended; answers may take minutes

_SAME_SECONDS: Final = 1.0  # between reports of rows that were written together


@dataclass(kw_only=True)
class RowCounts:
    """What rows have cost, and which have a caption from their tags."""

    rows: int = 0
    attempts: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # rows with a caption from tags, by reason

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], previous_attempts: Sequence[int]) -> "RowCounts":
        """The counts of these outcomes. `previous_attempts` are those of earlier jobs, by row."""
        reasons = (outcome.answer.reason for outcome in outcomes)
        return cls(
            rows=len(outcomes),
            attempts=sum(max(0, o.attempts - before) for o, before in zip(outcomes, previous_attempts, strict=True)),
            tokens_in=sum(outcome.tokens_in for outcome in outcomes),
            tokens_out=sum(outcome.tokens_out for outcome in outcomes),
            rejected=Counter(str(reason) for reason in reasons if reason),
        )

    def add(self, other: "RowCounts") -> None:
        for column in fields(self):
            setattr(self, column.name, getattr(self, column.name) + getattr(other, column.name))


@dataclass(frozen=True, kw_only=True)
class EngineTimes:
    """Seconds of one actor since it started, or of all actors."""

    seconds: float = 0.0  # what is paid for
    waited_for_pictures: float = 0.0  # the engine had a free slot, but no picture was ready
    waited_for_engine: float = 0.0  # a picture was ready, but the engine was full or starting
    starting: float = 0.0
    engines_started: int = 0  # a number, not a time


def report(worker: str, counts: RowCounts, times: EngineTimes) -> str:
    """JSON for CaptionMeter.add: what a table of rows has cost, and all times of the actor so far."""
    return json.dumps({"worker": worker, "rows": vars(counts), "times": vars(times)})


class CaptionMeter:
    """Turns the actors' reports into rates, time left and dollars, which are those of the engines' hours. `rows` are
    those without a caption, `kept` those that earlier jobs have captioned in the same shards."""

    def __init__(self, rows: int, kept: int, dollars_per_hour: float | None) -> None:
        self._rows, self._kept, self._dollars_per_hour = rows, kept, dollars_per_hour
        self._started = time.monotonic()
        # Time and number of the first answers. Before that, the engines load.
        self._first: tuple[float, int] | None = None
        self._last = self._started  # time of the last finished rows, as ending the engines takes seconds too
        self._now = RowCounts()
        self._times: dict[str, tuple[float, EngineTimes]] = {}  # by actor: time and content of its last report

    def add(self, report: str) -> None:
        """Takes the report of a table whose rows are finished."""
        found, now = json.loads(report), time.monotonic()
        counts = RowCounts(**found["rows"] | {"rejected": Counter(found["rows"]["rejected"])})
        self._now.add(counts)
        times = EngineTimes(**found["times"])
        _, before = self._times.get(found["worker"], (0.0, EngineTimes()))
        self._times[found["worker"]] = now, max(before, times, key=lambda times: times.seconds)
        self._last = now
        since = self._first[0] if self._first else now
        if now - since < _SAME_SECONDS:
            self._first = since, self._now.rows

    def commit(self, outcomes: Mapping[str, int]) -> None:
        """Takes the rows by reason that a whole shard showed to be unusable."""
        self._now.rejected += Counter(outcomes)

    def progress(self, rows: int) -> Progress:
        """`rows` are finished in this job."""
        now, times = self._now, self._total
        counts: dict[str, dict[str, float]] = {
            "hdm_caption_rows": {"captioned": now.rows - now.rejected.total(), **now.rejected},
            "hdm_caption_tokens": {"in": now.tokens_in, "out": now.tokens_out},
            "hdm_caption_waiting_seconds": {"pictures": times.waited_for_pictures, "engine": times.waited_for_engine},
        }
        gauges = {"hdm_caption_engines": float(self._engines)}
        if not self._is_starting():
            gauges["hdm_caption_hours_left"] = self._seconds_left() / 3600
        if (dollars := self._dollars(times.seconds)) is not None:
            gauges["hdm_caption_dollars"] = dollars
        return Progress(rows, self._line(), counts, gauges)

    def record(self) -> dict[str, Any]:
        """For run.json."""
        now, times = self._now, self._total
        return {
            "engines": len(self._times),
            "seconds": round(self._seconds, 1),
            "rows_answered": now.rows,
            "rows_kept": self._kept,
            "images_per_second": round(self._rate(), 3),
            "attempts": now.attempts,
            "tokens_in": now.tokens_in,
            "tokens_out": now.tokens_out,
            "rejected": dict(sorted(now.rejected.items())),
            "seconds_waiting_for_pictures": round(times.waited_for_pictures, 1),
            "seconds_waiting_for_engine": round(times.waited_for_engine, 1),
            "engines_started": times.engines_started,
            "dollars": self._dollars(times.seconds),
        }

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def _total(self) -> EngineTimes:
        """The sum over all actors, also those that have ended."""
        reports = [times for _, times in self._times.values()]
        return EngineTimes(**{f.name: sum(getattr(times, f.name) for times in reports) for f in fields(EngineTimes)})

    @property
    def _engines(self) -> int:
        """Actors that are running."""
        now = time.monotonic()
        return sum(now - reported < _RUNNING_SECONDS for reported, _ in self._times.values())

    def _rate(self) -> float:
        """Rows per second of all engines, measured from the first answers on if others followed."""
        since, before = self._first or (self._started, 0)
        if self._now.rows == before:
            since, before = self._started, 0
        return (self._now.rows - before) / max(self._last - since, 1e-3)

    def _is_starting(self) -> bool:
        """True until answers follow the first ones, whose time includes loading."""
        now = self._now
        return not now.rows or bool(self._first and now.rows == self._first[1] and now.rows < self._rows)

    def _seconds_left(self) -> float:
        return max(0, self._rows - self._now.rows) / self._rate()  # rows that were lost are counted twice

    def _dollars(self, seconds: float) -> float | None:
        if self._dollars_per_hour is None:
            return None
        return round(self._dollars_per_hour * seconds / 3600, 2)

    def _line(self) -> str:
        now, times = self._now, self._total
        if self._is_starting():
            return "first answers" if now.rows else "engine starts"
        rate, seconds, left = self._rate(), max(self._seconds, 1e-3), self._seconds_left()
        parts = [
            f"{rate:.2f} images/s",
            f"{now.tokens_in / seconds:.0f} tokens/s in, {now.tokens_out / seconds:.0f} out",
            f"{clock(left)} left",
        ]
        if self._dollars_per_hour is not None:
            all = self._dollars(times.seconds + left * self._engines)
            parts.append(f"${self._dollars(times.seconds)} of ${all}")
        parts.append(
            f"waited {times.waited_for_pictures:.0f} s for pictures, {times.waited_for_engine:.0f} s for engine"
        )
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
