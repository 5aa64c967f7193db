"""Checks a caption against the tags of its picture: names, people (people.py), colours of hair and eyes.

A caption is rejected only if the contradiction is certain: a retry costs seconds of a GPU, tags are incomplete, and a
colour or a number has many names.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Final

from captioner.people import contradicts_people, count_people
from captioner.requests import CaptionReason
from captioner.words import QUOTED, WORD, word_set


def contradiction(caption: str, tags: Mapping[str, list[str]]) -> CaptionReason | None:
    """Why the tags contradict the caption, or None. Quoted text is ignored."""
    text = QUOTED.sub(" ", caption)
    if invented_names(text, tags):
        return CaptionReason.NAME
    words = {word for category in ("special", "general") for word in tags.get(category, ())}
    people = count_people(words)
    if people and contradicts_people(text, people):
        return CaptionReason.PEOPLE
    if not people or not people.is_one:  # the tags do not say whose hair and eyes they describe
        return None
    if contradicts_colour(text, words, "hair"):
        return CaptionReason.HAIR
    return CaptionReason.EYES if contradicts_colour(text, words, "eyes") else None


# Words with a capital inside a sentence that are not names of invented characters.
_ORDINARY: Final = word_set(
    # origin, style, religion
    "japanese chinese korean asian european western eastern american british english french german italian spanish "
    "russian indian arabian arabic egyptian greek roman latin celtic norse viking nordic scandinavian persian african "
    "turkish mongolian tibetan thai vietnamese hawaiian mexican native dutch swiss irish scottish moroccan oriental "
    "victorian edwardian georgian renaissance baroque rococo gothic lolita medieval art nouveau deco pop cubist ukiyo "
    "impressionist heian edo meiji taisho showa shinto buddhist christian catholic taoist bohemian parisian venetian "
    # times
    "monday tuesday wednesday thursday friday saturday sunday january february march april may june july august "
    "september october november december christmas halloween easter valentine valentines new year years eve day "
    "tanabata hanami santa claus thanksgiving birthday "
    # places
    "earth moon sun mars venus jupiter saturn mercury milky way north south east west star david eiffel tower torii "
    "japan china korea europe america england france tokyo kyoto osaka paris london rome venice fuji mount mt "
    # things named after somebody
    "ferris rubik rubik's polaroid jack o'lantern lantern dalmatian shiba inu siamese labrador doberman corgi mary "
    "jane janes peter pan prince albert windsor oxford doc martens pomeranian god goddess heaven "
    # writing and others
    "happy merry internet bluetooth braille union jack jolly roger "
    "hiragana katakana kanji hangul cyrillic i i'm tv dj diy led vr usb cd dvd miss mr mrs lady lord sir dr st"
)
_CAPITALISED = re.compile(r"(?<![\w'\u2019])(?=[^\Wa-z\d_])[^\W\d_]{2,}(?:['\u2019][^\W\d_]+)*")
# After these a capital says nothing: a sentence, speech or remark starts.
_NEW_PHRASE = re.compile(r"[.!?:;\u2026\n\u2014(\[\"\u201c\u2018*][\s\"'\u201c\u2018)\]]*$|(?:^|\s)['\u2018]$|^\W*$")


def invented_names(text: str, tags: Mapping[str, list[str]]) -> list[str]:
    """Capitalised words inside sentences that are neither ordinary words nor part of any tag.

    Single words are compared, without accents and long vowels: the tag "souryuu asuka langley" is Asuka Langley Soryu
    in a caption. Words that are all capitals are writing in the picture.
    """
    names = [match.group() for match in _CAPITALISED.finditer(text) if _looks_like_a_name(match, text)]
    known = _name_words(tags) if names else frozenset()
    return [name for name in names if not _is_known(name, known)]


def _looks_like_a_name(match: re.Match[str], text: str) -> bool:
    word = match.group()
    if not word[0].isupper() or word.isupper() or word.lower() in _ORDINARY:
        return False
    return not _NEW_PHRASE.search(text[max(0, match.start() - 8) : match.start()])


def _is_known(word: str, known: frozenset[str]) -> bool:
    plain = _plain(word)
    if plain in known or plain in _ORDINARY or plain.removesuffix("s") in known:
        return True
    return len(plain) >= 4 and any(other.startswith(plain) or other.endswith(plain) for other in known)


def _name_words(tags: Mapping[str, Iterable[str]]) -> frozenset[str]:
    """The normalized words of all tags, and each tag as one word ("dragon ball": Dragonball)."""
    parts = [[_plain(part) for part in WORD.findall(tag)] for words in tags.values() for tag in words]
    return frozenset(word for part in parts for word in (*part, "".join(part)))


def _plain(word: str) -> str:
    """Lower case, without accents, possessive and the spellings of long vowels in romaji."""
    word = word.lower().replace("\u2019", "'").removesuffix("'s").removesuffix("'")
    if not word.isascii():
        word = "".join(c for c in unicodedata.normalize("NFKD", word) if not unicodedata.combining(c))
    return word.replace("ou", "o").replace("oo", "o").replace("uu", "u").replace("oh", "o")


# Colour words of tags and captions, and the colour that each means.
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
# Pairs of colours that people call the same paint by.
_NEAR: Final = {
    frozenset(pair.split("-"))
    for pair in word_set(
        "black-brown black-grey black-blue black-purple brown-red brown-orange brown-yellow yellow-orange yellow-white "
        "yellow-green yellow-grey orange-red orange-pink red-pink red-purple pink-purple pink-white purple-blue "
        "purple-grey blue-aqua blue-grey blue-white aqua-green white-grey"
    )
}
# Tags with which no single colour is right.
_MANY_COLOURED = re.compile(
    r"\b(?:multicolored|two-tone|gradient|streaked|colored inner|split-color|rainbow|colored tips|split color) hair\b"
    r"|\bheterochromia\b|\bmulticolored eyes\b|\bgradient eyes\b|\bcolored (?:sclera|hair)\b|\b(?:dyed|alternate) hair"
)
# Words that may stand between a colour and its noun: "blue, softly flowing hair".
_BETWEEN: Final = word_set(
    ", - long short very medium shoulder waist length wavy flowing straight curly messy spiky fluffy silky shiny thick "
    "braided tied loose large big wide bright round glowing narrow sharp expressive gentle sparkling half closed"
)
_JOINING: Final = word_set(", - / and or to")
_SHADES: Final = word_set("a an also very deep dark light pale bright soft vivid rich dyed mostly")
_NOUNS: Final = {"hair": frozenset({"hair", "haired"}), "eyes": frozenset({"eyes", "eyed"})}
# Nouns after "hair" that the colour belongs to instead.
_ORNAMENTS: Final = word_set(
    "ribbon ribbons ornament ornaments clip clips bow bows band bands flower flowers pin pins tie ties tube tubes "
    "shadow accessory accessories bobble bobbles stick sticks bell bells"
)
_TOKEN = re.compile(r"[a-z]+|[^a-z\s]")


def contradicts_colour(text: str, words: Iterable[str], part: str) -> bool:
    """True if every colour that the caption gives the "hair" or "eyes" is far from all colours in the tags."""
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
            claimed |= _colours_before(tokens[:place]) | _colours_after(tokens[place + 1 :])
    return claimed


def _colours_before(tokens: list[str]) -> set[str]:
    """The colours at the end of the tokens: both of "black-and-white", "blue or green"."""
    colours: set[str] = set()
    for token in reversed(tokens):
        if token in _COLOURS:
            colours.add(_COLOURS[token])
        elif token not in (_JOINING if colours else _BETWEEN):
            break
    return colours


def _colours_after(tokens: list[str]) -> set[str]:
    """The colour at the start of the tokens: "is blue", "are a deep blue"; not "is tied with blue"."""
    if tokens[:1] not in (["is"], ["are"]):
        return set()
    first = next((token for token in tokens[1:] if token not in _SHADES), "")
    return {_COLOURS[first]} if first in _COLOURS else set()


def _is_colour_of(tag: str, part: str) -> bool:
    """True for "light blue hair" and "hair"."""
    before, _, noun = tag.rpartition(" ")
    return noun == part and before.rpartition(" ")[2] in _COLOURS
