"""Raw tags -> the words that training text is made of. Pure; the tables below are meant to be edited.

Raw tags have underscores for spaces and one of the categories artist, character, copyright, general, meta. Text parts
have spaces, and special (who is in the picture) taken out of general.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
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
_POPULARITY = re.compile(r"\d+users入り|[\d,]*\d\+? ?bookmarks", re.IGNORECASE)
# Underscores are part of a face such as ^_^ and >_<.
_LONGEST_FACE = 3


@dataclass(frozen=True, kw_only=True)
class TagRules:
    excluded: frozenset[str] = EXCLUDED  # raw tags; leave one out to admit its pictures
    dropped_meta: tuple[str, ...] = DROPPED_META
    special: frozenset[str] = SPECIAL  # as words


class TagReader:
    """Applies the rules; remembers every tag it has met, since a million pictures share some ten thousand tags."""

    def __init__(self, rules: TagRules | None = None) -> None:
        self._rules = rules or TagRules()
        self._excluded = {as_words(tag) for tag in self._rules.excluded}
        self._known: dict[str, dict[str, tuple[str, str] | None]] = {}

    def exclusion(self, tags: Iterable[str]) -> str | None:
        """The first tag for which the picture is left out, as words; None where there is none."""
        return next((words for words in map(as_words, tags) if words in self._excluded), None)

    def text_parts(self, tags: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Raw tags by category -> words by part: special, character, copyright, artist, general, meta. The order is
        kept, a word that comes twice in a part is kept once."""
        parts: dict[str, dict[str, None]] = {
            part: {} for part in ("special", "character", "copyright", "artist", "general", "meta")
        }
        for category, names in tags.items():
            known = self._known.setdefault(category, {})
            for name in names:
                if name not in known:
                    known[name] = self._place(name, category)
                placed = known[name]
                if placed is not None:
                    part, words = placed
                    parts[part][words] = None
        return {part: list(words) for part, words in parts.items()}

    def _place(self, name: str, category: str) -> tuple[str, str] | None:
        """The part that a tag belongs to and its words, None for a tag that is dropped."""
        words = as_words(name)
        if not words or _POPULARITY.search(words):
            return None
        if category == "meta" and any(dropped in words for dropped in self._rules.dropped_meta):
            return None
        if category == "general" and is_special(words, self._rules.special):
            return "special", words
        return category, words


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
