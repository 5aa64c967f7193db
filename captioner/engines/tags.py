"""Captions made from the tags alone, without a model: the default engine, and the fallback of all others."""

from typing import Final

from captioner.requests import Answer, CaptionRequest

# The columns of a caption made from tags that say what made it. Raise the version when the text of captions changes.
TAG_ENGINE: Final = {"engine": "tags", "model": "", "prompt_version": "tags-1"}
# In the order of training text. Artists and meta tags are not visible in the picture.
_CATEGORIES: Final = ("special", "character", "copyright", "general")


def caption_from_tags(request: CaptionRequest, reason: str | None = None) -> Answer:
    """All visible tags, each once, with commas between them; no caption if there are none. `reason` says why a model's
    caption is not used."""
    tags = dict.fromkeys(tag for category in _CATEGORIES for tag in request.tags.get(category, []))
    return Answer(request.id, ", ".join(tags), reason) if tags else Answer(request.id, None, reason or "no tags")
