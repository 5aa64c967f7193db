"""Tags and caption -> training text: which parts are kept, shuffled and dropped. Pure functions.

Parts are joined by commas in this order: special tags (1girl, multiple girls ...), character, copyright, artist,
general tags, caption, then quality, era, rating and meta words.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# Field separators of the file formats that such captions come from. They are noise in a training text.
_SEPARATORS = re.compile(r"\|\|\||%%|\$\$")


@dataclass(frozen=True, kw_only=True)
class TextParts:
    """Everything known about a picture, with spaces instead of underscores ("long hair")."""

    special: tuple[str, ...] = ()  # number of characters: 1girl, 2boys, no humans
    character: tuple[str, ...] = ()
    copyright: tuple[str, ...] = ()
    artist: tuple[str, ...] = ()
    general: tuple[str, ...] = ()
    meta: tuple[str, ...] = ()
    caption: str | None = None  # sentences
    quality: str | None = None  # masterpiece ... worst quality
    era: str | None = None  # old ... newest
    rating: str | None = None  # safe ...


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Probabilities. tag_dropout and group_dropout are HDM's. Special tags are never dropped."""

    tag_dropout: float = 0.25  # of dropping each general tag
    group_dropout: float = 0.3  # of dropping each group as a whole, because prompts rarely name all groups
    caption_dropout: float = 0.1  # of an empty text, which trains the unconditional branch of guidance
    caption_only: float = 0.25  # of the caption without general tags, if the picture has both
    tags_only: float = 0.25  # of general tags without the caption; otherwise the text has both

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} {value} must be a probability, from 0 to 1")
        if self.caption_only + self.tags_only > 1:
            raise ValueError(
                f"caption_only {self.caption_only} + tags_only {self.tags_only} is above 1: lower one of them"
            )


def training_text(parts: TextParts, generator: np.random.Generator, config: CaptionConfig) -> str:
    """A random text for a picture; the same generator state gives the same text.

    Empty with probability caption_dropout. Both dropouts apply to the general tags. The caption is only dropped by
    tags_only.
    """
    if generator.random() < config.caption_dropout:
        return ""
    mode = generator.random()
    without_tags = parts.caption is not None and mode < config.caption_only
    without_caption = bool(parts.general) and mode >= 1 - config.tags_only

    def group(words: tuple[str, ...]) -> tuple[str, ...]:
        return () if generator.random() < config.group_dropout else words

    def word(value: str | None) -> tuple[str, ...]:
        return group(() if value is None else (value,))

    def shuffled(tags: tuple[str, ...]) -> list[str]:
        kept = [tag for tag in tags if generator.random() >= config.tag_dropout]
        return [kept[i] for i in generator.permutation(len(kept))]

    return _join(
        parts.special,
        group(parts.character),
        group(parts.copyright),
        group(parts.artist),
        () if without_tags else shuffled(group(parts.general)),
        () if without_caption else _sentences(parts.caption),
        word(parts.quality),
        word(parts.era),
        word(parts.rating),
        group(parts.meta),
    )


def full_text(parts: TextParts) -> str:
    """Every part, nothing dropped or shuffled: for validation and as a prompt."""
    return _join(
        parts.special,
        parts.character,
        parts.copyright,
        parts.artist,
        parts.general,
        _sentences(parts.caption),
        [word for word in (parts.quality, parts.era, parts.rating) if word is not None],
        parts.meta,
    )


def _sentences(caption: str | None) -> tuple[str, ...]:
    """The caption without its final full stop, because a comma may follow."""
    return () if caption is None else (caption.strip().removesuffix("."),)


def _join(*groups: Iterable[str]) -> str:
    pieces = (" ".join(_SEPARATORS.sub(" ", piece).split()) for group in groups for piece in group)
    return ", ".join(piece for piece in pieces if piece)
