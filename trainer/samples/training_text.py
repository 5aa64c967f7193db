"""Tags and caption -> training text: what is kept, shuffled and left out. Pure.

The order taught to the model: special (1girl, multiple girls ...), character, copyright, artist, general tags,
natural-language caption, then quality, era, rating and meta words; all joined by commas.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

# Field separators of the files that such captions were first kept in: inside our text they would be noise.
_SEPARATORS = re.compile(r"\|\|\||%%|\$\$")


@dataclass(frozen=True, kw_only=True)
class TextParts:
    """What is known about a picture, in words as the model reads them ("long hair", not "long_hair")."""

    special: tuple[str, ...] = ()  # how many of whom: 1girl, 2boys, no humans
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
    """Probabilities. Dropout 0.25 / 0.3 are those of the HDM recipe; special tags are never dropped."""

    tag_dropout: float = 0.25  # of each general tag
    group_dropout: float = 0.3  # of each other group as a whole: prompts rarely name all of them
    caption_dropout: float = 0.1  # of the whole text: trains guidance's unconditional branch
    caption_only: float = 0.25  # natural caption without the general tags, where both are there
    tags_only: float = 0.25  # general tags without the caption; in the rest of the cases both

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} {value} is a probability: from 0 to 1")
        if self.caption_only + self.tags_only > 1:
            raise ValueError(
                f"caption_only {self.caption_only} + tags_only {self.tags_only} is above 1: lower one of them"
            )


def training_text(parts: TextParts, generator: np.random.Generator, config: CaptionConfig) -> str:
    """One of the many texts that a picture is trained with; the same state of the generator gives the same text.

    "" for caption_dropout of the pictures. The general tags fall under both dropouts, the caption under neither: it is
    left out by tags_only alone.
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
    """Everything that is known, in order and without chance: for evaluation and as a prompt."""
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
    """The caption without its last full stop, because a comma may follow it."""
    return () if caption is None else (caption.strip().removesuffix("."),)


def _join(*groups: Iterable[str]) -> str:
    pieces = (" ".join(_SEPARATORS.sub(" ", piece).split()) for group in groups for piece in group)
    return ", ".join(piece for piece in pieces if piece)
