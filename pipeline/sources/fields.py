"""Fields that both sites spell in several ways: pictures, dates, numbers, words."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

IMAGE_COLUMNS = ("image", "bytes", "jpg", "webp", "png")


def image_bytes(row: Mapping[str, Any]) -> bytes:
    """The picture's bytes from a flat binary column or the Hugging Face struct `image{bytes, path}`; b"" if none."""
    for column in IMAGE_COLUMNS:
        value = row.get(column)
        if isinstance(value, Mapping):
            value = value.get("bytes")
        if isinstance(value, bytes):
            return value
    return b""


def image_path(row: Mapping[str, Any]) -> str:
    """The file name that the Hugging Face struct carries, or ""."""
    value = row.get("image")
    return str(value.get("path") or "") if isinstance(value, Mapping) else ""


def first(row: Mapping[str, Any], *names: str) -> Any:
    """The first of these fields that is not null."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def number(value: Any) -> int | None:
    """A whole number from a number or its text; None where unreadable."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def identity(value: Any) -> int | None:
    """A number that another table knows; None where unreadable or beyond 64 bits."""
    found = number(value)
    return found if found is not None and 0 <= found < 2**63 else None


def is_set(value: Any) -> bool:
    """A flag from a truth value, a number or a text: "false", "f", "no" and "0" are not set."""
    return value.lower() in ("true", "t", "yes", "y", "1") if isinstance(value, str) else bool(value)


def tally(value: Any) -> int | None:
    """A count of votes, views or the like, held within 32 bits; None where unreadable."""
    counted = number(value)
    return None if counted is None else max(-(2**31), min(2**31 - 1, counted))


def moment(value: Any) -> datetime | None:
    """A time in UTC from ISO 8601 text, a datetime or seconds since 1970; None where unreadable."""
    try:
        if isinstance(value, datetime):
            parsed = value
        elif isinstance(value, int | float):
            parsed = datetime.fromtimestamp(value, UTC)
        else:
            parsed = datetime.fromisoformat(str(value))
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).astimezone(UTC).replace(microsecond=0)
    except (ValueError, OverflowError, OSError):
        return None


def words(value: Any) -> list[str]:
    """Tags from one space-separated text or from a list of texts."""
    if isinstance(value, str):
        return value.split()
    return [str(tag) for tag in value or [] if tag]
