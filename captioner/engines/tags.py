"""The embedded default: a caption put together from the tags alone, without any model."""

from captioner.requests import Answer, Request

# Who and what is in the picture, in the order that training text has too. Artists and meta tags are not visible.
_CATEGORIES = ("special", "character", "copyright", "general")


class TagEngine:
    """Lists the tags, as a caption of last resort does; needs no picture."""

    name = "tags"
    model = ""
    prompt_version = "tags-1"

    def caption(self, requests: list[Request]) -> list[Answer]:
        return [_answer(request) for request in requests]


def _answer(request: Request) -> Answer:
    words = [tag for category in _CATEGORIES for tag in request.tags.get(category, [])]
    unique = list(dict.fromkeys(words))
    return Answer(request.id, ", ".join(unique), None) if unique else Answer(request.id, None, "no tags")
