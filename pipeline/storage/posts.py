"""Columns of image shards with the values that ingest.py --refresh has brought up to date.

What changes on a site after a picture was posted (favourites, score, tags, rating, deletion) is kept in posts/<shard>,
so that it can be refreshed without writing the pictures again.
"""

import shlex
from collections.abc import Mapping
from typing import Final

import pyarrow as pa

from pipeline.core.errors import UsageError
from pipeline.core.records import IMAGES, POSTS
from pipeline.storage.manifest import Catalog, Footer
from pipeline.storage.shards import Store

REFRESHED: Final = frozenset(POSTS.names) & frozenset(IMAGES.names) - {"id"}  # columns of IMAGES that POSTS replaces


def posts_digests(catalog: Catalog, images: Mapping[str, Footer]) -> dict[str, str]:
    """The digest of the values in posts/<shard>, for each shard that has one.

    Raises UsageError if posts are of other images than those that the dataset has now.
    """
    posts = catalog.footers("posts", images)
    stale = [shard for shard, footer in posts.items() if footer.provenance.get("images") != images[shard].digest]
    if stale:
        raise UsageError(
            f"{len(stale)} of {len(images)} shards were ingested again after their posts, first {stale[0]}; run: "
            f"python pipeline/ingest.py --refresh PATH --dataset {shlex.quote(catalog.dataset.root)}"
        )
    return {shard: footer.metadata["digest"] for shard, footer in posts.items()}


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
