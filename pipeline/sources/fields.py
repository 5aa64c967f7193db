"""Parsers of single raw fields, which Danbooru, Pixiv and the public dumps of both write in several forms."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

IMAGE_COLUMNS = ("image", "bytes", "jpg", "webp", "png")
_BINARY = {pa.binary(), pa.large_binary(), pa.binary_view()}


def image_bytes(row: Mapping[str, Any]) -> bytes:
    """Encoded image from a binary column or from the Hugging Face struct `image{bytes, path}`; b"" if there is none."""
    for column in IMAGE_COLUMNS:
        value = row.get(column)
        if isinstance(value, Mapping):
            value = value.get("bytes")
        if isinstance(value, bytes):
            return value
    return b""


def image_array(rows: pa.RecordBatch) -> pa.Array:
    """`image_bytes` of each row as a binary array (N); null where it is b"" for lack of a value."""
    found = []
    for name in IMAGE_COLUMNS:
        if name not in rows.schema.names:
            continue
        column = rows[name]
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = pc.struct_field(column, "bytes")
        if column.type in _BINARY:
            found.append(column.cast(pa.binary()))
    return pc.coalesce(*found)


def image_layout(schema: pa.Schema) -> str:
    """Describes the column that holds the images. Raises ValueError if no such column holds bytes."""
    kinds = {name: schema.field(name).type for name in IMAGE_COLUMNS if name in schema.names}
    for column, kind in kinds.items():
        if kind in _BINARY:
            return f"flat {column} column"
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and kind.field("bytes").type in _BINARY:
            return f"HF {column} struct"
    held = ", ".join(f"{column} holds {kind}" for column, kind in kinds.items())
    raise ValueError(f"a layout without images: {held}. Expected bytes or struct<bytes, path>.")


def image_path(row: Mapping[str, Any]) -> str:
    """File name stored in the Hugging Face image struct, or ""."""
    structs = (row[column] for column in IMAGE_COLUMNS if isinstance(row.get(column), Mapping))
    return next((str(struct["path"]) for struct in structs if struct.get("path")), "")


def first(row: Mapping[str, Any], *names: str) -> Any:
    """Value of the first of these fields that is not null, or None."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def parse_int(value: Any) -> int | None:
    """Integer from a number or text, or None. Accepts "3.0", which pandas writes for integer columns with nulls."""
    for read in (int, lambda text: int(float(text))):
        try:
            return read(value)
        except (TypeError, ValueError, OverflowError):
            continue
    return None


def parse_id(value: Any) -> int | None:
    """Non-negative 64-bit id, or None if the value is unreadable or out of range."""
    found = parse_int(value)
    return found if found is not None and 0 <= found < 2**63 else None


def parse_count(value: Any) -> int | None:
    """Number of votes, views or favourites, clamped to 32 bits; None if unreadable."""
    found = parse_int(value)
    return None if found is None else max(-(2**31), min(2**31 - 1, found))


def parse_code(value: Any) -> str:
    """An enumeration value as lower-case text ("1" for 1, 1.0 and "1.0"), or "" for null and NaN."""
    found = parse_int(value)
    if found is not None:
        return str(found)
    missing = value is None or value != value  # NaN
    return "" if missing else str(value).strip().lower()


def parse_flag(value: Any) -> bool:
    """Boolean from a bool, a number or text. Text other than true, t, yes, y and 1 is False."""
    return value.lower() in ("true", "t", "yes", "y", "1") if isinstance(value, str) else bool(value)


def parse_time(value: Any) -> datetime | None:
    """UTC time, in whole seconds, from ISO 8601 text, a datetime or a Unix timestamp; None if unreadable."""
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


def parse_tags(value: Any) -> list[str]:
    """Tags from space-separated text or from a list of strings."""
    if isinstance(value, str):
        return value.split()
    return [str(tag) for tag in value or [] if tag]
