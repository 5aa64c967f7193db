"""The progress line and the record: rates, hours and dollars from the actors' reports."""

from collections import Counter
from typing import Any

import pytest

from pipeline.captions.stats import CaptionMeter, EngineTimes, RowCounts, check_engine, clock, report
from pipeline.core.errors import JobFailed


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, in a list so that a test can set it."""
    time = [0.0]
    monkeypatch.setattr("pipeline.captions.stats.time.monotonic", lambda: time[0])
    return time


def table(worker: str, times: EngineTimes, **counts: Any) -> str:
    return report(worker, RowCounts(**counts), times)


def test_the_line_has_rate_tokens_time_left_dollars_waiting_and_rejected_rows(now: list[float]) -> None:
    meter = CaptionMeter(960, kept=40, dollars_per_hour=1.8)
    assert meter.progress(0).line == "engine starts"
    now[0] = 100.0
    for rows in (15, 5):  # of one partial file
        meter.add(table("one", EngineTimes(seconds=95), rows=rows))
    assert meter.progress(20).line == "first answers"
    now[0] = 200.0
    first = EngineTimes(seconds=195, waited_for_engine=90.0)
    second = EngineTimes(seconds=205, waited_for_pictures=7.0)
    meter.add(table("one", first, rows=140, tokens_in=30_000, tokens_out=6_000, rejected=Counter({"refusal": 3})))
    meter.add(table("two", second, rows=60, tokens_in=10_000, tokens_out=2_000))
    meter.add(table("one", EngineTimes(seconds=190, waited_for_engine=80.0)))  # arrives late
    standing = meter.progress(220)
    assert standing.rows == 220
    # 200 more rows in 100 s; 740 left; 2 engines for 200 s each and for 370 s more.
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
    meter.commit({"same caption for many images": 2})
    record = meter.record()
    assert (record["rows_answered"], record["rows_kept"], record["dollars"]) == (220, 40, 0.2)
    assert record["images_per_second"] == 2.0
    assert record["rejected"] == {"refusal": 3, "same caption for many images": 2}


def test_an_actor_that_was_lost_is_paid_for_and_no_longer_counted_as_running(now: list[float]) -> None:
    meter = CaptionMeter(100, kept=0, dollars_per_hour=1.0)
    meter.add(table("lost", EngineTimes(seconds=3600), rows=10))
    now[0] = 1000.0
    meter.add(table("restarted", EngineTimes(seconds=900), rows=10))
    standing = meter.progress(20)
    assert standing.gauges["hdm_caption_engines"] == 1
    assert standing.gauges["hdm_caption_dollars"] == 1.25


def test_rows_answered_twice_give_no_negative_time_left(now: list[float]) -> None:
    meter = CaptionMeter(1000, kept=0, dollars_per_hour=None)
    now[0] = 10.0
    meter.add(table("one", EngineTimes(), rows=10))
    now[0] = 910.0
    meter.add(table("two", EngineTimes(), rows=1020))
    assert "; 0:00:00 left;" in meter.progress(1000).line


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
