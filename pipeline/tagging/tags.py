"""Raw tags -> the words that training text is made of. Pure; the tables below and the files of pipeline/rules are meant
to be edited.

Raw tags have underscores for spaces and one of the categories artist, character, copyright, general, meta. Text parts
have spaces, and special (who is in the picture) taken out of general.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Final, Literal, TypeVar, get_args

T = TypeVar("T")

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

# What becomes of the general tag that a narrower one implies. "add", the default: Danbooru itself puts it on the post,
# so that the models trained on its tags (Kohaku, Animagine, NoobAI) have seen both, and a prompt may use either; rows
# of Pixiv and of old dumps are brought to the same state. "drop" saves text where the narrower one says it all. "keep"
# leaves the tags as they came.
Implied = Literal["add", "drop", "keep"]
IMPLIED: Final[tuple[str, ...]] = get_args(Implied)

_COUNT = re.compile(r"(\d+\+?|multiple )(girl|boy|other)s?")
# How popular a Pixiv work is, and so its quality word: as written there, and as the site translates it.
_POPULARITY = re.compile(r"\d+users入り|\d\+?[ _]?bookmarks", re.IGNORECASE)
# Underscores are part of a face such as ^_^ and >_<.
_LONGEST_FACE = 3
# Tags that a reader knows at a time, some 200 bytes each: Danbooru has a million, most of them met once or twice.
_REMEMBERED = 1 << 18


@dataclass(frozen=True, kw_only=True)
class TagRules:
    """Tags may be written raw or as words. ValueError where aliases or implications go in a circle."""

    excluded: frozenset[str] = EXCLUDED  # leave one out to admit its pictures
    dropped_meta: tuple[str, ...] = DROPPED_META
    special: frozenset[str] = SPECIAL  # as words
    aliases: Mapping[str, str] = field(default_factory=dict)  # old name -> the one that takes its place
    implications: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # tag -> the more general ones it implies
    implied: Implied = "add"
    blacklist: frozenset[str] = frozenset()  # left out of the text; pictures are not

    def __hash__(self) -> int:
        named = frozenset(self.aliases.items()), frozenset(self.implications.items())
        return hash((self.excluded, self.dropped_meta, self.special, self.implied, self.blacklist, named))


class TagReader:
    """Applies the rules, to one post at a time."""

    def __init__(self, rules: TagRules | None = None) -> None:
        self._rules = rules or TagRules()
        self._aliases = {as_words(old): as_words(new) for old, new in self._rules.aliases.items()}
        self._aliases = {old: self._last_name(old) for old in self._aliases}
        self._implications = {
            self._name(tag): tuple(map(self._name, implied)) for tag, implied in self._rules.implications.items()
        }
        self._blacklist = frozenset(map(self._name, self._rules.blacklist))
        excluded = frozenset(map(self._name, self._rules.excluded))
        self._excluded = _Remembered(lambda tag: name if (name := self._name(tag)) in excluded else "")
        self._implied = {tag: tuple(self._all_implied(tag)) for tag in self._implications}
        self._meanings = _Remembered(self._meaning)
        self._meta = _Remembered(lambda tag: self._meaning(tag, self._rules.dropped_meta))
        self._special = _Remembered(lambda words: words in self._rules.special or _COUNT.fullmatch(words) is not None)

    def excluded(self, tag: str) -> str:
        """The tag as words if its pictures are left out, else ""."""
        return self._excluded[tag]

    def meaning(self, category: str, tag: str) -> tuple[str, ...]:
        """The tag as training text has it, then what it implies, directly or not: to be added or dropped as the rules
        say. () for a tag that training text has not."""
        return (self._meta if category == "meta" else self._meanings)[tag]

    @property
    def drops_implied(self) -> bool:
        return self._rules.implied == "drop"

    def is_special(self, words: str) -> bool:
        """Whether a general tag says who is in the picture."""
        return self._special[words]

    def text_parts(self, tags: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Raw tags by category -> words by part: special, character, copyright, artist, general, meta. The order is
        kept, words that come twice in a part are kept once; what a tag implies follows it."""
        parts = {category: self._part(category, tags.get(category, ())) for category in _NAMED}
        general = self._part("general", tags.get("general", ()))
        return {
            "special": [words for words in general if self.is_special(words)],
            **parts,
            "general": [words for words in general if not self.is_special(words)],
            "meta": self._part("meta", tags.get("meta", ())),
        }

    def _part(self, category: str, tags: Sequence[str]) -> list[str]:
        meanings = [self.meaning(category, tag) for tag in tags]
        if self.drops_implied:
            dropped = {implied for meaning in meanings for implied in meaning[1:]}
            meanings = [meaning[:1] for meaning in meanings if not dropped.issuperset(meaning[:1])]
        return list(dict.fromkeys(chain.from_iterable(meanings)))

    def _last_name(self, words: str) -> str:
        """The name at the end of a chain of aliases."""
        seen = [words]
        while words in self._aliases:
            words = self._aliases[words]
            if words in seen:
                raise ValueError(f"aliases go in a circle: {' -> '.join([*seen, words])}")
            seen.append(words)
        return words

    def _name(self, tag: str) -> str:
        """The tag as words, by the name that it goes by now."""
        words = as_words(tag)
        return self._aliases.get(words, words)

    def _meaning(self, tag: str, dropped: tuple[str, ...] = ()) -> tuple[str, ...]:
        words = self._name(tag)
        if not words or is_popularity(tag) or words in self._blacklist or any(word in words for word in dropped):
            return ()
        return (words,) if self._rules.implied == "keep" else (words, *self._implied.get(words, ()))

    def _all_implied(self, tag: str) -> Iterator[str]:
        """Everything that a tag implies in the text, nearest first."""
        found = list(self._implications[tag])
        for words in found:
            if words == tag:
                raise ValueError(f"implications go in a circle: {tag} implies itself")
            found += [further for further in self._implications.get(words, ()) if further not in found]
        return (words for words in found if words not in self._blacklist)


_NAMED = ("character", "copyright", "artist")


@lru_cache(maxsize=2)
def reader_of(rules: TagRules) -> TagReader:
    """A reader that stays from shard to shard, with what it has read."""
    return TagReader(rules)


class _Remembered(dict[str, T]):
    """What a function answered before: a million posts share some ten thousand tags."""

    def __init__(self, function: Callable[[str], T]) -> None:
        self._function = function

    def __missing__(self, tag: str) -> T:
        if len(self) >= _REMEMBERED:
            self.clear()
        self[tag] = answer = self._function(tag)
        return answer


def is_popularity(tag: str) -> bool:
    """Whether a tag says how popular the work is: it would leak the quality word into the text."""
    return _POPULARITY.search(tag) is not None


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


def read_list(text: str) -> list[str]:
    """The entries of a rule file: one a line; empty lines and those that begin with # are skipped."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def read_pairs(text: str) -> dict[str, tuple[str, ...]]:
    """The entries "tag -> tag, tag" of a rule file, each tag with those on the right of all its lines. ValueError, with
    the line, where one has not this form."""
    pairs: dict[str, tuple[str, ...]] = {}
    for entry in read_list(text):
        left, arrow, right = (part.strip() for part in entry.partition("->"))
        names = tuple(name.strip() for name in right.split(","))
        if not (left and arrow and all(names)):
            raise ValueError(f"line {entry!r} is not of the form: tag -> tag")
        pairs[left] = pairs.get(left, ()) + names
    return pairs
