"""A caption against the tags of its picture: names, people, colours of hair and eyes. Pure.

A detector speaks up only where it is sure: a retry costs seconds of a GPU, tags lack things too, and a colour or a
number has many names.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from captioner.requests import Reason
from captioner.words import QUOTED, WORD, word_set


def contradiction(caption: str, tags: Mapping[str, list[str]]) -> Reason | None:
    """What the caption says that the tags deny."""
    spoken = QUOTED.sub(" ", caption)
    if invented_names(spoken, tags):
        return Reason.NAME
    words = {word for category in ("special", "general") for word in tags.get(category, ())}
    people = people_of(words)
    if denies_people(spoken, people):
        return Reason.PEOPLE
    if people.total != 1:  # whose hair and eyes the tags speak of is not known
        return None
    if denies_colour(spoken, words, "hair"):
        return Reason.HAIR
    return Reason.EYES if denies_colour(spoken, words, "eyes") else None


# Written with a capital inside a sentence, and no name that a model makes up.
_ORDINARY: Final = word_set(
    # where from, which style, which faith
    "japanese chinese korean asian european western eastern american british english french german italian spanish "
    "russian indian arabian arabic egyptian greek roman latin celtic norse viking nordic scandinavian persian african "
    "turkish mongolian tibetan thai vietnamese hawaiian mexican native dutch swiss irish scottish moroccan oriental "
    "victorian edwardian georgian renaissance baroque rococo gothic lolita medieval art nouveau deco pop cubist ukiyo "
    "impressionist heian edo meiji taisho showa shinto buddhist christian catholic taoist bohemian parisian venetian "
    # when
    "monday tuesday wednesday thursday friday saturday sunday january february march april may june july august "
    "september october november december christmas halloween easter valentine valentines new year years eve day "
    "tanabata hanami santa claus thanksgiving birthday "
    # where
    "earth moon sun mars venus jupiter saturn mercury milky way north south east west star david eiffel tower torii "
    "japan china korea europe america england france tokyo kyoto osaka paris london rome venice fuji mount mt "
    # things that are called after someone
    "ferris rubik rubik's polaroid jack o'lantern lantern dalmatian shiba inu siamese labrador doberman corgi mary "
    "jane janes peter pan prince albert windsor oxford doc martens pomeranian god goddess heaven "
    # writing and the rest
    "happy merry internet bluetooth braille union jack jolly roger "
    "hiragana katakana kanji hangul cyrillic i i'm tv dj diy led vr usb cd dvd miss mr mrs lady lord sir dr st"
)
_CAPITALISED = re.compile(r"(?<![\w'\u2019])(?=[^\Wa-z\d_])[^\W\d_]{2,}(?:['\u2019][^\W\d_]+)*")
# Behind these a capital says nothing: a sentence starts, or a speech, or a remark.
_STARTS_ANEW = re.compile(r"[.!?:;\u2026\n\u2014(\[\"\u201c\u2018*][\s\"'\u201c\u2018)\]]*$|(?:^|\s)['\u2018]$|^\W*$")


def invented_names(text: str, tags: Mapping[str, list[str]]) -> list[str]:
    """Capitalised words inside sentences that are in no tag of any category and no ordinary ones.

    Words, not whole names, are compared, without accents and long vowels: tags say "souryuu asuka langley" of her whom
    a caption calls Asuka Langley Soryu. Words in capitals alone are writing in the picture.
    """
    suspects = [found for found in _CAPITALISED.finditer(text) if _looks_like_a_name(found, text)]
    if not suspects:
        return []
    known = _name_words(tags)
    return [found.group() for found in suspects if not _is_known(found.group(), known)]


def _looks_like_a_name(found: re.Match[str], text: str) -> bool:
    word = found.group()
    if not word[0].isupper() or word.isupper() or word.lower() in _ORDINARY:
        return False
    return not _STARTS_ANEW.search(text[max(0, found.start() - 8) : found.start()] if found.start() else "")


def _is_known(word: str, known: frozenset[str]) -> bool:
    plain = _plain(word)
    if plain in known or plain in _ORDINARY or plain.removesuffix("s") in known:
        return True
    return len(plain) >= 4 and any(other.startswith(plain) or other.endswith(plain) for other in known)


def _name_words(tags: Mapping[str, Iterable[str]]) -> frozenset[str]:
    """The words of all tags as names are compared, and each tag as one word ("dragon ball", Dragonball)."""
    parts = [[_plain(part) for part in WORD.findall(tag)] for words in tags.values() for tag in words]
    return frozenset(word for part in parts for word in (*part, "".join(part)))


def _plain(word: str) -> str:
    """Lower case, without accents, possessive and the ways of writing a long vowel in romaji."""
    word = word.lower().replace("\u2019", "'").removesuffix("'s").removesuffix("'")
    if not word.isascii():
        word = "".join(c for c in unicodedata.normalize("NFKD", word) if not unicodedata.combining(c))
    return word.replace("ou", "o").replace("oo", "o").replace("uu", "u").replace("oh", "o")


_SEVERAL: Final = 1_000  # "multiple girls": two or more
_COUNT_TAG = re.compile(r"(\d+|multiple )\+?(girl|boy|other)s?")
# With these, one girl may be drawn many times, or not look like one.
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
    """How many girls and boys the tags count: (fewest, most), None where the tags do not count at all."""

    girls: tuple[int, int] | None = None
    boys: tuple[int, int] | None = None
    others: tuple[int, int] | None = None

    @property
    def total(self) -> int | None:
        """Of all, where it is exact."""
        counts = [count for count in (self.girls, self.boys, self.others) if count is not None]
        is_exact = bool(counts) and all(low == high for low, high in counts)
        return sum(low for low, _ in counts) if is_exact else None


def people_of(words: Iterable[str]) -> People:
    """The people that special tags count: "1girl", "2boys", "6+girls", "multiple girls", "no humans"."""
    words = set(words)
    if words & _UNCOUNTABLE:
        return People()
    if "no humans" in words:
        return People((0, 0), (0, 0), (0, 0))
    counts: dict[str, tuple[int, int]] = {}
    for word in words:
        if tag := _COUNT_TAG.fullmatch(word):
            low = 2 if tag[1] == "multiple " else int(tag[1])
            high = _SEVERAL if tag[1] == "multiple " or "+" in word else low
            before = counts.get(tag[2], (0, _SEVERAL))
            counts[tag[2]] = (max(low, before[0]), min(high, before[1]))
    if not counts:
        return People()
    return People(*(counts.get(kind, (0, 0)) for kind in ("girl", "boy", "other")))


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
# Between a number and a person these make the number another's: "a sign to the girl", "a snow man".
_NO_ADJECTIVES: Final = word_set(
    "the of and with in on at by to that who his her their its . ; : ( ) gingerbread snow stick toy stone plush paper"
)
_MOST_ADJECTIVES = 5  # tokens, commas among them
# Behind the word for a person: it is a thing.
_THINGS: Final = word_set("uniform outfit costume statue figurine doll mannequin poster band scout")
# Before the number: the person is not there.
_DRAWN: Final = word_set(
    "statue statues poster posters picture pictures photo photos photograph painting paintings silhouette drawing doll "
    "dolls figurine reflection shadow mural print emblem shape outline"
)
_LIKENESS: Final = word_set("like as resembling depicting for")
_PERSON_TOKEN = re.compile(r"[a-z\d]+(?:[-'\u2019][a-z\d]+)*|[^a-z\d\s]")  # "16-year-old", "3d" are one
# There are more than were counted so far.
_MORE = re.compile(
    r"\b(?:another|others?|third|fourth|fifth|sixth|second|rest|remaining|more|companions?|friends?|crowd|each|"
    r"background|figures?|characters?|people|rows?|everyone)\b",
    re.IGNORECASE,
)
_LONE = re.compile(r"\b(?:one|a)\s+(?:lone|single|solitary)\s+(?:girl|woman|boy|man|figure)\b", re.IGNORECASE)


def denies_people(text: str, people: People) -> bool:
    """Whether the caption counts other girls and boys than the tags.

    Fewer may be a part of them. One of a kind that the tags do not have may be on a poster: only the person that the
    caption starts with is believed to be in the picture.
    """
    if people.girls is None or people.boys is None or people.others is None:
        return False
    spoken = spoken_people(text)
    if not spoken or people.others[1] > 0:
        return False
    nobody = (0, 0)
    counted = {"girl": people.girls, "boy": people.boys}
    if counted[spoken[0][0]] == nobody:
        return True
    if max(people.girls[0], people.boys[0]) >= 2 and _LONE.search(text) and not _MORE.search(text):
        return True
    return any(
        _is_miscounted([number for spoken_kind, number in spoken if spoken_kind == kind], count, text)
        for kind, count in counted.items()
        if count != nobody
    )


def spoken_people(text: str) -> list[tuple[str, int]]:
    """Kind ("girl", "boy") and number of "a young, silver-haired girl", "two smiling women", "a trio of girls"; nothing
    of "the statue of a girl", "a girl's hat", "two cats and girls"."""
    tokens = _PERSON_TOKEN.findall(text.lower())
    found = (
        (_PERSONS[token], _number_before(tokens, place))
        for place, token in enumerate(tokens)
        if token in _PERSONS and not _THINGS.intersection(tokens[place + 1 : place + 2])
    )
    return [(kind, number) for kind, number in found if number is not None]


def _number_before(tokens: list[str], person: int) -> int | None:
    """The number that belongs to the person at this place, if one does and the person is more than a likeness."""
    for place in range(person - 1, max(-1, person - 2 - _MOST_ADJECTIVES), -1):
        token = tokens[place]
        if token in _NUMBERS or token.isdecimal():
            return None if _is_likeness(tokens[:place]) else _number(token)
        if token == "of" and place and tokens[place - 1] in _GROUPS:
            continue
        if token in _NO_ADJECTIVES or (token.endswith("s") and not token.endswith(("ss", "us"))):
            return None
    return None


def _is_likeness(before: list[str]) -> bool:
    """Whether "the statue of" or "like" comes before."""
    if before[-1:] == ["of"]:
        return bool(_DRAWN.intersection(before[-2:-1]))
    return bool(_LIKENESS.intersection(before[-1:]))


def _is_miscounted(numbers: list[int], counted: tuple[int, int], text: str) -> bool:
    low, high = counted
    most = max(numbers, default=0)
    return most > high or (most >= 2 and sum(numbers) < low and not _MORE.search(text))


def _number(word: str) -> int:
    return int(word) if word.isdecimal() else _NUMBERS[word.lower()]


# Colour words as tags and captions use them.
_COLOURS: Final = {
    word: colour
    for colour, words in {
        "black": "black raven ebony",
        "brown": "brown brunette chestnut hazel",
        "yellow": "blonde blond yellow gold golden amber",
        "orange": "orange ginger",
        "red": "red crimson scarlet ruby",
        "pink": "pink magenta",
        "purple": "purple violet lavender indigo",
        "blue": "blue azure navy sapphire",
        "aqua": "aqua teal turquoise cyan",
        "green": "green emerald mint",
        "white": "white",
        "grey": "grey gray silver platinum",
    }.items()
    for word in words.split()
}
# Colours that people see in the same paint.
_NEAR: Final = {
    frozenset(pair.split("-"))
    for pair in word_set(
        "black-brown black-grey black-blue black-purple brown-red brown-orange brown-yellow yellow-orange yellow-white "
        "yellow-green yellow-grey orange-red orange-pink red-pink red-purple pink-purple pink-white purple-blue "
        "purple-grey blue-aqua blue-grey blue-white aqua-green white-grey"
    )
}
# Of these, no single colour is true.
_MANY_COLOURED = re.compile(
    r"\b(?:multicolored|two-tone|gradient|streaked|colored inner|split-color|rainbow|colored tips|split color) hair\b"
    r"|\bheterochromia\b|\bmulticolored eyes\b|\bgradient eyes\b|\bcolored (?:sclera|hair)\b|\b(?:dyed|alternate) hair"
)
# Words that may stand between a colour and what has it: "blue, softly flowing hair".
_BETWEEN: Final = word_set(
    ", - long short very medium shoulder waist length wavy flowing straight curly messy spiky fluffy silky shiny thick "
    "braided tied loose large big wide bright round glowing narrow sharp expressive gentle sparkling half closed"
)
_JOINING: Final = word_set(", - / and or to")
_SHADES: Final = word_set("a an also very deep dark light pale bright soft vivid rich dyed mostly")
_NOUNS: Final = {"hair": frozenset({"hair", "haired"}), "eyes": frozenset({"eyes", "eyed"})}
# Behind the noun: the colour is theirs.
_ORNAMENTS: Final = word_set(
    "ribbon ribbons ornament ornaments clip clips bow bows band bands flower flowers pin pins tie ties tube tubes "
    "shadow accessory accessories bobble bobbles stick sticks bell bells"
)
_TOKEN = re.compile(r"[a-z]+|[^a-z\s]")


def denies_colour(text: str, words: Iterable[str], part: str) -> bool:
    """Whether every colour that the caption gives the "hair" or "eyes" is far from every one that the tags give."""
    words = list(words)
    tagged = {_COLOURS[word.split()[-2]] for word in words if _is_colour_of(word, part)}
    if not tagged or any(_MANY_COLOURED.search(word) for word in words):
        return False
    claimed = claimed_colours(text, part)
    return bool(claimed) and not any(a == b or frozenset((a, b)) in _NEAR for a in claimed for b in tagged)


def claimed_colours(text: str, part: str) -> set[str]:
    """Colours in "long, blue hair", "silver-haired", "hair is a deep red"; not in "blue hair ribbon"."""
    tokens = _TOKEN.findall(text.lower())
    claimed = set()
    for place, token in enumerate(tokens):
        if token in _NOUNS[part] and not _ORNAMENTS.intersection(tokens[place + 1 : place + 2]):
            claimed |= {*_before(tokens[:place]), *_behind(tokens[place + 1 :])}
    return claimed


def _before(tokens: list[str]) -> set[str]:
    """The colours that the end of these tokens gives: both of "black-and-white", "blue or green"."""
    colours: set[str] = set()
    for token in reversed(tokens):
        if token in _COLOURS:
            colours.add(_COLOURS[token])
        elif token not in (_JOINING if colours else _BETWEEN):
            break
    return colours


def _behind(tokens: list[str]) -> set[str]:
    """The colour that the start of these tokens gives: "is blue", "are a deep blue"; not "is tied with blue"."""
    if tokens[:1] not in (["is"], ["are"]):
        return set()
    first = next((token for token in tokens[1:] if token not in _SHADES), "")
    return {_COLOURS[first]} if first in _COLOURS else set()


def _is_colour_of(tag: str, part: str) -> bool:
    """ "light blue hair" is a colour of hair."""
    before, _, noun = tag.rpartition(" ")
    return noun == part and before.rpartition(" ")[2] in _COLOURS
