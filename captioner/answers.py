"""A model's text -> a caption, or the reason for having none. Pure.

The order, each step seeing what the one before it left:
    empty, token leakage, control characters, refusal           nothing of the text is of use
    wrong language                                              before anything that reads English
    preamble, opener, separators, markup                        mended and noted
    repetition loop                                             before truncation, in which most loops end
    truncation                                                  mended by cutting to the last whole sentence, or refused
    too short, too long
    invented name, people, hair colour, eye colour              against the tags
The same caption for many images shows only over a shard: RepeatedCaptions.
"""

import re
import unicodedata
import zlib
from dataclasses import dataclass
from typing import Final

from captioner.grounding import contradiction
from captioner.requests import Answer, Note, Reason, Request
from captioner.words import QUOTED, WORD, word_set


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much text is a caption."""

    fewest_words: int = 6
    most_words: int = 220  # 256 tokens are about 190 words
    fewest_kept_words: int = 12  # of the whole sentences that are left of a truncated answer


_DEFAULT_LIMITS: Final = Limits()


# What an engine says of an answer that its text alone may not show: "length" is judged by the text.
_FINISHES: Final = {"repetition": Reason.LOOP, "content_filter": Reason.REFUSAL}


def check(text: str, finish_reason: str | None, request: Request, limits: Limits = _DEFAULT_LIMITS) -> Answer:
    """The answer to this request. finish_reason is vLLM's or that of OpenAI's API ("stop", "length" ...), None if
    unknown."""
    reason = unusable(text) or _FINISHES.get(finish_reason or "")
    if reason:
        return Answer(request.id, None, reason)
    caption, notes = mended(text)
    if is_loop(caption):
        return Answer(request.id, None, Reason.LOOP, notes)
    whole = whole_sentences(caption)
    if whole != caption:
        if _count_words(whole) < limits.fewest_kept_words:
            return Answer(request.id, None, Reason.TRUNCATED, notes)
        caption, notes = whole, (*notes, Note.CUT)
    reason = wrong_length(caption, limits) or contradiction(caption, request.tags)
    if reason:
        return Answer(request.id, None, reason, notes)
    return Answer(request.id, caption, None, (*notes, Note.MENTIONS_IMAGE) if _IMAGE.search(caption) else notes)


# --- Nothing of the text is of use -------------------------------------------------------------------------------

# Tokens of Pixtral's tokenizer and of other templates, also those cut in half; not all that has brackets: "[OPEN]".
_LEAKED = re.compile(
    r"\[/?(?:INST|IMG|TOOL_|AVAILABLE_TOOLS|SYSTEM_PROMPT|PREFIX\]|MIDDLE\]|SUFFIX\]|control_\d)|<SPECIAL_\d"
    r"|<\||\|>|<</?SYS>>|</?(?:s|unk|pad|image|mask)>"
)
_REFUSAL_WITHIN = 120  # characters
# At the start of a sentence: a girl may well hold a sign that says "I'm sorry".
_REFUSAL = re.compile(
    r"""(?:^|[.!?]\s+)(?:
        (?:(?:but|however|unfortunately|sorry|apologies)[,.!]?\s+)*
            (?:i\s+|i[\u2019'](?:m|d)\s+|i\s+am\s+)(?:(?:really|very|so|must|have\s+to|am)\s+)*
            (?:sorry|unable|afraid|not\s+(?:able|comfortable|allowed)|apologi[sz]e|decline|can(?:no|['\u2019])t\b|can\s+not
            |won['\u2019]t\b|will\s+not|do(?:n['\u2019]t|\s+not)\s+(?:feel\s+comfortable|have\s+the\s+ability|see\s+an?\s+image))
        |as\s+an?\s+(?:ai|artificial|language|large\s+language)\b(?!\s+(?:robot|girl|android))
        |(?:i[\u2019']m|i\s+am)\s+an?\s+(?:ai|language\s+model)\b
        |(?:sorry|apologies|my\s+apologies)\b
        |(?:this|the)\s+(?:image|content|picture|request)\s+(?:violates|is\s+inappropriate|(?:can|could)\s*not\s+be)
        |it\s+(?:is|would\s+be|['\u2019]s)\s+(?:not\s+appropriate|inappropriate)
        |no\s+image\s+(?:was|is|has\s+been)\s+(?:provided|attached|given)
        |please\s+(?:provide|upload|share)\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)


def unusable(text: str) -> Reason | None:
    """Why no part of this text is a caption."""
    stripped = text.strip()
    if not stripped:
        return Reason.EMPTY
    if _LEAKED.search(stripped):
        return Reason.TOKENS
    if has_control_characters(stripped):
        return Reason.CONTROL
    if _REFUSAL.search(stripped[:_REFUSAL_WITHIN]):
        return Reason.REFUSAL
    return Reason.LANGUAGE if is_foreign(stripped) else None


_NOT_SHOWN: Final = frozenset({"Cc", "Cf", "Co", "Cs", "Cn"})  # Unicode categories
_HARMLESS: Final = frozenset("\t\n\r\u200d")  # white space, and what joins emoji


def has_control_characters(text: str) -> bool:
    """Characters that print nothing, but for white space, and the mark of bytes that were no text."""
    if text.isprintable():  # most are: 50 times faster than looking at each
        return "\ufffd" in text
    return any(c == "\ufffd" or (unicodedata.category(c) in _NOT_SHOWN and c not in _HARMLESS) for c in text)


# Words that every few sentences of a language have, and that no English sentence has.
_ENGLISH: Final = word_set("a an the is are of in on and with her his their its to at by from wears stands has")
_OTHER_LANGUAGES: Final = word_set(
    "le la les une des du et est dans avec sur qui elle il ses aux ce cette "  # French
    "el los las un una y es en con por su sus que esta está lleva tiene del "  # Spanish
    "der die das ein eine einen und ist mit auf im dem den sie er ihr trägt steht "  # German
    "il lo gli uno è di che nel nella della sono ha "  # Italian
    "o os um uma é em com no na do da seu sua ela ele "  # Portuguese
    "no wa ga wo ni desu kara shite iru onnanoko"  # Japanese in Latin letters
)
_MOST_FOREIGN_LETTERS = 0.15  # of all letters; outside quotation marks


def is_foreign(text: str) -> bool:
    """Whether the sentences are not English. What is written on a sign may be, inside quotation marks."""
    text = QUOTED.sub(" ", text)
    if not text.isascii():
        letters = [c for c in text if c.isalpha()]
        if sum(not _is_latin(c) for c in letters) > _MOST_FOREIGN_LETTERS * len(letters):
            return True
    words = {word.lower() for word in WORD.findall(text)}
    other = len(words & _OTHER_LANGUAGES)
    return other >= 3 and other > len(words & _ENGLISH)


def _is_latin(character: str) -> bool:
    return character < "\u0250" or "\u1e00" <= character < "\u1f00"


# --- Mended ------------------------------------------------------------------------------------------------------

_WHOLE = r"(?:image|picture|illustration|artwork)"  # what only the whole is called
_IMAGE_NOUN = rf"(?:{_WHOLE}|drawing|painting|photo(?:graph)?|sketch)"
_KINDS = r"(?:(?!(?:in|of|on|with|from|at)\b)[\w-]+,?\s+){0,3}?"  # "vibrant, anime-style"; not "girl in the"
_PREAMBLE = re.compile(
    r"""(?:(?:sure|certainly|of\s+course|absolutely|okay|ok)(?:[,.!]+(?:\s+|$)|\s+(?=here\b)))?
        (?:here(?:['\u2019]s|\s+is|\s+are)\b[^.:]{0,60}\b(?:captions?|descriptions?|summary|sentences)\b[^.:]{0,60}:\s*)?
        (?:\W{0,3}(?:image\s+)?(?:caption|description)\W{0,3}:\W{0,3}\s*)?""",
    re.IGNORECASE | re.VERBOSE,
)
_OPENER = re.compile(
    rf"""(?:
        in\s+(?:this|the)\s+{_KINDS}{_IMAGE_NOUN}(?:,\s+|\s+(?=we\b|there\b|an?\b))
            (?:we\s+(?:can\s+)?see\s+|there\s+is\s+(?=an?\b))?
        |(?:this\s+{_KINDS}{_IMAGE_NOUN}|the\s+{_KINDS}{_WHOLE})\s+(?:here\s+)?
            (?:(?:shows|depicts|features|portrays|displays|presents|showcases|captures|contains|illustrates)\s+
               |is\s+(?:of\s+)?(?=an?\b))
        |(?:we\s+(?:can\s+)?see)\s+(?=an?\b)
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_IMAGE = re.compile(rf"\b(?:this\s+{_IMAGE_NOUN}|the\s+(?:overall\s+)?{_WHOLE})\b", re.IGNORECASE)
_SEPARATOR = re.compile(r"\|\|\||%%|\$\$")
_MARKUP = re.compile(r"\*\*|__|^#+\s*|^>\s+|`", re.MULTILINE)
_WRAPPING_QUOTES: Final = {'"': '"', "\u201c": "\u201d"}


def mended(text: str) -> tuple[str, tuple[str, ...]]:
    """The text on one line without preamble, opener, separators and markup; what of these it had."""
    notes: list[str] = []
    while _SEPARATOR.search(text):
        text = _SEPARATOR.sub(" ", text)
        notes = [Note.SEPARATOR]
    text = " ".join(_MARKUP.sub("", text).split())
    text = _unwrapped(text)
    for pattern, note in ((_PREAMBLE, Note.PREAMBLE), (_OPENER, Note.OPENER)):
        found = pattern.match(text)
        if found and found.end():
            rest = _unwrapped(text[found.end() :])
            text = rest[:1].upper() + rest[1:]
            notes.append(note)
    return text, tuple(notes)


def _unwrapped(text: str) -> str:
    """Without quotation marks around the whole."""
    close = _WRAPPING_QUOTES.get(text[:1])
    is_whole = close is not None and text[-1:] == close and text.find(close, 1) == len(text) - 1
    return text[1:-1].strip() if is_whole else text


# --- Loops, ends, lengths ----------------------------------------------------------------------------------------

_LONGEST_PERIOD = 12  # words
_FEWEST_DISTINCT = 0.7  # of all trigrams: good captions have 0.95 and more
_MOST_COMPRESSED = 2.8  # times smaller by zlib: good captions reach 2
_JUDGED_FROM = 24  # words: shorter texts repeat by chance
_COMPRESSED_FROM = 300  # characters
# The last sentence may close a quotation or a bracket.
_SENTENCE_END = re.compile(r"""[.!?\u2026]+["'\u201d\u2019)\]]*(?=\s|$)""")
_ABBREVIATION = re.compile(r"\b(?:mr|mrs|ms|dr|st|vs|no|jr|vol|etc|e\.g|i\.e|approx)\.$", re.IGNORECASE)


def is_loop(text: str) -> bool:
    """Whether words go round: one after the other, sentence for sentence, or so often that they say nothing new."""
    data = text.encode()
    if len(data) >= _COMPRESSED_FROM and len(data) > _MOST_COMPRESSED * len(zlib.compress(data)):
        return True
    words = text.lower().split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    distinct = len(set(trigrams))
    if distinct == len(trigrams):  # most captions: whatever follows repeats three words
        return False
    sentences = [s for s in map(str.strip, _SENTENCE_END.split(text.lower())) if s.count(" ") >= 3]
    return (
        len(set(sentences)) < len(sentences)
        or (len(words) >= _JUDGED_FROM and distinct < _FEWEST_DISTINCT * len(trigrams))
        or any(_runs(words, period) for period in range(1, _LONGEST_PERIOD + 1))
    )


def _runs(words: list[str], period: int) -> bool:
    """Whether so many words come three times in a row; a single word five times, since people laugh."""
    needed = period * (4 if period == 1 else 2)
    run = 0
    for now, then in zip(words[period:], words, strict=False):
        run = run + 1 if now == then else 0
        if run == needed:
            return True
    return False


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence: itself where it ends with one, "" where there is none."""
    ends = [end.end() for end in _SENTENCE_END.finditer(text) if not _ABBREVIATION.search(text[: end.end()][-8:])]
    return text[: ends[-1]] if ends else ""


def wrong_length(text: str, limits: Limits = _DEFAULT_LIMITS) -> Reason | None:
    words = _count_words(text)
    if words < limits.fewest_words:
        return Reason.TOO_SHORT
    return Reason.TOO_LONG if words > limits.most_words else None


def _count_words(text: str) -> int:
    return text.count(" ") + 1 if text else 0


# --- Over a shard ------------------------------------------------------------------------------------------------


class RepeatedCaptions:
    """Finds captions that a model gives to many images: its favourite nonsense. One for each shard; answers in any
    order, of an image that comes again only the last one counts."""

    def __init__(self, most: int = 3) -> None:
        if most < 1:
            raise ValueError(f"most {most}: one image at least may have a caption")
        self._most = most
        self._ids: dict[str, set[str]] = {}
        self._caption_of: dict[str, str] = {}

    def check(self, answer: Answer) -> Answer:
        """The answer, or its refusal where more than `most` images of the shard have had its caption."""
        if answer.id in self._caption_of:
            self._ids[self._caption_of.pop(answer.id)].discard(answer.id)
        if answer.caption is None:
            return answer
        words = self._caption_of[answer.id] = " ".join(WORD.findall(answer.caption.lower()))
        ids = self._ids.setdefault(words, set())
        ids.add(answer.id)
        return Answer(answer.id, None, Reason.REPEATED, answer.notes) if len(ids) > self._most else answer

    def repeated(self) -> set[str]:
        """Ids of all images whose caption turned out to be one of many: also those that `check` let pass before it was
        known."""
        return {id for ids in self._ids.values() if len(ids) > self._most for id in ids}
