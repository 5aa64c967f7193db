"""Thumbnails of a few pictures of a dataset, small enough for hundreds of them to travel inside a page."""

import base64
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence

import pyarrow.parquet as pq

from pipeline.census import Place
from pipeline.images import Limits, Refused, decode
from pipeline.scan import in_order, read_batches
from pipeline.shards import Store

_SIDE = 176  # pixels of the longer side: shown at about half of it, for dense screens
_QUALITY = 60
# Rows that are read at once from a row group, whose pictures may be large.
_PICTURES_AT_ONCE = 8


def thumbnails(store: Store, places: Mapping[str, Place]) -> dict[str, str]:
    """A data URI for each id; ids without a readable picture are left out."""
    by_shard: dict[str, dict[int, str]] = defaultdict(dict)
    for wanted, place in places.items():
        by_shard[place.shard][place.row] = wanted
    drawn: dict[str, str] = {}
    for part in in_order(lambda shard: _of_shard(store, shard, by_shard[shard]), sorted(by_shard)):
        drawn |= part
    return drawn


def _of_shard(store: Store, shard: str, wanted: Mapping[int, str]) -> dict[str, str]:
    """Data URIs by id; `wanted` gives the id of each row. Only row groups with such rows are read, up to the last."""
    file, start = f"images/{shard}.parquet", 0
    drawn: dict[str, str] = {}
    for group, rows in enumerate(_group_sizes(store, file)):
        last = max((row for row in wanted if start <= row < start + rows), default=-1)
        row = start
        for batch in read_batches(store, file, ["image"], _PICTURES_AT_ONCE, [group]) if last >= 0 else ():
            for number in range(batch.num_rows):
                if row + number in wanted:
                    uri = data_uri(batch["image"][number].as_py())
                    drawn |= {wanted[row + number]: uri} if uri else {}
            row += batch.num_rows
            if row > last:
                break
        start += rows
    return drawn


def _group_sizes(store: Store, file: str) -> Sequence[int]:
    with store.open(file) as opened:
        footer = pq.read_metadata(opened)
    return [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]


def data_uri(picture: bytes) -> str | None:
    """The picture as a small WebP in a data URI; None where it cannot be decoded."""
    # Whoever wrote images/ had limits of its own; these only guard the memory of this process.
    decoded = decode(picture, Limits(max_aspect=1000.0, min_side=1))
    if isinstance(decoded, Refused):
        return None
    decoded.image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    decoded.image.save(buffer, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
