"""What goes into captioning, and what comes out."""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class CaptionRequest:
    """One picture to caption. Tags are written as words ("long hair") and grouped by category."""

    id: str
    tags: dict[str, list[str]]


@dataclass(frozen=True)
class Answer:
    """A caption, or the reason why there is none."""

    id: str
    caption: str | None
    reason: str | None
    notes: tuple[str, ...] = ()  # what was fixed in the caption, to be counted


class CaptionReason(StrEnum):
    """Why the text of a model is not used as a caption."""

    EMPTY = "empty"
    TOKENS = "token leakage"
    CONTROL = "control characters"
    REFUSAL = "refusal"
    LANGUAGE = "wrong language"
    CHATTER = "chatter"
    LOOP = "repetition loop"
    TRUNCATED = "truncated"
    TOO_SHORT = "too short"
    TOO_LONG = "too long"
    NAME = "invented name"
    PEOPLE = "contradicts who is there"
    HAIR = "contradicts hair colour"
    EYES = "contradicts eye colour"
    REPEATED = "same caption for many images"


class Note(StrEnum):
    """A fix that was applied to a caption, or a fact about it that is counted."""

    PREAMBLE = "preamble"  # "Sure! Here is a description:"
    THINKING = "thinking"  # "<think> ... </think>"
    OPENER = "opener"  # "The image shows"
    SEPARATOR = "separator"
    CUT = "cut to the last sentence"
    MENTIONS_IMAGE = "mentions the image"  # after the first words; left in place
