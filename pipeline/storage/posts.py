"""Columns of image shards with the values that ingest.py --refresh has brought up to date.

What changes on a site after a picture was posted (favourites, score, tags, rating, deletion) is kept in posts/<shard>,
so that it can be refreshed without writing the pictures again.
"""

from typing import Final

import pyarrow as pa

from pipeline.core.records import IMAGES, POSTS
from pipeline.storage.shards import Store

REFRESHED: Final = frozenset(POSTS.names) & frozenset(IMAGES.names) - {"id"}  # columns of IMAGES that POSTS replaces


def read_images(store: Store, shard: str, columns: list[str]) -> pa.Table:
    """These columns of images/<shard>, in this order; those in REFRESHED as of posts/<shard>, where that exists. Then a
    column `deleted` is appended if one of REFRESHED is wanted.

    Raises ValueError if posts/<shard> has other rows than its images.
    """
    file = f"posts/{shard}.parquet"
    fresh = [column for column in columns if column in REFRESHED]
    if not fresh or not store.exists(file):
        return store.read_table(f"images/{shard}.parquet", columns)
    images = store.read_table(f"images/{shard}.parquet", ["id", *(c for c in columns if c not in {"id", *fresh})])
    posts = store.read_table(file, ["id", *fresh, "deleted"])
    if not posts["id"].equals(images["id"]):
        raise ValueError(f"{file} has other rows than its images, which were ingested again; run ingest.py --refresh")
    values = {column: (posts if column in fresh else images)[column] for column in columns}
    return pa.table(values | {"deleted": posts["deleted"]})
