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
_QUOTED: Final = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")
_ENTITY: Final = re.compile(r"&(#\d+|#[xX][0-9a-fA-F]+|[a-zA-Z]+);")
_ESCAPED: Final = re.compile(r"\\([()\[\]])")  # as prompts for Stable Diffusion write parentheses


def by_category(value: Any) -> dict[str, Any] | None:
    """Tag lists by category, from a struct, a map or JSON of such; None if the value has another form."""
    value = _structured(value)
    if isinstance(value, list) and value and all(_is_pair(item) for item in value):
        value = dict(value)  # a map, as Arrow gives it
    if isinstance(value, Mapping) and value.keys() & set(TAG_CATEGORIES):
        unknown = [name for name in value.keys() - set(TAG_CATEGORIES) if not is_missing(value[name]) and value[name]]
        if unknown:
            raise UnreadableField(f"tags have the unknown categories {sorted(unknown)}")
        return {name: value.get(name) for name in TAG_CATEGORIES}
    return None


def tag_items(value: Any, commas: bool = False) -> list[Any]:
    """The tags of a value: text, or mappings with a name and more.

    Text is separated by commas if `commas`, else by white space; text that holds a list in JSON, or as Python prints
    it, is that list. Tags with a score below LEAST_SCORE are left out. Raises UnreadableField for any other form, such
    as numbers.
    """
    value = _structured(value)
    if is_missing(value):
        return []
    if isinstance(value, str):
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
    name = _ENTITY.sub(lambda found: html.unescape(found[0]), str(item))
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
            return name if score is None or score >= LEAST_SCORE else None
    if isinstance(item, Mapping):
        scores = [item[name] for name in _SCORE_FIELDS if isinstance(item.get(name), int | float)]
        named = any(isinstance(item.get(name), str) for name in _NAME_FIELDS)
        if named:
            return item if all(score >= LEAST_SCORE for score in scores) else None
    raise UnreadableField(f"a tag is {item!r}, not a name")


def _is_pair(item: Any) -> bool:
    return isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str)


def _structured(value: Any) -> Any:
    """The value, or the list or mapping that its text holds."""
    if not isinstance(value, str) or not (text := value.strip()).startswith(("[", "{")):
        return value
    try:
        return json.loads(text)
    except ValueError:
        pass
    if text.startswith("[") and text.endswith("]"):
        # Python's and numpy's lists of texts: ast would join texts that no comma separates.
        inside, quoted = text[1:-1], _QUOTED.findall(text)
        if quoted and not _QUOTED.sub("", inside).strip(" ,\n"):
            return [re.sub(r"\\(.)", r"\1", single or double) for single, double in quoted]
    try:
        parsed = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
    return parsed if isinstance(parsed, list | dict | tuple) else value
