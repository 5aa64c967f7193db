"""Lists of tags, in the forms of the sites' APIs and of public dumps: text, lists, JSON, maps, pairs with scores."""

import ast
import html
import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any, Final

from pipeline.core.records import TAG_CATEGORIES
from pipeline.sources.values import UnreadableField, is_missing

# Of a tagger's score, below which a tag is not taken: the taggers' own default.
LEAST_SCORE: Final = 0.35

_NAME_FIELDS: Final = ("name", "tag", "text", "label")
_SCORE_FIELDS: Final = ("score", "confidence", "probability")
_CATEGORY_FIELDS: Final = ("category", "type")
# Danbooru's numbers of categories.
_NUMBERS: Final = {"0": "general", "1": "artist", "3": "copyright", "4": "character", "5": "meta"}
# How text begins that holds a list or a mapping, whether it can be read or not.
_STRUCTURE: Final = re.compile(r"\s*([\[({]\s*[\[({\"']|array\()")
_QUOTED: Final = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")
_ENTITY: Final = re.compile(r"&(#\d+|#[xX][0-9a-fA-F]+|[a-zA-Z]+);")
_ESCAPED: Final = re.compile(r"\\([()\[\]])")  # as prompts for Stable Diffusion write parentheses


def by_category(value: Any) -> dict[str, Any] | None:
    """Tag lists by category, from a struct, a map or JSON of such, or from a list of tags with categories; None if the
    value has another form. Raises UnreadableField for an unknown category."""
    value = _rows(structured(value))
    if isinstance(value, list) and value and all(_is_pair(item) for item in value):
        value = dict(value)  # a map, as Arrow gives it
    if isinstance(value, Mapping):
        named = {_category(name): name for name in value}
        if not named.keys() & set(TAG_CATEGORIES):
            return None
        if unknown := [name for name in value if _category(name) not in TAG_CATEGORIES and not _is_empty(value[name])]:
            raise UnreadableField(f"tags have the unknown categories {sorted(map(str, unknown))}")
        return {category: value[named[category]] if category in named else None for category in TAG_CATEGORIES}
    if isinstance(value, list) and any(_told_category(item) is not None for item in value):
        found: dict[str, Any] = {category: [] for category in TAG_CATEGORIES}
        for item in value:
            told = _told_category(item)
            category = "general" if told is None else _NUMBERS.get(str(told), _category(told))
            if category not in found:
                raise UnreadableField(f"a tag has the unknown category {told!r}")
            found[category].append(item)
        return found
    return None


def _category(name: Any) -> str:
    """The category that a field of tags is named after, such as artists or tag_string_artist, else the name."""
    category = str(name).strip().lower().removeprefix("tag_string_").removeprefix("tags_")
    return category if category in TAG_CATEGORIES else category.removesuffix("s")


def _told_category(item: Any) -> Any:
    """What a tag says about its category, None if nothing."""
    told = [item.get(name) for name in _CATEGORY_FIELDS] if isinstance(item, Mapping) else []
    value = next((value for value in told if not is_missing(value)), None)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_empty(value: Any) -> bool:
    return is_missing(value) or not value


