"""Where a raw row holds its picture."""

from collections.abc import Mapping
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
