"""Raw tags -> the words of training text. Pure functions; the tables below and the files of pipeline/curation/rules are
meant to be edited.

Raw tags have underscores for spaces and belong to one of the categories artist, character, copyright, general, meta.
Text parts have spaces, and a part `special` (who is in the picture) split off from general.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from typing import Final, Literal, get_args

# Pictures with one of these tags teach nothing about drawing: photographs, edits by third parties, pages of text.
EXCLUDED: Final = frozenset({"cosplay_photo", "third-party_edit", "text-only_page"})

# Meta tags that contain one of these describe the post rather than the picture.
DROPPED_META: Final = (
    "(medium)", "commentary", "bad", "translat", "request", "mismatch", "revision", "audio", "video",
)  # fmt: skip

# The tags that come first in training text, besides counts (1girl, 6+boys, multiple others).
SPECIAL: Final = frozenset({"solo", "solo focus", "male focus", "female focus", "no humans"})

# They separate the parts of a training text in other projects and never occur inside ours.
SEPARATORS: Final = ("|||", "%%", "$$")

# How to treat the general tags that a narrower tag implies. "add", the default, adds those that are missing: Danbooru
# does so itself, so models trained on its tags (Kohaku, Animagine, NoobAI) have seen both; Pixiv and old dumps do not.
# "drop" saves text where the narrower tag says it all. "keep" leaves the tags unchanged.
Implied = Literal["add", "drop", "keep"]
IMPLIED: Final[tuple[str, ...]] = get_args(Implied)

_COUNT = re.compile(r"(\d+\+?|multiple )(girl|boy|other)s?")
# Popularity tags of Pixiv, in the original and as the site translates them.
_POPULARITY = re.compile(r"\d\+?[ _]?(users|bookmarks|ブックマーク|收藏)|(ブックマーク|收藏)\d", re.IGNORECASE)
# Up to this length underscores are part of a face such as ^_^ and >_<.
_LONGEST_FACE = 3
# Cached tags of a reader, some 200 bytes each: Danbooru has a million, most of them on one or two posts.
_CACHED_TAGS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class TagRules:
    """Tags may be written raw or as words."""

    excluded: frozenset[str] = EXCLUDED  # remove one to admit its pictures
    dropped_meta: tuple[str, ...] = DROPPED_META
    special: frozenset[str] = SPECIAL  # as words
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)  # old name -> new name
    implications: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)  # tag -> more general tags
    implied: Implied = "add"
    blacklist: frozenset[str] = frozenset()  # removed from the text; the pictures are kept


class TagReader:
    """Applies TagRules. Answers are cached: a million posts share some ten thousand tags. Raises ValueError if aliases
    or implications form a cycle."""

    def __init__(self, rules: TagRules | None = None) -> None:
        self._rules = rules or TagRules()
        self._aliases = {as_words(old): as_words(new) for old, new in self._rules.aliases.items()}
        self._aliases = {old: self._last_name(old) for old in self._aliases}
        self._implications = {
            self.name(tag): tuple(map(self.name, implied)) for tag, implied in self._rules.implications.items()
        }
        self._blacklist = frozenset(map(self.name, self._rules.blacklist))
        self._excluded = frozenset(map(self.name, self._rules.excluded))
        self._implied = {tag: tuple(self._all_implied(tag)) for tag in self._implications}
        cached = lru_cache(_CACHED_TAGS)
        self.excluded = cached(self._find_excluded)
        self.is_special = cached(self._find_special)
        self._meaning = cached(self._find_meaning)

    def _find_excluded(self, tag: str) -> str:
        """The tag as words if its pictures are excluded, else ""."""
        return name if (name := self.name(tag)) in self._excluded else ""

    def _find_special(self, words: str) -> bool:
        """True if a general tag says who is in the picture."""
        return words in self._rules.special or _COUNT.fullmatch(words) is not None

    def name(self, tag: str) -> str:
        """The current name of a tag, as words."""
        words = as_words(tag)
        return self._aliases.get(words, words)

    def meaning(self, category: str, tag: str) -> tuple[str, ...]:
        """The tag as words, then everything that it implies, to be added or dropped as the rules say. () for a tag that
        training text omits."""
        return self._meaning(tag, category == "meta")

    @property
    def drops_implied(self) -> bool:
        return self._rules.implied == "drop"

    def text_parts(self, tags: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Raw tags by category -> words by part: special, character, copyright, artist, general, meta. Keeps the order
        and removes repeated words; the words that a tag implies follow it."""
        parts = {
            category: self._part(category, tags.get(category, ()))
            for category in ("character", "copyright", "artist", "general", "meta")
        }
        special = [words for words in parts["general"] if self.is_special(words)]
        parts["general"] = [words for words in parts["general"] if not self.is_special(words)]
        return {"special": special, **parts}

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

    def _find_meaning(self, tag: str, is_meta: bool) -> tuple[str, ...]:
        words = self.name(tag)
        if not words or is_popularity_tag(tag) or words in self._blacklist:
            return ()
        if is_meta and any(part in words for part in self._rules.dropped_meta):
            return ()
        return (words,) if self._rules.implied == "keep" else (words, *self._implied.get(words, ()))

    def _all_implied(self, tag: str) -> Iterator[str]:
        """Everything that a tag implies, directly or indirectly, nearest first, without blacklisted words."""
        found = list(self._implications[tag])
        for words in found:
            if words == tag:
                raise ValueError(f"implications go in a circle: {tag} implies itself")
            found += [further for further in self._implications.get(words, ()) if further not in found]
        return (words for words in found if words not in self._blacklist)


@lru_cache(maxsize=2)
def cached_reader(rules: TagRules) -> TagReader:
    """A reader that keeps its cache from shard to shard."""
    return TagReader(rules)


def is_popularity_tag(tag: str) -> bool:
    """True if a tag states how popular the work is, which would leak the quality word into the text."""
    return _POPULARITY.search(tag) is not None


def as_words(tag: str) -> str:
    """The tag as the model reads it: underscores, except in faces, become spaces; removes separators and commas, which
    separate tags in training text."""
    if len(tag) > _LONGEST_FACE:
        tag = tag.replace("_", " ")
    return remove_separators(tag.replace(",", " "))


def remove_separators(text: str) -> str:
    """Replaces separators by spaces and joins runs of white space."""
    for separator in SEPARATORS:
        text = text.replace(separator, " ")
    return " ".join(text.split())


def read_list(text: str) -> list[str]:
    """The entries of a rule file, one per line, without empty lines and those that begin with #."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def read_pairs(text: str) -> dict[str, tuple[str, ...]]:
    """The entries "tag -> tag, tag" of a rule file: each left tag with the right ones of all its lines. Raises
    ValueError, naming the line, for any other form."""
    pairs: dict[str, tuple[str, ...]] = {}
    for entry in read_list(text):
        left, arrow, right = (part.strip() for part in entry.partition("->"))
        names = tuple(name.strip() for name in right.split(","))
        if not (left and arrow and all(names)):
            raise ValueError(f"line {entry!r} is not of the form: tag -> tag")
        pairs[left] = pairs.get(left, ()) + names
    return pairs
