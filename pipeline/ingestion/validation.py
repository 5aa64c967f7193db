"""Raw rows -> checked images with their smaller copies, or the reason for rejecting each."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, Final

import pyarrow as pa

from pipeline.core.records import IMAGES, OTHER_MD5, TAG_CATEGORIES, TIER, Post, Rejected
from pipeline.core.tables import DIED, ROW, SHARD
from pipeline.ingestion.raw_rows import MADE_FROM, PATH, READING, SOURCE
from pipeline.ingestion.rules import IngestRules
from pipeline.pictures.containers import RejectReason
from pipeline.pictures.crops import downsize
from pipeline.pictures.damage import find_damage
from pipeline.pictures.decoder import Picture, Refused, decode
from pipeline.pictures.memory_limit import PIXEL_BYTES, decoding_memory, memory_limit
from pipeline.pictures.perceptual_hash import perceptual_hash
from pipeline.pictures.pixels import is_blank
from pipeline.pictures.thumbnails import thumbnail
from pipeline.sources import SITES
from pipeline.sources.pictures import image_bytes
from pipeline.sources.reading import Reading
from pipeline.sources.values import UnreadableField

_PROCESS_BYTES = 300 << 20
_TABLE_BYTES = 16 << 20
_AS_IT_IS: Final = Reading()

ABOUT_IMAGES: Final = IMAGES.remove(IMAGES.get_field_index("image"))
TIER_COLUMNS: Final = {f"tier_{name}": name for name in TIER.names if name != "id"}
# Columns of IMAGES, without the image, and of the smaller tier if the row is kept, of Rejected if it is not; the others
# are null.
CHECKED: Final = pa.schema(
    [
        pa.field(SHARD, pa.string()),
        pa.field(ROW, pa.int32()),
        pa.field(MADE_FROM, pa.string()),
        *(field.with_nullable(True) for field in ABOUT_IMAGES),
        *(TIER.field(name).with_nullable(True).with_name(column) for column, name in TIER_COLUMNS.items()),
        pa.field("key", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)

Row = dict[str, Any] | Exception  # the exception if a value cannot be represented, such as a date in the year 10000


def check_memory(rules: IngestRules) -> int:
    """Bytes to reserve for checking a table of rows: the rows thrice, a picture that is not large, the process."""
    return 3 * _TABLE_BYTES + decoding_memory(rules.limits.max_pixels) + _PROCESS_BYTES


def check_limit(rules: IngestRules) -> int:
    """Bytes that checking may take for the largest picture that the rules allow."""
    return 3 * _TABLE_BYTES + PIXEL_BYTES * rules.limits.max_pixels + _PROCESS_BYTES


def check_rows(
    table: pa.Table, rules: IngestRules, readings: Mapping[str, Reading] = MappingProxyType({}), most: int = 0
) -> Iterator[pa.Table]:
    """The rows of a table from `read_raw` as CHECKED. A picture that needs more than `most` bytes is rejected.

    readings: those of the raw files that are not the default, by `reading_key`.
    """
    ours = [SHARD, ROW, DIED, PATH, SOURCE, MADE_FROM, READING]
    raw_columns = [name for name in table.column_names if name not in ours]
    rows = [row for batch in table.select(raw_columns).to_batches() for row in _as_rows(rules.named(batch))]
    about = table.select(ours).to_pylist()
    with memory_limit(most):
        checked = [
            _check(row, place, readings.get(place[READING], _AS_IT_IS), rules)
            for row, place in zip(rows, about, strict=True)
        ]
    yield pa.Table.from_pylist(checked, CHECKED)


def smaller_picture(row: Mapping[str, Any], picture: Picture, rules: IngestRules) -> dict[str, Any]:
    """The fields of TIER, without the id, that the smaller picture changes; none if it is small enough."""
    assert rules.downsize
    if min(picture.image.size) <= rules.downsize:
        return {name: row[name] for name in TIER_COLUMNS.values()}
    encoded = downsize(picture, rules.downsize, rules.downsize_format)
    return {"image": encoded.data, "format": encoded.format, "width": encoded.width, "height": encoded.height}


def _as_rows(batch: pa.RecordBatch) -> list[Row]:
    try:
        rows: list[Row] = batch.to_pylist()
        return rows
    except Exception as error:  # of many types, from invalid UTF-8 to times out of range
        if batch.num_rows == 1:
            return [error]
        return [row for number in range(batch.num_rows) for row in _as_rows(batch.slice(number, 1))]


def _check(row: Row, place: Mapping[str, Any], reading: Reading, rules: IngestRules) -> dict[str, Any]:
    """A row of CHECKED. `place` has SHARD, ROW, DIED and PATH, SOURCE and MADE_FROM."""
    where = {SHARD: place[SHARD], ROW: place[ROW], MADE_FROM: place[MADE_FROM]}
    outcome = _check_post(row, place, reading, rules)
    if isinstance(outcome, Rejected):
        image = b"" if isinstance(row, Exception) else image_bytes(row)
        return where | asdict(outcome) | {"sha256": _sha256(image)}
    checked, picture = outcome
    if rules.downsize:
        smaller = smaller_picture(checked, picture, rules)
        where |= {column: smaller[name] for column, name in TIER_COLUMNS.items()}
    return where | checked


def _check_post(
    row: Row, place: Mapping[str, Any], reading: Reading, rules: IngestRules
) -> tuple[dict[str, Any], Picture] | Rejected:
    """The row of IMAGES with its decoded picture, or the reason for rejecting it."""
    where = f"{place[PATH]}#{place[ROW]}"
    if isinstance(row, Exception):
        return Rejected(where, "unreadable row", f"{type(row).__name__}: {row}")
    try:
        post: Post | Rejected = SITES[place[SOURCE]].read_row(reading.row(row), rules.admit)
    except ValueError as error:
        return Rejected(where, "no id", str(error))
    except UnreadableField as error:
        return Rejected(where, "unreadable row", str(error))
    except Exception as error:  # a field of an unexpected type: one row must not cost its shard
        return Rejected(where, "unreadable row", f"{type(error).__name__}: {error}")
    if isinstance(post, Rejected):
        return post
    if place[DIED]:
        return Rejected(
            post.id, RejectReason.DECODER_DIED.value, "its process ended each time (signal or out of memory)"
        )
    picture = decode(post.image, rules.limits)
    if isinstance(picture, Refused):
        return Rejected(post.id, picture.reason.value, picture.detail)
    header = picture.header
    if damage := find_damage(post.image, header.format, header.width * header.height):
        return Rejected(post.id, RejectReason.DAMAGED.value, f"{header.format}: {damage}")
    if is_blank(picture.image):
        return Rejected(post.id, RejectReason.BLANK.value, "all pixels have the same colour, or are transparent")
    return _image_row(post, picture), picture


def _image_row(post: Post, picture: Picture) -> dict[str, Any]:
    row, small = asdict(post), thumbnail(picture.image)
    tags, md5 = row.pop("tags"), row.pop("md5")
    notes = picture.header.notes
    # A copy that was resized or saved again on the way from the site.
    if md5 and hashlib.md5(post.image, usedforsecurity=False).hexdigest() != md5:
        notes = (*notes, OTHER_MD5)
    return row | {
        "format": picture.header.format,
        "width": picture.header.width,
        "height": picture.header.height,
        "notes": "; ".join(notes) or None,
        "sha256": _sha256(post.image),
        "phash": perceptual_hash(small),
        "thumbnail": small,
        **{f"tags_{category}": tags[category] for category in TAG_CATEGORIES},
    }


def _sha256(image: bytes) -> str | None:
    return hashlib.sha256(image).hexdigest() if image else None
