"""Dates of posts, in the forms of the sites' APIs and of public dumps."""

import re
from datetime import UTC, date, datetime, time
from email.utils import parsedate_to_datetime
from typing import Any, Final

from pipeline.sources.values import is_missing

# Units of Unix times by magnitude. Seconds below 10^8 would be before 1973; 10^11 seconds are the year 5138.
_LEAST: Final = 10**8
_UNITS: Final = ((10**11, 1), (10**14, 10**3), (10**17, 10**6), (10**20, 10**9))  # below it: units per second

# Programs write year 1, 1970 and 9999 for a date that they do not know.
_YEARS: Final = range(1971, 2100)

_NUMBER: Final = re.compile(r"\d+(\.\d*)?", re.ASCII)
_DAY: Final = re.compile(r"(19|20)\d{6}", re.ASCII)  # 20210506
_ZONE_NAME: Final = re.compile(r"\s*\b(UTC|GMT|Z)$")
# As JavaScript prints a date: Thu May 06 2021 07:08:09 GMT+0900 (Japan Standard Time).
_JAVASCRIPT: Final = re.compile(
    r"[A-Z][a-z]{2} ([A-Z][a-z]{2} \d{1,2} \d{4} [\d:]{8})(?: (?:GMT|UTC)?([+-]\d{4})?)?( \(.*\))?"
)


def parse_time(value: Any) -> datetime | None:
    """UTC time in whole seconds, or None if the value is missing or unreadable.

    Reads ISO 8601 and similar text, with or without a time, "UTC", "GMT" or an offset (without one it is UTC), the
    dates of e-mails and JavaScript, datetimes, dates, 20210506, and Unix times in seconds to nanoseconds.
    Days and months in unclear order, such as 05/06/2021, and years before 1971 or after 2099 are unreadable.
    """
    if is_missing(value) or isinstance(value, bool):
        return None
    try:
        parsed = _parsed(value)
        moment = (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).astimezone(UTC).replace(microsecond=0)
        return moment if moment.year in _YEARS else None
    except (ValueError, TypeError, OverflowError, OSError):
        return None


def _parsed(value: Any) -> datetime:
    """Raises ValueError or TypeError if it is no date, OverflowError or OSError if it is out of range."""
    if isinstance(value, datetime):
        return value
    if isinstance(value, date):
        return datetime.combine(value, time())
    text = str(value).strip()
    if _DAY.fullmatch(text):
        return datetime.strptime(text, "%Y%m%d")
    if not isinstance(value, str) or _NUMBER.fullmatch(text):
        return _from_number(float(text))
    text = _ZONE_NAME.sub("+00:00", text)
    if re.match(r"\d{4}/\d", text):
        text = text.replace("/", "-")
    if found := _JAVASCRIPT.fullmatch(text):
        return datetime.strptime(f"{found[1]} {found[2] or '+0000'}", "%b %d %Y %H:%M:%S %z")
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return parsedate_to_datetime(text)


def _from_number(number: float) -> datetime:
    unit = next((unit for below, unit in _UNITS if _LEAST <= number < below), None)
    if unit is None:
        raise ValueError(f"{number} is no Unix time since 1973")
    return datetime.fromtimestamp(number // unit, UTC)
