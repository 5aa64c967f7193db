"""Raw tags -> the words that training text is made of. Pure; the tables below are meant to be edited.

Raw tags have underscores for spaces and one of the categories artist, character, copyright, general, meta. Text parts
have spaces, and special (who is in the picture) taken out of general.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

# A picture with one of these teaches nothing about drawing: a photograph, another's retouching, a page of text.
EXCLUDED: Final = frozenset({"cosplay_photo", "third-party_edit", "text-only_page"})

# Meta tags that contain one of these speak of the post, not of the picture.
DROPPED_META: Final = (
    "(medium)", "commentary", "bad", "translat", "request", "mismatch", "revision", "audio", "video",
)  # fmt: skip

# The tags that come first in training text, besides the counts (1girl, 6+boys, multiple others).
SPECIAL: Final = frozenset({"solo", "solo focus", "male focus", "female focus", "no humans"})

# They separate the parts of a training text elsewhere, and never occur inside ours.
SEPARATORS: Final = ("|||", "%%", "$$")

_COUNT = re.compile(r"(\d+\+?|multiple )(girl|boy|other)s?")
# How popular a Pixiv work is, and so its quality word: as written there, and as the site translates it.
_POPULARITY = re.compile(r"\d+users入り|\d\+? ?bookmarks", re.IGNORECASE)
# Underscores are part of a face such as ^_^ and >_<.
_LONGEST_FACE = 3


@dataclass(frozen=True, kw_only=True)
class TagRules:
    excluded: frozenset[str] = EXCLUDED  # raw tags; leave one out to admit its pictures
    dropped_meta: tuple[str, ...] = DROPPED_META
    special: frozenset[str] = SPECIAL  # as words


class TagReader:
    """Applies the rules, to one post at a time."""

    def __init__(self, rules: TagRules | None = None) -> None:
        self._rules = rules or TagRules()
        excluded = frozenset(map(as_words, self._rules.excluded))
        self._excluded = _Remembered(lambda tag: words if (words := as_words(tag)) in excluded else "")
        self._names = _Remembered(kept_words)
        self._meta = _Remembered(lambda tag: kept_words(tag, self._rules.dropped_meta))
        self._general = _Remembered(self._kept_general)
        self._special: set[str] = set()  # those met so far

    def exclusion(self, tags: Iterable[str]) -> str | None:
        """The first tag for which the picture is left out, as words; None where there is none."""
        return next(filter(None, map(self._excluded.__getitem__, tags)), None)

    def text_parts(self, tags: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Raw tags by category -> words by part: special, character, copyright, artist, general, meta. The order is
        kept, words that come twice in a part are kept once."""
        general = _distinct(self._general, tags.get("general", ()))
        return {
            "special": [words for words in general if words in self._special],
            **{part: _distinct(self._names, tags.get(part, ())) for part in ("character", "copyright", "artist")},
            "general": [words for words in general if words not in self._special],
            "meta": _distinct(self._meta, tags.get("meta", ())),
        }

    def _kept_general(self, tag: str) -> str:
        words = kept_words(tag)
        if is_special(words, self._rules.special):
            self._special.add(words)
        return words


class _Remembered(dict[str, str]):
    """What a function answered before: a million posts share some ten thousand tags."""

    def __init__(self, function: Callable[[str], str]) -> None:
        self._function = function

    def __missing__(self, tag: str) -> str:
        self[tag] = self._function(tag)
        return self[tag]


def _distinct(remembered: _Remembered, tags: Sequence[str]) -> list[str]:
    """The words of these tags, without those that have none."""
    return list(dict.fromkeys(filter(None, map(remembered.__getitem__, tags))))


def kept_words(tag: str, dropped: tuple[str, ...] = ()) -> str:
    """The tag as words; "" for one that says how popular the post is or that contains a dropped word."""
    words = as_words(tag)
    return "" if _POPULARITY.search(words) or any(word in words for word in dropped) else words


def as_words(tag: str) -> str:
    """The tag as the model reads it: spaces for underscores, but for faces; no comma, which separates tags in training
    text; no separator."""
    if len(tag) > _LONGEST_FACE:
        tag = tag.replace("_", " ")
    return without_separators(tag.replace(",", " "))


def without_separators(text: str) -> str:
    """Separators become spaces, runs of white space one space."""
    for separator in SEPARATORS:
        text = text.replace(separator, " ")
    return " ".join(text.split())


def is_special(words: str, special: frozenset[str] = SPECIAL) -> bool:
    """Whether a general tag says who is in the picture."""
    return words in special or _COUNT.fullmatch(words) is not None
