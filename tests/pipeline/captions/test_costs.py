"""The progress line and the record: rates, hours and dollars from the actors' counts."""

from collections import Counter

import pytest

from pipeline.captions.costs import Costs, Meter, clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set."""
    time = [0.0]
    monkeypatch.setattr("pipeline.captions.costs.time.monotonic", lambda: time[0])
    return time


def test_the_line_tells_rate_tokens_time_left_dollars_waiting_and_rejects(now: list[float]) -> None:
    meter = Meter(rows=1000, engines=2, dollars_per_hour=1.8)
    assert meter([Costs()]).line == "engine starts"
    now[0] = 100.0
    assert meter([Costs(rows=60, kept=40), Costs()]).line == "first answers"
    now[0] = 200.0
    first = Costs(
        rows=200, kept=40, tokens_in=30_000, tokens_out=6_000, rejected=Counter({"refusal": 3}), waited_for_engine=90.0
    )
    second = Costs(rows=60, tokens_in=10_000, tokens_out=2_000, waited_for_pictures=7.0)
    standing = meter([first, second])
    assert standing.rows == 260
    # 200 more rows in 100 s; 740 are left; 2 engines for 200 s and for 570 s.
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


def test_rows_that_a_restarted_actor_tells_of_again_leave_no_time_below_nothing(now: list[float]) -> None:
    meter = Meter(rows=1000, engines=1, dollars_per_hour=None)
    now[0] = 10.0
    meter([Costs(rows=10)])
    now[0] = 910.0
    standing = meter([Costs(rows=900), Costs(rows=788, kept=768)])
    assert standing.rows == 1000
    assert "; 0:00:00 left;" in standing.line


def test_a_clock_shows_days() -> None:
    assert (clock(59.6), clock(3_661), clock(9 * 86_400 + 14_400)) == ("0:01:00", "1:01:01", "9 d 04:00")
