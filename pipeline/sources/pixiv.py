"""Pixiv illustrations: one row is one page of a work. The app API's names first, the web API's after them."""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.records import TAG_CATEGORIES, Post, Rating, Rejected
from pipeline.sources.fields import IMAGE_COLUMNS, first, image_bytes, image_path, moment, number, tally

TELLTALE_COLUMNS = {
    "x_restrict", "xRestrict", "illust_ai_type", "aiType", "total_bookmarks", "bookmarkCount",
    "create_date", "createDate",
}  # fmt: skip

# x_restrict: 0 all ages, 1 R-18, 2 R-18G. sanity_level above 2 marks all-ages works that are suggestive.
_RATINGS = {0: Rating.GENERAL, 1: Rating.EXPLICIT, 2: Rating.EXPLICIT}
_MADE_BY_AI = 2

# "1000users入り": a tag that says how popular the work is would leak the quality label into the caption.
_POPULARITY = re.compile(r"\d+users入り")


def missing_columns(found: set[str]) -> list[str]:
    """What a Pixiv shard lacks, each with the names that would do."""
    missing = [name for name in ("id", "tags") if name not in found]
    if not found & set(IMAGE_COLUMNS):
        missing.append(" or ".join(IMAGE_COLUMNS))
    return missing


def read_row(row: Mapping[str, Any]) -> Post | Rejected:
    """One page of a work, or the reason why it has no usable picture. ValueError where the row has no id."""
    work = number(row.get("id"))
    if work is None:
        raise ValueError(f"id is {row.get('id')!r}")
    page = number(row.get("page")) or 0
    key = f"pixiv:{work}_p{page}"
    kind = first(row, "type", "illustType")
    if kind in ("ugoira", 2):
        return Rejected(key, "not a still picture", "type ugoira")
    if number(first(row, "illust_ai_type", "aiType")) == _MADE_BY_AI:
        return Rejected(key, "made by AI", "illust_ai_type 2")
    path = image_path(row)
    if path.rsplit("/", 1)[-1].startswith("limit_"):
        return Rejected(key, "placeholder picture", path)
    return Post(
        id=key,
        source="pixiv",
        image=image_bytes(row),
        rating=_rating(row),
        score=tally(first(row, "total_view", "viewCount")),
        favourites=tally(first(row, "total_bookmarks", "bookmarkCount")),
        created_at=moment(first(row, "create_date", "createDate")),
        tags=_tags(row),
        page=page,
        parent=f"pixiv:{work}_p0" if page else None,
    )


def _rating(row: Mapping[str, Any]) -> Rating | None:
    restriction = number(first(row, "x_restrict", "xRestrict"))
    rating = None if restriction is None else _RATINGS.get(restriction)
    suggestive = (number(first(row, "sanity_level", "sl")) or 0) > 2
    return Rating.SENSITIVE if rating is Rating.GENERAL and suggestive else rating


def _tags(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """Pixiv has one category; the work's author is its artist. Spaces become underscores, as in all our tags."""
    tags: dict[str, list[str]] = {category: [] for category in TAG_CATEGORIES}
    tags["general"] = [name.replace(" ", "_") for name in map(_tag_name, _tag_list(row.get("tags"))) if name]
    user = row.get("user")
    artist = user.get("name") if isinstance(user, Mapping) else first(row, "userName", "user_name")
    if artist:
        tags["artist"] = [str(artist).replace(" ", "_")]
    return tags


def _tag_list(tags: Any) -> list[Any]:
    """The app API has a list; the web API nests it as tags.tags; some dumps have one text. No Pixiv tag has a space."""
    if isinstance(tags, Mapping):
        tags = tags.get("tags")
    listed = tags.split() if isinstance(tags, str) else list(tags or [])
    return [tag for tag in listed if isinstance(tag, str | Mapping)]


def _tag_name(tag: Any) -> str:
    """The English name where the site has one, else the name as given; "" for a tag that is no description."""
    name = tag if isinstance(tag, str) else str(first(tag, "name", "tag") or "")
    if _POPULARITY.search(name):
        return ""
    if isinstance(tag, str):
        return name
    translation = tag.get("translation")
    english = translation.get("en") if isinstance(translation, Mapping) else None
    return str(tag.get("translated_name") or english or name)
