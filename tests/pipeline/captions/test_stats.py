"""The progress line and the record: rates, hours and dollars from the workers' counts."""

from collections import Counter
from typing import Any

import pytest

from pipeline.captions.stats import CaptionMeter, CaptionStats, check_engine, clock
from pipeline.core.errors import JobFailed


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, in a list so that a test can set it."""
    time = [0.0]
    monkeypatch.setattr("pipeline.captions.stats.time.monotonic", lambda: time[0])
    return time


def test_the_line_has_rate_tokens_time_left_dollars_waiting_and_rejected_rows(now: list[float]) -> None:
    meter = CaptionMeter(rows=1000, engines=2, dollars_per_hour=1.8)
    assert meter([CaptionStats()]).line == "engine starts"
    now[0] = 100.0
    assert meter([CaptionStats(rows=60, kept=40), CaptionStats()]).line == "first answers"
    now[0] = 200.0
    first = CaptionStats(
        rows=200, kept=40, tokens_in=30_000, tokens_out=6_000, rejected=Counter({"refusal": 3}), waited_for_engine=90.0
    )
    second = CaptionStats(rows=60, tokens_in=10_000, tokens_out=2_000, waited_for_pictures=7.0)
    standing = meter([first, second])
    assert standing.rows == 260
    # 200 more rows in 100 s; 740 left; 2 engines for 200 s and for 570 s.
    assert standing.line == (
        "2.00 images/s; 200 tokens/s in, 40 out; 0:06:10 left; $0.2 of $0.57; "
        "waited 7 s for pictures, 90 s for engine; 3 rejected (3 refusal)"
    )
    assert standing.counts["hdm_caption_rows"] == {"captioned": 217, "refusal": 3}
    assert standing.counts["hdm_caption_tokens"] == {"in": 40_000, "out": 8_000}
    assert standing.counts["hdm_caption_waiting_seconds"] == {"pictures": 7.0, "engine": 90.0}
    assert standing.gauges == {
        "hdm_caption_engines": 2,
        "hdm_caption_hours_left": pytest.approx(370 / 3600),
        "hdm_caption_dollars": 0.2,
    }
    record = meter.record()
    assert (record["rows_answered"], record["rows_kept"], record["dollars"]) == (220, 40, 0.2)
    assert record["images_per_second"] == 2.0


def test_rows_counted_twice_by_a_restarted_worker_give_no_negative_time_left(now: list[float]) -> None:
    meter = CaptionMeter(rows=1000, engines=1, dollars_per_hour=None)
    now[0] = 10.0
    meter([CaptionStats(rows=10)])
    now[0] = 910.0
    standing = meter([CaptionStats(rows=900), CaptionStats(rows=788, kept=768)])
    assert standing.rows == 1000
    assert "; 0:00:00 left;" in standing.line


def record(failed: int, answered: int) -> dict[str, Any]:
    failures = {"server error": failed - 1, "server busy": 1} if failed else {}
    return {"rows_answered": answered, "rejected": {"refusal": 100, **failures}}


@pytest.mark.parametrize(("failed", "answered"), [(11, 50), (2, 2)])
def test_a_job_fails_if_its_engine_failed_on_more_than_a_fifth_of_the_rows(failed: int, answered: int) -> None:
    with pytest.raises(JobFailed, match=f"failed on {failed} of {answered} rows, mostly: "):
        check_engine(record(failed, answered))


@pytest.mark.parametrize(("failed", "answered"), [(10, 50), (3, 10), (0, 0)])
def test_a_job_succeeds_if_its_engine_failed_on_few_rows(failed: int, answered: int) -> None:
    check_engine(record(failed, answered))


def test_a_clock_shows_days() -> None:
    assert (clock(59.6), clock(3_661), clock(9 * 86_400 + 14_400)) == ("0:01:00", "1:01:01", "9 d 04:00")
