"""Pixiv illustrations: one row is one page of a work, with the field names of the app API or of the web API."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.core.records import TAG_CATEGORIES, Post, Rating, Rejected
from pipeline.sources.dates import parse_time
from pipeline.sources.pictures import IMAGE_COLUMNS, image_bytes, image_path
from pipeline.sources.tag_lists import structured, tag_items, tag_name
from pipeline.sources.values import (
    UnreadableField,
    first,
    is_missing,
    parse_code,
    parse_count,
    parse_flag,
    parse_id,
    parse_int,
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
_PAGE_COLUMNS = ("page", "num", "page_index")  # the API has none; "num" is gallery-dl's
ID_COLUMNS = ("id", *_PAGE_COLUMNS, "image.path")  # what row_id reads
RATING_COLUMNS = ("x_restrict", "xRestrict")
DATE_COLUMNS = ("create_date", "createDate")
COUNT_COLUMNS = ("total_view", "viewCount", "total_bookmarks", "bookmarkCount")
LINK_COLUMNS = ()
TAG_COLUMNS = ("tags",)
ADMISSIBLE = ("made by AI", "placeholder picture", "unknown rating")  # reasons that --admit may lift
FIELDS = frozenset({"id", *_PAGE_COLUMNS, "type", "tags", "user", "user_name", "visible", *_APP_API, *_WEB_API})

# x_restrict: 0 all ages, 1 R-18, 2 R-18G. A sanity_level above 2 marks all-ages works that are suggestive.
_RATINGS = {"0": Rating.GENERAL, "1": Rating.EXPLICIT, "2": Rating.EXPLICIT}
# The field in words, and the tags that the site adds to such works, which some dumps have in place of the field.
_RATING_WORDS = {"false": "0", "general": "0", "safe": "0", "all ages": "0", "all_ages": "0", "true": "1"}
# They are not taught.
_RATING_TAGS = {"r-18": "1", "r18": "1", "r-18g": "2", "r18g": "2"}
# illust_ai_type: 0 not told, 1 not made by AI, 2 made by AI.
_AI_TYPES = {"": False, "0": False, "1": False, "2": True, "false": False, "true": True}
# Tags of works made by AI, in lower case without separators. Illustrators tag them so whatever the field says.
_AI_TAGS = frozenset(
    {
        "aiイラスト",
        "ai生成",
        "ai生成イラスト",
        "aiイラストレーション",
        "ai絵",
        "ai画像",
        "ai作画",
        "ai绘画",
        "ai繪圖",
        "ai绘图",
        "ai生成作品",
    }
    | {"aiart", "aigenerated", "aigeneratedart", "aiillustration", "aiillust", "aigirl", "aipainting"}
    | {"novelai", "novelaidiffusion", "stablediffusion", "midjourney", "nijijourney", "にじジャーニー", "holara"}
)
_SEPARATORS = re.compile(r"[\s_\-・.]+")
# An id that names one of the work's files, and the names of its files: 84200001_1, 84200001_p1.
_ID_AND_PAGE = re.compile(r"(\d+)_p?(\d+)", re.ASCII)

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
    work = parse_id(row.get("id"))
    if named := _id_and_page(row):
        work = parse_id(named[1])
    if work is None:
        raise ValueError(f"id is {row.get('id')!r}")
    return f"pixiv:{work}_p{_page(row)}"


def _id_and_page(row: Mapping[str, Any]) -> re.Match[str] | None:
    return _ID_AND_PAGE.fullmatch(str(row.get("id")).strip())


def named_page(row: Mapping[str, Any]) -> int | None:
    """Page of the work from its column, else from the file name; None if the row is about the whole work. Raises
    ValueError if the page is out of range."""
    value = first(row, *_PAGE_COLUMNS)
    page = parse_id(value)
    if named := _id_and_page(row):
        if value is not None and page != int(named[2]):
            raise ValueError(f"id is {row['id']!r}, page is {value!r}")
        page = int(named[2])
    elif value is None and (digits := _page_in_name(row)):
        page = int(digits)
    elif value is not None and page is None:
        raise ValueError(f"page is {value!r}")
    if page is not None and page >= 2**31:
        raise ValueError(f"page is {page}")
    return page


def _page_in_name(row: Mapping[str, Any]) -> str:
    """The page in the name of the picture's file, ID_p3.png or ID_3.png; "" if there is none."""
    name = image_path(row).rpartition("/")[2]
    found = _ID_AND_PAGE.fullmatch(name.partition(".")[0])
    if found and parse_id(found[1]) == parse_id(row.get("id")):
        return found[2]
    found = _PAGE_IN_NAME.search(name)
    return found[1] if found else ""


