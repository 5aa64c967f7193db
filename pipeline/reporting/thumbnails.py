"""Thumbnails of a few pictures of a dataset, small enough for hundreds of them to travel inside a page."""

from collections import defaultdict
from collections.abc import Mapping

from pipeline.pictures.thumbnails import data_uri
from pipeline.reporting.census import Place
from pipeline.storage.scan import in_order, read_pictures
from pipeline.storage.shards import Store

# Each holds one page of a picture column, and Arrow makes one page of a row group with fewer than 1024 rows.
_THREADS = 2


def thumbnails(store: Store, places: Mapping[str, Place]) -> dict[str, str]:
    """A data URI for each id; ids without a readable picture are left out."""
    tier = _smallest_tier(store)
    by_shard: dict[str, dict[int, str]] = defaultdict(dict)
    for wanted, place in places.items():
        by_shard[place.shard][place.row] = wanted
    drawn: dict[str, str] = {}
    for part in in_order(lambda shard: _of_shard(store, tier, shard, by_shard[shard]), sorted(by_shard), _THREADS):
        drawn |= part
    return drawn


def _smallest_tier(store: Store) -> str:
    """The folder with the same rows in the fewest bytes: images-<side>/ where there is one, or images/."""
    sides = [int(name[7:]) for name in store.folders("") if name.startswith("images-") and name[7:].isdecimal()]
    return f"images-{min(sides)}" if sides else "images"


def _of_shard(store: Store, tier: str, shard: str, wanted: Mapping[int, str]) -> dict[str, str]:
    """Data URIs by id; `wanted` gives the id of each row. Only row groups with such rows are read, up to the last."""
    drawn: dict[str, str] = {}
    folder = tier if store.exists(f"{tier}/{shard}.parquet") else "images"
    for row, picture in read_pictures(store, f"{folder}/{shard}.parquet", sorted(wanted)):
        uri = data_uri(picture)
        drawn |= {wanted[row]: uri} if uri else {}
    return drawn
