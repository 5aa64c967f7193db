"""Pixiv illustrations: one row is one page of a work, with the field names of the app API or of the web API."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa

from pipeline.core.records import TAG_CATEGORIES, Post, Rating, Rejected
from pipeline.sources.fields import (
    IMAGE_COLUMNS,
    first,
    image_bytes,
    image_path,
    parse_code,
    parse_count,
    parse_flag,
    parse_int,
    parse_time,
)
from pipeline.tagging.tags import is_popularity_tag

# Columns that tell this layout from Danbooru's.
TELLTALE_COLUMNS = {
    "x_restrict", "xRestrict", "illust_ai_type", "aiType", "total_bookmarks", "bookmarkCount",
    "create_date", "createDate",
}  # fmt: skip

_APP_API = {"x_restrict", "illust_ai_type", "total_bookmarks", "total_view", "create_date", "sanity_level"}
_WEB_API = {"xRestrict", "aiType", "bookmarkCount", "viewCount", "createDate", "sl", "illustType", "userName"}
REQUIRED = (("id",), ("tags",), IMAGE_COLUMNS)  # alternatives of each
ID_COLUMNS = ("id", "page", "image.path")  # what row_id reads
ADMISSIBLE = ("made by AI", "placeholder picture", "unknown rating")  # reasons that --admit may lift
FIELDS = frozenset({"id", "page", "type", "tags", "user", "user_name", "visible", *_APP_API, *_WEB_API})

# x_restrict: 0 all ages, 1 R-18, 2 R-18G. A sanity_level above 2 marks all-ages works that are suggestive.
_RATINGS = {"0": Rating.GENERAL, "1": Rating.EXPLICIT, "2": Rating.EXPLICIT}
_MADE_BY_AI = 2

# Page number in names such as 12345678_p3.png and 12345678_p3_master1200.jpg.
_PAGE_IN_NAME = re.compile(r"_p(\d+)(?!\d)")


def variant(schema: pa.Schema) -> list[str]:
    """Describes the API and the type of the tags column, for the printed plan."""
    columns = set(schema.names)
    api = "web" if len(columns & _WEB_API) > len(columns & _APP_API) else "app"
    kind = schema.field("tags").type
    nested = "nested " if pa.types.is_struct(kind) else ""
    tags = "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else f"{nested}list"
    return [f"{api} API", f"tags as {tags}"]


def row_id(row: Mapping[str, Any]) -> str:
    """Stable id of a raw row, "pixiv:ID_pPAGE". Raises ValueError if the row has no id."""
    work = parse_int(row.get("id"))
    if work is None:
        raise ValueError(f"id is {row.get('id')!r}")
    return f"pixiv:{work}_p{_page(row)}"


def named_page(row: Mapping[str, Any]) -> int | None:
    """Page of the work from its column, else from the file name; None if the row is about the whole work. Raises
    ValueError if the page is out of range."""
    page = parse_int(row.get("page"))
    if page is None and (named := _PAGE_IN_NAME.search(image_path(row))):
        page = int(named[1])
    if page is not None and not 0 <= page < 2**31:
        raise ValueError(f"page is {page}")
    return page


def _page(row: Mapping[str, Any]) -> int:
    return named_page(row) or 0


def removal(row: Mapping[str, Any]) -> str:
    """Why the site no longer shows the work: "deleted", also if its artist hid it, or "" if it does."""
    visible = row.get("visible")
    return "deleted" if visible is not None and not parse_flag(visible) else ""


def refreshes(columns: Collection[str]) -> frozenset[str]:
    """The columns of POSTS that a file with these columns has values for."""
    found = set(columns)
    told_by = {
        "rating": {"x_restrict", "xRestrict"},
        "score": {"total_view", "viewCount"},
        "favourites": {"total_bookmarks", "bookmarkCount"},
        "deleted": {"visible"},
        "tags_general": {"tags"},
        "tags_artist": {"user", "userName", "user_name"},
    }
    return frozenset(column for column, fields in told_by.items() if fields & found)


def read_row(row: Mapping[str, Any], admit: Collection[str] = ()) -> Post | Rejected:
    """The row as a Post, or the reason why it has no usable image. `admit` lists reasons of ADMISSIBLE to ignore.

    Raises ValueError if the row has no id.
    """
    key, page = row_id(row), _page(row)
    if first(row, "type", "illustType") in ("ugoira", 2):
        return Rejected(key, "not a still picture", "type ugoira")
    if parse_int(first(row, "illust_ai_type", "aiType")) == _MADE_BY_AI and "made by AI" not in admit:
        return Rejected(key, "made by AI", "illust_ai_type 2")
    restriction = parse_code(first(row, "x_restrict", "xRestrict"))
    if restriction and restriction not in _RATINGS and "unknown rating" not in admit:
        return Rejected(key, "unknown rating", f"x_restrict {restriction}")
    path = image_path(row)
    if path.rsplit("/", 1)[-1].startswith("limit_") and "placeholder picture" not in admit:
        return Rejected(key, "placeholder picture", path)
    return Post(
        id=key,
        source="pixiv",
        image=image_bytes(row),
        rating=_rating(row, restriction),
        score=parse_count(first(row, "total_view", "viewCount")),
        favourites=parse_count(first(row, "total_bookmarks", "bookmarkCount")),
        created_at=parse_time(first(row, "create_date", "createDate")),
        tags=_tags(row),
        page=page,
        parent=f"{key.rpartition('_p')[0]}_p0" if page else None,
    )


def _rating(row: Mapping[str, Any], restriction: str) -> Rating | None:
    rating = _RATINGS.get(restriction)
    suggestive = (parse_int(first(row, "sanity_level", "sl")) or 0) > 2
    return Rating.SENSITIVE if rating is Rating.GENERAL and suggestive else rating


def _tags(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """Pixiv's tags under "general" and the work's author under "artist", with underscores for spaces."""
    tags: dict[str, list[str]] = {category: [] for category in TAG_CATEGORIES}
    tags["general"] = [name.replace(" ", "_") for name in map(_tag_name, _tag_list(row.get("tags"))) if name]
    user = row.get("user")
    artist = user.get("name") if isinstance(user, Mapping) else first(row, "userName", "user_name")
    if artist:
        tags["artist"] = [str(artist).replace(" ", "_")]
    return tags


def _tag_list(tags: Any) -> list[Any]:
    """Tags from a list (app API), from `tags.tags` (web API) or from space-separated text (some dumps)."""
    if isinstance(tags, Mapping):
        tags = tags.get("tags")
    listed = tags.split() if isinstance(tags, str) else list(tags or [])
    return [tag for tag in listed if isinstance(tag, str | Mapping)]


def _tag_name(tag: Any) -> str:
    """English name if the site has one, else the original name; "" for popularity tags such as "1000users入り"."""
    name = tag if isinstance(tag, str) else str(first(tag, "name", "tag") or "")
    if is_popularity_tag(name):
        return ""
    if isinstance(tag, str):
        return name
    translation = tag.get("translation")
    english = translation.get("en") if isinstance(translation, Mapping) else None
    return str(tag.get("translated_name") or english or name)
