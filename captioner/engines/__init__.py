"""What writes captions. An engine of its kind: `Engine` needs tags alone, `VisionEngine` looks at the picture.

vllm.py and openai.py are imported by whoever uses them: they want packages that not every environment has.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from PIL import Image

from captioner.engines.tags import TagEngine
from captioner.prompts import Prompt, Sampling, seed_for
from captioner.requests import Answer, Request

KEY: Final = "OPENAI_API_KEY"  # environment variable with a server's key


class Engine(Protocol):
    """Anything that turns tags into captions."""

    name: str
    model: str  # which weights; "" where there are none
    prompt_version: str  # changes with anything that changes the text of a caption

    def caption(self, requests: list[Request]) -> list[Answer]:
        """One answer per request, in the requests' order."""
        ...


ENGINES: dict[str, type[Engine]] = {"tags": TagEngine}


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How one completion is drawn: the same draw of the same prompt and picture gives the same text."""

    seed: int  # 32 bits
    temperature: float = 0.5
    top_p: float = 0.9
    max_tokens: int = 256

    @classmethod
    def of(cls, sampling: Sampling, id: str, attempt: int) -> "Draw":
        """The draw for this row's attempt, counted from 0."""
        return cls(
            seed=seed_for(id, attempt),
            temperature=sampling.temperatures[attempt],
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
        )


@dataclass(frozen=True)
class Completion:
    """What the model said. finish_reason: "stop", "length", "repetition" (vLLM ended a loop), or a server's own word;
    None if unknown. tokens_in has the picture's tokens; both counts are 0 where a server does not tell."""

    text: str
    finish_reason: str | None
    tokens_in: int
    tokens_out: int


class VisionEngine(Protocol):
    """A model that is shown a picture. Calls may overlap: the more do, the fuller its batches are."""

    name: str
    model: str  # which weights, as a folder or a name

    async def complete(self, prompt: Prompt, image: Image.Image, draw: Draw) -> Completion:
        """What the model says of this picture (RGB, already small).

        RequestFailed: this picture's own failure; others go on. EngineDied: so will every further call; start another
        engine. EngineUnusable: another engine would fail as well, until somebody mends what the message says.
        Cancelling the call takes the request out of the engine.
        """
        ...

    async def close(self) -> None:
        """Frees memory and processes, also after EngineDied; calls still running fail."""
        ...


class Failure(StrEnum):
    """Why one request has no completion: few kinds, to be counted."""

    REFUSED = "engine refused the request"
    ENGINE = "engine failed on the request"
    DIED = "engine died on the picture"
    BUSY = "server busy"  # 429
    SERVER = "server error"  # 5xx
    UNREACHABLE = "server unreachable"
    TIMEOUT = "server timeout"
    GARBAGE = "server sent no completion"


class RequestFailed(Exception):
    """One request has no completion; the engine works on. `failure` is for counting, the text for reading."""

    def __init__(self, failure: Failure, detail: str) -> None:
        super().__init__(f"{failure}: {detail}")
        self.failure = failure
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[Failure, str]]:
        return RequestFailed, (self.failure, self.detail)  # or it would not cross processes


class EngineDied(Exception):
    """The engine is gone with all that it had in work; another one may do."""


class EngineUnusable(Exception):
    """No engine of these settings will work: one line which names the mend."""