def _rows(value: Any) -> Any:
    """Tags as a list of mappings if they are a mapping of lists, as Hugging Face's libraries store them."""
    if not isinstance(value, Mapping) or not any(isinstance(value.get(name), list) for name in _NAME_FIELDS):
        return value
    columns = {name: listed for name, listed in value.items() if isinstance(listed, list)}
    if len(set(map(len, columns.values()))) != 1:
        raise UnreadableField(f"tags are lists of different lengths: {str(value)[:200]}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def has_scores(value: Any) -> bool:
    """True if tags come with the scores of a tagger."""
    value = _rows(structured(value))
    items = list(value.items()) if isinstance(value, Mapping) else value
    return isinstance(items, list) and any(
        isinstance(item[1], float)
        if _is_pair(item)
        else isinstance(item, Mapping) and any(isinstance(item.get(name), int | float) for name in _SCORE_FIELDS)
        for item in items
    )


def tag_items(value: Any, commas: bool = False) -> list[Any]:
    """The tags of a value: text, or mappings with a name and more.

    Text is separated by commas if `commas`, else by white space; text that holds a list in JSON, or as Python prints
    it, is that list. Tags with a score below LEAST_SCORE are left out. Raises UnreadableField for any other form, such
    as numbers.
    """
    value = _rows(structured(value))
    if is_missing(value):
        return []
    if isinstance(value, str):
        if _looks_structured(value):
            raise UnreadableField(f"tags are {value[:200]!r}, a list in a form that is not known")
        return [tag.strip() for tag in (value.split(",") if commas else value.split()) if tag.strip()]
    if isinstance(value, Mapping):
        if set(value) == {"tags"} or isinstance(value.get("tags"), list):  # the web API of Pixiv
            return tag_items(value["tags"], commas)
        value = list(value.items())
    if not isinstance(value, list | tuple):
        raise UnreadableField(f"tags are {value!r}")
    return [item for item in map(_item, value) if item is not None]


def tag_name(item: Any) -> str:
    """The name of one of `tag_items`, with underscores for spaces. HTML entities and escaped parentheses are read."""
    if isinstance(item, Mapping):
        item = next((item[name] for name in _NAME_FIELDS if not is_missing(item.get(name))), "")
    name = str(item)
    for _ in range(2):  # escaped twice, as &amp;gt;
        name = _ENTITY.sub(lambda found: html.unescape(found[0]), name)
    name = _ESCAPED.sub(r"\1", name).strip().replace(" ", "_")
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def tag_names(value: Any, commas: bool = False) -> list[str]:
    """The names of `tag_items`, without empty ones."""
    return [name for name in map(tag_name, tag_items(value, commas)) if name]


def _item(item: Any) -> Any:
    """A tag, or None if it is missing or its score is low."""
    if is_missing(item):
        return None
    if isinstance(item, str):
        return item.strip()
    if _is_pair(item):
        name, score = item
        if score is None or isinstance(score, bool | int | float):
            return name if score is None or _is_high(score, item) else None
    if isinstance(item, Mapping):
        scores = [item[name] for name in _SCORE_FIELDS if isinstance(item.get(name), int | float)]
        named = any(isinstance(item.get(name), str) for name in _NAME_FIELDS)
        if named:
            return item if all(_is_high(score, item) for score in scores) else None
    raise UnreadableField(f"a tag is {item!r}, not a name")


def _is_high(score: float, item: Any) -> bool:
    """Raises UnreadableField for numbers that are no scores, such as percentages, counts and ids."""
    if not 0 <= score <= 1:
        raise UnreadableField(f"a tag is {item!r}, of which {score!r} is no score from 0 to 1")
    return score >= LEAST_SCORE


def _is_pair(item: Any) -> bool:
    return isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str)


def structured(value: Any) -> Any:
    """The value, or the list or mapping that its text holds: JSON, or as Python and numpy print it."""
    if not isinstance(value, str) or not (text := value.strip()).startswith(("[", "{", "(")):
        return value
    try:
        return json.loads(text)
    except ValueError:
        pass
    if text[0] + text[-1] in ("[]", "{}", "()"):
        # Lists, sets and tuples of texts: ast would join texts that no comma separates, and sets have no order.
        inside, quoted = text[1:-1], _QUOTED.findall(text)
        if quoted and not _QUOTED.sub("", inside).strip(" ,\n"):
            return [re.sub(r"\\(.)", r"\1", single or double) for single, double in quoted]
    try:
        parsed = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
    return parsed if isinstance(parsed, list | dict) else value


def _looks_structured(text: str) -> bool:
    """True for text that is meant to be a list, but cut off or in another form, such as {1girl,solo}. Faces such as
    (o)_(o) are tags."""
    text = text.strip()
    ends = len(text) > 1 and text[0] + text[-1] in ("[]", "{}")
    return bool(_STRUCTURE.match(text)) or (ends and "," in text)
