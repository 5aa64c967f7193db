"""Fields that both sites spell in several ways: pictures, dates, numbers, words."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

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


def image_layout(schema: pa.Schema) -> str:
    """Where a shard has its pictures, in words. ValueError where that column holds something else."""
    kinds = {name: schema.field(name).type for name in IMAGE_COLUMNS if name in schema.names}
    for column, kind in kinds.items():
        if _is_binary(kind):
            return f"flat {column} column"
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type):
            return f"HF {column} struct"
    held = ", ".join(f"{column} holds {kind}" for column, kind in kinds.items())
    raise ValueError(f"a layout without pictures: {held}; needed are bytes or struct<bytes, path>")


def _is_binary(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def value_layout(schema: pa.Schema, column: str) -> str:
    """ "number" or "text"."""
    return "number" if pa.types.is_integer(schema.field(column).type) else "text"


def image_path(row: Mapping[str, Any]) -> str:
    """The file name that the Hugging Face struct carries, or ""."""
    structs = (row[column] for column in IMAGE_COLUMNS if isinstance(row.get(column), Mapping))
    return next((str(struct["path"]) for struct in structs if struct.get("path")), "")


def first(row: Mapping[str, Any], *names: str) -> Any:
    """The first of these fields that is not null."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def number(value: Any) -> int | None:
    """A whole number from a number or its text, also "3.0", as pandas has it of columns with holes; None where
    unreadable."""
    for read in (int, lambda text: int(float(text))):
        try:
            return read(value)
        except (TypeError, ValueError, OverflowError):
            continue
    return None


def spelling(value: Any) -> str:
    """A word or a number as one spelling; "" where there is none."""
    counted = number(value)
    if counted is not None:
        return str(counted)
    missing = value is None or value != value  # NaN
    return "" if missing else str(value).strip().lower()


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
