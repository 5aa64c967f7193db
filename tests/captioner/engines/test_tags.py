"""A caption made from tags lists all that are visible."""

from captioner.engines.tags import caption_from_tags
from captioner.requests import Answer, CaptionRequest


def test_tags_are_listed_once_in_the_order_of_training_text() -> None:
    tags = {
        "general": ["red star", "night sky"],
        "special": ["solo"],
        "character": ["hoshimaru"],
        "copyright": ["sample tales", "red star"],
    }
    caption = "solo, hoshimaru, sample tales, red star, night sky"
    assert caption_from_tags(CaptionRequest("danbooru:1", tags)) == Answer("danbooru:1", caption, None)
    assert caption_from_tags(CaptionRequest("danbooru:1", tags), "empty") == Answer("danbooru:1", caption, "empty")


def test_artists_and_meta_tags_are_left_out() -> None:
    request = CaptionRequest("danbooru:1", {"artist": ["ink otter"], "meta": ["highres"]})
    assert caption_from_tags(request) == Answer("danbooru:1", None, "no tags")
    assert caption_from_tags(request, "empty") == Answer("danbooru:1", None, "empty")
