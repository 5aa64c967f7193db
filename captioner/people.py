"""Compares the number of girls and boys in a caption with the tags."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from captioner.words import word_set

_UNLIMITED: Final = 1_000  # "multiple girls": two or more
_COUNT_TAG = re.compile(r"(\d+|multiple )\+?(girl|boy|other)s?")
# Tags with which one girl may be drawn many times, or not look like a girl.
_UNCOUNTABLE: Final = frozenset(
    {
        *("multiple views", "comic", "4koma", "reflection", "mirror", "clone", "multiple persona", "dual persona"),
        *("crossdressing", "otoko no ko", "androgynous", "ambiguous gender", "genderswap", "tomboy", "reverse trap"),
        *("crowd", "people", "silhouette", "doll", "statue", "poster (object)", "photo (object)", "age progression"),
        *("genderswap (mtf)", "genderswap (ftm)", "bishounen", "futanari", "cosplay", "selfcest", "aged down", "chibi"),
        *("chibi inset", "picture frame", "painting (object)", "holding photo", "variations", "character sheet"),
    }
)


@dataclass(frozen=True)
class People:
    """How many people the tags count, as (minimum, maximum)."""

    girls: tuple[int, int]
    boys: tuple[int, int]
    others: tuple[int, int]

    @property
    def is_one(self) -> bool:
        """True if exactly one person is counted."""
        lows, highs = zip(self.girls, self.boys, self.others, strict=True)
        return sum(lows) == sum(highs) == 1


def count_people(words: Iterable[str]) -> People | None:
    """People by the tags that count them: "1girl", "2boys", "6+girls", "multiple girls", "no humans". None if no tag
    counts, or another one makes the count unreliable."""
    words = set(words)
    if words & _UNCOUNTABLE:
        return None
    if "no humans" in words:
        return People((0, 0), (0, 0), (0, 0))
    counts: dict[str, tuple[int, int]] = {}
    for word in words:
        if tag := _COUNT_TAG.fullmatch(word):
            low = 2 if tag[1] == "multiple " else int(tag[1])
            high = _UNLIMITED if tag[1] == "multiple " or "+" in word else low
            before = counts.get(tag[2], (0, _UNLIMITED))
            counts[tag[2]] = (max(low, before[0]), min(high, before[1]))
    return People(*(counts.get(kind, (0, 0)) for kind in ("girl", "boy", "other"))) if counts else None


_PERSONS: Final = {
    **dict.fromkeys(("girl", "girls", "woman", "women", "schoolgirl", "schoolgirls"), "girl"),
    **dict.fromkeys(("boy", "boys", "man", "men", "gentleman", "gentlemen", "schoolboy", "schoolboys"), "boy"),
}
_NUMBERS: Final = {
    number: value
    for value, numbers in {
        1: "a an one", 2: "two both pair couple few group several multiple", 3: "three trio", 4: "four", 5: "five",
        6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten", 12: "dozen",
    }.items()
    for number in numbers.split()
}  # fmt: skip
_GROUPS: Final = word_set("pair couple group trio")  # "of girls"
# Between a number and a person, these show that the number counts something else: "a sign to the girl", "a snow man".
_NO_ADJECTIVES: Final = word_set(
    "the of and with in on at by to that who his her their its . ; : ( ) gingerbread snow stick toy stone plush paper"
)
_MAX_ADJECTIVES = 5  # tokens, including commas
# Nouns after the person that make it a thing.
_THINGS: Final = word_set("uniform outfit costume statue figurine doll mannequin poster band scout")
# Nouns before the number that show a likeness: "the statue of a girl".
_DRAWN: Final = word_set(
    "statue statues poster posters picture pictures photo photos photograph painting paintings silhouette drawing doll "
    "dolls figurine reflection shadow mural print emblem shape outline"
)
_LIKENESS: Final = word_set("like as resembling depicting for")
_PERSON_TOKEN = re.compile(r"[a-z\d]+(?:[-'\u2019][a-z\d]+)*|[^a-z\d\s]")  # "16-year-old", "3d" are one
# Words that announce more people than were counted so far.
_MORE = re.compile(
    r"\b(?:another|others?|third|fourth|fifth|sixth|second|rest|remaining|more|companions?|friends?|crowd|each|"
    r"background|figures?|characters?|people|rows?|everyone)\b",
    re.IGNORECASE,
)
_LONE = re.compile(r"\b(?:one|a)\s+(?:lone|single|solitary)\s+(?:girl|woman|boy|man|figure)\b", re.IGNORECASE)


def contradicts_people(text: str, people: People) -> bool:
    """True if the caption counts other girls and boys than the tags.

    A smaller number may be a part of them. A kind of person that the tags do not have may be on a poster: only the
    first person in the caption is taken to be in the picture.
    """
    described = described_people(text)
    if not described or people.others[1] > 0:
        return False
    nobody = (0, 0)
    counts = {"girl": people.girls, "boy": people.boys}
    if counts[described[0][0]] == nobody:
        return True
    if max(people.girls[0], people.boys[0]) >= 2 and _LONE.search(text) and not _MORE.search(text):
        return True
    return any(
        _is_miscounted([number for other, number in described if other == kind], count, text)
        for kind, count in counts.items()
        if count != nobody
    )


def described_people(text: str) -> list[tuple[str, int]]:
    """Kind ("girl" or "boy") and number of each "young, silver-haired girl", "two smiling women", "a trio of girls" in
    the text. "The statue of a girl", "a girl's hat" and "two cats and girls" do not count."""
    tokens = _PERSON_TOKEN.findall(text.lower())
    found = (
        (_PERSONS[token], _number_before(tokens, place))
        for place, token in enumerate(tokens)
        if token in _PERSONS and not _THINGS.intersection(tokens[place + 1 : place + 2])
    )
    return [(kind, number) for kind, number in found if number is not None]


def _number_before(tokens: list[str], person: int) -> int | None:
    """The number that counts the person at this index; None without one, or if the person is only a likeness."""
    for place in range(person - 1, max(-1, person - 2 - _MAX_ADJECTIVES), -1):
        token = tokens[place]
        if token in _NUMBERS or token.isdecimal():
            if _is_likeness(tokens[:place]):
                return None
            return int(token) if token.isdecimal() else _NUMBERS[token]
        if token == "of" and place and tokens[place - 1] in _GROUPS:
            continue
        if token in _NO_ADJECTIVES or (token.endswith("s") and not token.endswith(("ss", "us"))):
            return None
    return None


def _is_likeness(before: list[str]) -> bool:
    """True if the tokens end with "statue of" or "like"."""
    if before[-1:] == ["of"]:
        return bool(_DRAWN.intersection(before[-2:-1]))
    return bool(_LIKENESS.intersection(before[-1:]))


def _is_miscounted(numbers: list[int], counted: tuple[int, int], text: str) -> bool:
    low, high = counted
    most = max(numbers, default=0)
    return most > high or (most >= 2 and sum(numbers) < low and not _MORE.search(text))
