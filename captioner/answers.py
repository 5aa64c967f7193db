"""Checks the text of a model: returns a caption, or the reason for rejecting it.

The order of the checks, each of which sees the result of the one before:
    empty, token leakage, control characters, refusal           nothing in the text is usable
    wrong language                                              before anything that reads English
    preamble, opener, separators, markup                        removed and noted
    repetition loop                                             before truncation, with which most loops end
    chatter                                                     what the model says to its user (chatter.py)
    truncation                                                  cut to the last whole sentence, or rejected
    too short, too long
    invented name, people, hair colour, eye colour              against the tags (grounding.py)
Only a whole shard shows that many images have the same caption: `repeated_captions`.
"""

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Final

from captioner.chatter import has_chatter, without_thinking
from captioner.grounding import contradiction
from captioner.requests import Answer, CaptionReason, CaptionRequest, Note
from captioner.words import QUOTED, WORD, word_set

_MIN_WORDS = 6
_MAX_WORDS = 220  # 256 tokens are about 190 words
_MIN_WORDS_AFTER_CUT = 12  # in the whole sentences of a truncated answer
# Finish reasons that decide by themselves. "length" does not: the text shows whether it is truncated.
_FINISH_REASONS: Final = {"repetition": CaptionReason.LOOP, "content_filter": CaptionReason.REFUSAL}


def check(text: str, finish_reason: str | None, request: CaptionRequest) -> Answer:
    """The answer to this request. `finish_reason` is that of vLLM or OpenAI's API ("stop", "length" ...), None if
    unknown."""
    told = without_thinking(text)
    thought, text = told != text.strip(), told
    reason = unusable(text) or _FINISH_REASONS.get(finish_reason or "")
    if reason:
        return Answer(request.id, None, reason)
    caption, notes = clean(text)
    notes = (Note.THINKING, *notes) if thought else notes
    if is_loop(caption):
        return Answer(request.id, None, CaptionReason.LOOP, notes)
    if has_chatter(caption):
        return Answer(request.id, None, CaptionReason.CHATTER, notes)
    whole = whole_sentences(caption)
    if whole != caption:
        if _count_words(whole) < _MIN_WORDS_AFTER_CUT:
            return Answer(request.id, None, CaptionReason.TRUNCATED, notes)
        caption, notes = whole, (*notes, Note.CUT)
    words = _count_words(caption)
    if words < _MIN_WORDS:
        reason = CaptionReason.TOO_SHORT
    else:
        reason = CaptionReason.TOO_LONG if words > _MAX_WORDS else contradiction(caption, request.tags)
    if reason:
        return Answer(request.id, None, reason, notes)
    return Answer(request.id, caption, None, (*notes, Note.MENTIONS_IMAGE) if _IMAGE.search(caption) else notes)


# --- Unusable texts ----------------------------------------------------------------------------------------------

# Special tokens of Pixtral and of other templates, also cut in half; but not everything in brackets, such as "[OPEN]".
_LEAKED = re.compile(
    r"\[/?(?:INST|IMG|TOOL_|AVAILABLE_TOOLS|SYSTEM_PROMPT|PREFIX\]|MIDDLE\]|SUFFIX\]|control_\d)|<SPECIAL_\d"
    r"|<\||\|>|<\uff5c|\uff5c>|\u25c1|\u2581|<</?SYS>>|</?(?:s|unk|pad|image|mask)>"
    r"|\[(?:EOS|BOS|PAD|UNK|SEP|CLS|MASK|/?RESPONSE)\]"
    r"|(?i:</?(?:bos|eos|img|box|ref|quad|answer|caption|think(?:ing)?|thought|reasoning|tool_call|response"
    r"|(?:start|end)_of_(?:turn|image)|image_soft_token|unused\d+|extra_id_\d+|0x[0-9a-f]{2})>)"
    r"|(?i:(?:^|\n)\s*(?:#+\s*)?(?:assistant|user|human|system|instruction|model|gpt)\s*:)"
)
_REFUSAL_WITHIN = 120  # characters from the start of the text
# Only at the start of a sentence, because a girl may hold a sign that says "I'm sorry".
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


def unusable(text: str) -> CaptionReason | None:
    """Why no part of the text can be a caption, or None."""
    stripped = text.strip()
    if not stripped:
        return CaptionReason.EMPTY
    if _LEAKED.search(stripped):
        return CaptionReason.TOKENS
    if has_control_characters(stripped):
        return CaptionReason.CONTROL
    if _REFUSAL.search(stripped[:_REFUSAL_WITHIN]):
        return CaptionReason.REFUSAL
    return CaptionReason.LANGUAGE if is_foreign(stripped) else None


_INVISIBLE: Final = frozenset({"Cc", "Cf", "Co", "Cs", "Cn"})  # Unicode categories
_HARMLESS: Final = frozenset("\t\n\r\u200d")  # white space, and the joiner of emoji


def has_control_characters(text: str) -> bool:
    """True for invisible characters other than white space, and for U+FFFD, which replaces undecodable bytes."""
    if text.isprintable():  # most texts are: 50 times faster than testing each character
        return "\ufffd" in text
    return any(c == "\ufffd" or (unicodedata.category(c) in _INVISIBLE and c not in _HARMLESS) for c in text)


