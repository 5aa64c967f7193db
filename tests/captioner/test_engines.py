"""An engine gives one answer per request, in order: a caption, or the reason for having none."""

from captioner.engines.tags import TagEngine
from captioner.requests import Answer, Request


def test_tags_are_listed_in_the_order_of_training_text_each_once() -> None:
    tags = {
        "general": ["red star", "night sky"],
        "special": ["solo"],
        "character": ["hoshimaru"],
        "copyright": ["sample tales", "red star"],
    }
    [answer] = TagEngine().caption([Request("danbooru:1", tags)])
    assert answer == Answer("danbooru:1", "solo, hoshimaru, sample tales, red star, night sky", None)


def test_what_is_not_visible_is_left_out() -> None:
    [answer] = TagEngine().caption([Request("danbooru:1", {"artist": ["ink otter"], "meta": ["highres"]})])
    assert answer == Answer("danbooru:1", None, "no tags")


def test_answers_come_in_the_order_of_the_requests() -> None:
    requests = [Request(str(number), {"general": [f"tag {number}"]}) for number in (3, 1, 2)]
    assert [(a.id, a.caption) for a in TagEngine().caption(requests)] == [
        ("3", "tag 3"),
        ("1", "tag 1"),
        ("2", "tag 2"),
    ]