def _page(row: Mapping[str, Any]) -> int:
    return named_page(row) or 0


def removal(row: Mapping[str, Any]) -> str:
    """Why the site no longer shows the work: "deleted", also if its artist hid it, or "" if it does."""
    return "deleted" if parse_flag(row, "visible") is False else ""


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

    Raises ValueError if the row has no id, UnreadableField for a flag or tags that are not understood.
    """
    key, page = row_id(row), _page(row)
    if parse_code(first(row, "type", "illustType")) in ("ugoira", "2"):
        return Rejected(key, "not a still picture", "type ugoira")
    tags = tag_items(row.get("tags"))
    names = [_original_name(tag).lower().lstrip("#＃") for tag in tags]
    if "made by AI" not in admit:
        by_ai = parse_code(first(row, "illust_ai_type", "aiType"))
        if by_ai not in _AI_TYPES:
            raise UnreadableField(f"illust_ai_type is {by_ai!r}, not 0, 1 or 2")
        if _AI_TYPES[by_ai]:
            return Rejected(key, "made by AI", f"illust_ai_type {by_ai}")
        english = (_taught_name(tag).lower() for tag in tags)
        if made_by := [name for name in (*names, *english) if _SEPARATORS.sub("", name) in _AI_TAGS]:
            return Rejected(key, "made by AI", f"tag {made_by[0]}")
    restriction = parse_code(first(row, *RATING_COLUMNS))
    restriction = _RATING_TAGS.get(restriction, _RATING_WORDS.get(restriction, restriction))
    restriction = max([restriction, *(_RATING_TAGS.get(name, "") for name in names)])
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
        created_at=parse_time(first(row, *DATE_COLUMNS)),
        tags=_tags(row, tags),
        page=page,
        parent=f"{key.rpartition('_p')[0]}_p0" if page else None,
    )


def _rating(row: Mapping[str, Any], restriction: str) -> Rating | None:
    rating = _RATINGS.get(restriction)
    suggestive = (parse_int(first(row, "sanity_level", "sl")) or 0) > 2
    return Rating.SENSITIVE if rating is Rating.GENERAL and suggestive else rating


def _tags(row: Mapping[str, Any], items: Sequence[Any]) -> dict[str, list[str]]:
    """Pixiv's tags under "general" and the work's author under "artist", with underscores for spaces."""
    tags: dict[str, list[str]] = {category: [] for category in TAG_CATEGORIES}
    tags["general"] = [tag_name(_taught_name(item)) for item in items if _taught_name(item)]
    user = structured(row.get("user"))
    artist = user.get("name") if isinstance(user, Mapping) else first(row, "user", "userName", "user_name")
    if not is_missing(artist):
        tags["artist"] = [str(artist).replace(" ", "_")]
    return tags


def _original_name(item: Any) -> str:
    """The name of one of `tag_items` as the artist wrote it."""
    return str(item if isinstance(item, str) else first(item, "name", "tag", "text", "label") or "").strip()


def _taught_name(item: Any) -> str:
    """English name if the site has one, else the original name; "" for popularity tags such as "1000users入り" and
    for ratings."""
    name = _original_name(item)
    if is_popularity_tag(name) or name.lower().lstrip("#＃") in _RATING_TAGS:
        return ""
    if isinstance(item, str):
        return name
    translation = item.get("translation")
    english = translation.get("en") if isinstance(translation, Mapping) else None
    return next((str(text) for text in (item.get("translated_name"), english) if not is_missing(text)), name)