# Frequent words of English and of other languages.
_ENGLISH: Final = word_set("a an the is are of in on and with her his their its to at by from wears stands has")
_OTHER_LANGUAGES: Final = word_set(
    "le la les une des du et est dans avec sur qui elle il ses aux ce cette "  # French
    "el los las un una y es en con por su sus que esta está lleva tiene del "  # Spanish
    "der die das ein eine einen und ist mit auf im dem den sie er ihr trägt steht "  # German
    "il lo gli uno è di che nel nella della sono ha "  # Italian
    "o os um uma é em com no na do da seu sua ela ele "  # Portuguese
    "no wa ga wo ni desu kara shite iru onnanoko"  # Japanese in Latin letters
)
_MAX_FOREIGN_LETTERS = 0.15  # share of all letters outside quotation marks


def is_foreign(text: str) -> bool:
    """True if the text is not English. Quoted text, such as writing on a sign, is ignored."""
    text = QUOTED.sub(" ", text)
    if not text.isascii():
        letters = [c for c in text if c.isalpha()]
        foreign = sum(not (c < "\u0250" or "\u1e00" <= c < "\u1f00") for c in letters)  # not Latin
        if foreign > _MAX_FOREIGN_LETTERS * len(letters):
            return True
    words = {word.lower() for word in WORD.findall(text)}
    other = len(words & _OTHER_LANGUAGES)
    return other >= 3 and other > len(words & _ENGLISH)


# --- Cleaning ----------------------------------------------------------------------------------------------------

_WHOLE = r"(?:image|picture|illustration|artwork)"  # never an object in the picture
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


def clean(text: str) -> tuple[str, tuple[str, ...]]:
    """The text on one line without preamble, opener, separators and markup, and notes on what was removed."""
    notes: list[str] = []
    while _SEPARATOR.search(text):
        text = _SEPARATOR.sub(" ", text)
        notes = [Note.SEPARATOR]
    text = " ".join(_MARKUP.sub("", text).split())
    text = _unquote(text)
    for pattern, note in ((_PREAMBLE, Note.PREAMBLE), (_OPENER, Note.OPENER)):
        found = pattern.match(text)
        if found and found.end():
            rest = _unquote(text[found.end() :])
            text = rest[:1].upper() + rest[1:]
            notes.append(note)
    return text, tuple(notes)


def _unquote(text: str) -> str:
    """Without quotation marks around the whole text."""
    close = _WRAPPING_QUOTES.get(text[:1])
    is_whole = close is not None and text[-1:] == close and text.find(close, 1) == len(text) - 1
    return text[1:-1].strip() if is_whole else text


# --- Loops, ends, lengths ----------------------------------------------------------------------------------------

_MAX_PERIOD = 12  # words
_MIN_DISTINCT = 0.7  # share of all trigrams; good captions have 0.95 and more
_MAX_COMPRESSION = 2.8  # ratio of zlib; good captions reach 2
_MIN_TRIGRAM_WORDS = 24  # shorter texts repeat by chance
_MIN_COMPRESSED_BYTES = 300
# The last sentence may close a quotation or a bracket.
_SENTENCE_END = re.compile(r"""[.!?\u2026]+["'\u201d\u2019)\]]*(?=\s|$)""")
_ABBREVIATION = re.compile(r"\b(?:mr|mrs|ms|dr|st|vs|no|jr|vol|etc|e\.g|i\.e|approx)\.$", re.IGNORECASE)


def is_loop(text: str) -> bool:
    """True if words or sentences repeat, one after the other or throughout the text."""
    data = text.encode()
    if len(data) >= _MIN_COMPRESSED_BYTES and len(data) > _MAX_COMPRESSION * len(zlib.compress(data)):
        return True
    words = text.lower().split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    distinct = len(set(trigrams))
    if distinct == len(trigrams):  # true for most captions; every check below needs a repeated trigram
        return False
    sentences = [s for s in map(str.strip, _SENTENCE_END.split(text.lower())) if s.count(" ") >= 3]
    return (
        len(set(sentences)) < len(sentences)
        or (len(words) >= _MIN_TRIGRAM_WORDS and distinct < _MIN_DISTINCT * len(trigrams))
        or any(_repeats(words, period) for period in range(1, _MAX_PERIOD + 1))
    )


def _repeats(words: list[str], period: int) -> bool:
    """True if `period` words occur three times in a row; a single word five times, for the sake of "ha ha ha"."""
    needed = period * (4 if period == 1 else 2)
    run = 0
    for word, earlier in zip(words[period:], words, strict=False):
        run = run + 1 if word == earlier else 0
        if run == needed:
            return True
    return False


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; "" without one."""
    ends = [end.end() for end in _SENTENCE_END.finditer(text) if not _ABBREVIATION.search(text[: end.end()][-8:])]
    return text[: ends[-1]] if ends else ""


def _count_words(text: str) -> int:
    return text.count(" ") + 1 if text else 0


# --- Over a shard ------------------------------------------------------------------------------------------------


def repeated_captions(captions: Mapping[str, str], limit: int = 3) -> set[str]:
    """Ids of the images whose caption more than `limit` images have, up to case and punctuation."""
    words = {id: " ".join(WORD.findall(caption.lower())) for id, caption in captions.items()}
    counts = Counter(words.values())
    return {id for id, text in words.items() if counts[text] > limit}
