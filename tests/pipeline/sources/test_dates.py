"""Dates: every form gives the same moment, and what has no clear meaning gives none."""

from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from pipeline.sources.dates import parse_time

MOMENT = datetime(2021, 5, 6, 7, 8, 9, tzinfo=UTC)
SECONDS = int(MOMENT.timestamp())


@pytest.mark.parametrize(
    "value",
    [
        "2021-05-06T07:08:09.385+00:00",
        "2021-05-06T07:08:09Z",
        "2021-05-06T16:08:09+09:00",
        "2021-05-06 07:08:09 UTC",
        "2021-05-06 07:08:09",
        "2021/05/06 07:08:09",
        "Thu May 06 2021 07:08:09 +0000",
        "Thu May 06 2021 16:08:09 GMT+0900 (Japan Standard Time)",
        "Thu, 06 May 2021 07:08:09 GMT",
        datetime(2021, 5, 6, 7, 8, 9),
        datetime(2021, 5, 6, 16, 8, 9, tzinfo=timezone(timedelta(hours=9))),
        SECONDS,
        float(SECONDS) + 0.5,
        str(SECONDS),
        SECONDS * 1000,
        str(SECONDS * 1000),
        SECONDS * 10**6 + 123,
        SECONDS * 10**9 + 123_456_789,
        float(SECONDS * 1000),
    ],
)
def test_forms_of_a_moment(value: object) -> None:
    assert parse_time(value) == MOMENT


@pytest.mark.parametrize(
    "value", ["2021-05-06", date(2021, 5, 6), "20210506", 20210506, "2021/05/06", "2021-05-06 UTC"]
)
def test_a_date_without_a_time_is_its_midnight(value: object) -> None:
    assert parse_time(value) == datetime(2021, 5, 6, tzinfo=UTC)


@pytest.mark.parametrize(
    "value",
    [
        *("yesterday", "05/06/2021", "", None, float("nan"), "NaT", 0, 12345, -1, "1612010900x", True, [2021], 1e30),
        *("0001-01-01T00:00:00Z", "1970-01-01", "9999-12-31", datetime(1970, 1, 1)),
    ],
)
def test_what_has_no_clear_meaning_is_no_date(value: object) -> None:
    assert parse_time(value) is None


def test_a_millisecond_time_is_not_read_as_the_digits_of_a_date() -> None:
    found = parse_time("1612010900000")  # fromisoformat reads 1612-01-09
    assert found is not None
    assert found.year == 2021
