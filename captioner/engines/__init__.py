"""What writes captions: one class per engine, all with the same face."""

from typing import Protocol

from captioner.engines.tags import TagEngine
from captioner.requests import Answer, Request


class Engine(Protocol):
    """Anything that turns pictures and their tags into captions."""

    name: str
    model: str  # which weights; "" where there are none
    prompt_version: str  # changes with anything that changes the text of a caption

    def caption(self, requests: list[Request]) -> list[Answer]:
        """One answer per request, in the requests' order."""
        ...


ENGINES: dict[str, type[Engine]] = {"tags": TagEngine}
