"""Danbooru posts, as its API and the public dumps spell them."""

from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa

from pipeline.core.records import TAG_CATEGORIES, Post, Rating, Rejected
from pipeline.sources.fields import (
    IMAGE_COLUMNS,
    first,
    identity,
    image_bytes,
    is_set,
    moment,
    number,
    spelling,
    tally,
    value_layout,
    words,
)

TELLTALE_COLUMNS = {
    "tag_string",
    "tag_string_general",
    "tags_general",
    "fav_count",
    "up_score",
    "file_ext",
    "is_deleted",
}
_CATEGORISED = tuple((f"tag_string_{category}", f"tags_{category}") for category in TAG_CATEGORIES)
_UNCATEGORISED = ("tag_string", "tags")
_TAG_COLUMNS = ("tag_string_general", "tags_general", *_UNCATEGORISED)
ID_COLUMNS = ("id",)
ADMISSIBLE = ("deleted", "banned", "unknown rating")
FIELDS = frozenset(
    {"id", "rating", "score", "fav_count", "created_at", "timestamp", "parent_id", "pixiv_id", "file_ext"}
    | {"is_deleted", "is_banned", *_UNCATEGORISED}
    | {name for names in _CATEGORISED for name in names}
)

# Letter, number and word spellings; "safe" is the letter s of dumps from before Danbooru had four ratings.
_RATINGS = {
    "g": Rating.GENERAL, "0": Rating.GENERAL, "general": Rating.GENERAL, "safe": Rating.GENERAL,
    "s": Rating.SENSITIVE, "1": Rating.SENSITIVE, "sensitive": Rating.SENSITIVE,
    "q": Rating.QUESTIONABLE, "2": Rating.QUESTIONABLE, "questionable": Rating.QUESTIONABLE,
    "e": Rating.EXPLICIT, "3": Rating.EXPLICIT, "explicit": Rating.EXPLICIT,
}  # fmt: skip

# Videos, Flash and ugoira archives hold no still picture.
_UNUSABLE_FILES = {"mp4", "webm", "swf", "zip"}


def missing_columns(found: set[str]) -> list[str]:
    """What a Danbooru shard lacks, each with the names that would do."""
    missing = [] if "id" in found else ["id"]
    if not found & set(IMAGE_COLUMNS):
        missing.append(" or ".join(IMAGE_COLUMNS))
    if not found & set(_TAG_COLUMNS):
        missing.append(" or ".join(_TAG_COLUMNS))
    return missing


def variant(schema: pa.Schema) -> list[str]:
    """How this shard spells what dumps spell differently, in words."""
    columns = set(schema.names)
    categories = sum(bool(columns & set(names)) for names in _CATEGORISED)
    tags = f"{categories} tag categories" if categories else "uncategorised tags"
    return [tags, f"{value_layout(schema, 'rating')} ratings"] if "rating" in columns else [tags, "no ratings"]


def row_id(row: Mapping[str, Any]) -> str:
    post = number(row.get("id"))
    if post is None:
        raise ValueError(f"id is {row.get('id')!r}")
    return f"danbooru:{post}"


def read_row(row: Mapping[str, Any], admit: Collection[str] = ()) -> Post | Rejected:
    """One post, or the reason why it has no usable picture. ValueError where the row has no id."""
    key = row_id(row)
    for flag in ("is_deleted", "is_banned"):
        reason = flag.removeprefix("is_")
        if is_set(row.get(flag)) and reason not in admit:
            return Rejected(key, reason, f"{flag} is set")
    rating = spelling(row.get("rating"))
    if rating and rating not in _RATINGS and "unknown rating" not in admit:
        return Rejected(key, "unknown rating", f"rating {row['rating']!r}")
    extension = str(row.get("file_ext") or "").lower()
    if extension in _UNUSABLE_FILES:
        return Rejected(key, "not a still picture", f"file_ext {extension}")
    parent = number(row.get("parent_id"))
    return Post(
        id=key,
        source="danbooru",
        image=image_bytes(row),
        rating=_RATINGS.get(rating),
        score=tally(row.get("score")),
        favourites=tally(row.get("fav_count")),
        created_at=moment(first(row, "created_at", "timestamp")),
        tags=_tags(row),
        parent=None if parent is None else f"danbooru:{parent}",
        pixiv_id=identity(row.get("pixiv_id")),
    )


def _tags(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """Tags by category; a dump with one uncategorised list has all of them under "general"."""
    tags = {category: words(first(row, *names)) for category, names in zip(TAG_CATEGORIES, _CATEGORISED, strict=True)}
    if not any(tags.values()):
        tags["general"] = words(first(row, *_UNCATEGORISED))
    return tags
