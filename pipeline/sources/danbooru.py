"""Danbooru posts, with the field names of its API and of the public dumps."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa

from pipeline.core.records import TAG_CATEGORIES, Post, Rating, Rejected
from pipeline.sources.dates import parse_time
from pipeline.sources.pictures import IMAGE_COLUMNS, image_bytes
from pipeline.sources.tag_lists import by_category, tag_names
from pipeline.sources.values import first, is_missing, parse_code, parse_count, parse_flag, parse_id

# Columns that tell this layout from Pixiv's.
TELLTALE_COLUMNS = {
    "tag_string", "tag_string_general", "tags_general", "fav_count", "up_score", "file_ext", "is_deleted",
}  # fmt: skip
_CATEGORISED = tuple((f"tag_string_{category}", f"tags_{category}") for category in TAG_CATEGORIES)
_UNCATEGORISED = ("tag_string", "tags")
REQUIRED = (("id",), IMAGE_COLUMNS, ("tag_string_general", "tags_general", *_UNCATEGORISED))  # alternatives of each
ID_COLUMNS = ("id",)  # what row_id reads
RATING_COLUMNS = ("rating",)
DATE_COLUMNS = ("created_at", "timestamp")
COUNT_COLUMNS = ("score", "fav_count")
LINK_COLUMNS = ("parent_id", "pixiv_id")
TAG_COLUMNS = (*(name for names in _CATEGORISED for name in names), *_UNCATEGORISED)
ADMISSIBLE = ("deleted", "banned", "made by AI", "unknown rating")  # reasons that --admit may lift
FIELDS = frozenset(
    {"id", "rating", "score", "fav_count", "created_at", "timestamp", "parent_id", "pixiv_id", "file_ext", "md5"}
    | {"is_deleted", "is_banned", *_UNCATEGORISED}
    | {name for names in _CATEGORISED for name in names}
)

# Letters, numbers and words. "safe" occurs in dumps from before Danbooru had four ratings.
_RATINGS = {
    "g": Rating.GENERAL, "0": Rating.GENERAL, "general": Rating.GENERAL, "safe": Rating.GENERAL,
    "s": Rating.SENSITIVE, "1": Rating.SENSITIVE, "sensitive": Rating.SENSITIVE,
    "q": Rating.QUESTIONABLE, "2": Rating.QUESTIONABLE, "questionable": Rating.QUESTIONABLE,
    "e": Rating.EXPLICIT, "3": Rating.EXPLICIT, "explicit": Rating.EXPLICIT,
}  # fmt: skip

# How dumps write ratings: "rating:safe", "Rating.EXPLICIT".
_RATING_PREFIX = re.compile(r"rating\W")
_RATING_TAG = re.compile(r"rating:(\w+)")
# Tags of other sites' dumps that name their category, such as artist:NAME. Danbooru reserves these prefixes.
_PREFIXED = re.compile(rf"({'|'.join(TAG_CATEGORIES)}):(.+)")

# Danbooru's two tags, then those of sites with the same API. With hyphens for underscores.
MADE_BY_AI = frozenset(
    {"ai-generated", "ai-assisted", "stable-diffusion", "novelai", "novelai-diffusion", "nai-diffusion", "midjourney"}
)

_REMOVAL_FLAGS = ("is_deleted", "is_banned")

# Videos, Flash and ugoira archives are not still images.
_UNUSABLE_FILES = {"mp4", "webm", "swf", "zip"}


def variant(schema: pa.Schema) -> list[str]:
    """Describes how this file stores tags and ratings, for the printed plan."""
    columns = set(schema.names)
    categories = sum(bool(columns & set(names)) for names in _CATEGORISED)
    tags = f"{categories} tag categories" if categories else "uncategorised tags"
    if "rating" not in columns:
        return [tags, "no ratings"]
    return [tags, "number ratings" if pa.types.is_integer(schema.field("rating").type) else "text ratings"]


def row_id(row: Mapping[str, Any]) -> str:
    """Stable id of a raw row, "danbooru:ID". Raises ValueError if the row has no id."""
    post = parse_id(row.get("id"))
    if post is None:
        raise ValueError(f"id is {row.get('id')!r}")
    return f"danbooru:{post}"


def named_page(row: Mapping[str, Any]) -> int | None:
    """The page that the row names: none, a post is one picture."""
    return None


def removal(row: Mapping[str, Any]) -> str:
    """Why the site no longer shows the post: "deleted", "banned", or "" if it does."""
    return next((flag.removeprefix("is_") for flag in _REMOVAL_FLAGS if parse_flag(row, flag)), "")


def refreshes(columns: Collection[str]) -> frozenset[str]:
    """The columns of POSTS that a file with these columns has values for. Uncategorised tags do not count: they would
    replace categorised ones."""
    found = set(columns)
    told_by = {
        "rating": {"rating"},
        "score": {"score"},
        "favourites": {"fav_count"},
        "deleted": set(_REMOVAL_FLAGS),
        **{f"tags_{category}": set(names) for category, names in zip(TAG_CATEGORIES, _CATEGORISED, strict=True)},
    }
    return frozenset(column for column, fields in told_by.items() if fields & found)


def read_row(row: Mapping[str, Any], admit: Collection[str] = ()) -> Post | Rejected:
    """The row as a Post, or the reason why it has no usable image. `admit` lists reasons of ADMISSIBLE to ignore.

    Raises ValueError if the row has no id, UnreadableField for a flag or tags that are not understood.
    """
    key = row_id(row)
    for flag in _REMOVAL_FLAGS:
        reason = flag.removeprefix("is_")
        if parse_flag(row, flag) and reason not in admit:
            return Rejected(key, reason, f"{flag} is set")
    tags, told = _tags(row)
    rating = _RATING_PREFIX.sub("", parse_code(row.get("rating"))) or told
    if rating and rating not in _RATINGS and "unknown rating" not in admit:
        return Rejected(key, "unknown rating", f"rating {told if is_missing(row.get('rating')) else row['rating']!r}")
    extension = str(row.get("file_ext") or "").lower().lstrip(".")
    if extension in _UNUSABLE_FILES:
        return Rejected(key, "not a still picture", f"file_ext {extension}")
    made_by = [tag for names in tags.values() for tag in names if tag.lower().replace("_", "-") in MADE_BY_AI]
    if made_by and "made by AI" not in admit:
        return Rejected(key, "made by AI", f"tag {made_by[0]}")
    parent = parse_id(row.get("parent_id"))
    return Post(
        id=key,
        source="danbooru",
        image=image_bytes(row),
        rating=_RATINGS.get(rating),
        score=parse_count(row.get("score")),
        favourites=parse_count(row.get("fav_count")),
        created_at=parse_time(first(row, *DATE_COLUMNS)),
        tags=tags,
        parent=None if parent is None else f"danbooru:{parent}",
        pixiv_id=parse_id(row.get("pixiv_id")),
        md5=str(row["md5"]).strip().lower() if not is_missing(row.get("md5")) else None,
    )


def _tags(row: Mapping[str, Any]) -> tuple[dict[str, list[str]], str]:
    """Tags by category, and the rating that one of them is, or "".

    Tags of the uncategorised list that have no category are under "general", if that is empty.
    """
    tags = {c: tag_names(first(row, *names)) for c, names in zip(TAG_CATEGORIES, _CATEGORISED, strict=True)}
    if not tags["general"]:
        every = first(row, *_UNCATEGORISED)
        listed = by_category(every)
        if listed is None:
            known = set().union(*tags.values())
            for tag in tag_names(every):
                category, name = found.groups() if (found := _PREFIXED.fullmatch(tag)) else ("general", tag)
                if name not in known:
                    tags[category].append(name)
        elif not any(tags.values()):
            tags = {category: tag_names(names) for category, names in listed.items()}
    ratings = [found[1] for names in tags.values() for tag in names if (found := _RATING_TAG.fullmatch(tag))]
    kept = {c: [tag for tag in names if not _RATING_TAG.fullmatch(tag)] for c, names in tags.items()}
    return kept, ratings[0].lower() if ratings else ""
