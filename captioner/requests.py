"""What goes into an engine and what comes out."""

from dataclasses import dataclass


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
