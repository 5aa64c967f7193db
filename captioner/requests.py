"""What goes into an engine and what comes out."""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Request:
    """One picture to be captioned. Tags are words as a reader writes them ("long hair"), by category."""

    id: str
    tags: dict[str, list[str]]


@dataclass(frozen=True)
class Answer:
    """A caption, or the reason for having none."""

    id: str
    caption: str | None
    reason: str | None
    notes: tuple[str, ...] = ()  # what was mended in the caption, to be counted


class Reason(StrEnum):
    """Why an answer is no caption."""

    EMPTY = "empty"
    TOKENS = "token leakage"
    CONTROL = "control characters"
    REFUSAL = "refusal"
    LANGUAGE = "wrong language"
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
    """What was mended in a caption, or is only worth counting."""

    PREAMBLE = "preamble"  # "Sure! Here is a description:"
    OPENER = "opener"  # "The image shows"
    SEPARATOR = "separator"
    CUT = "cut to the last sentence"
    MENTIONS_IMAGE = "mentions the image"  # further on; left as it is
