"""The interface of an engine that captions pictures: completions and errors.

openai.py and vllm.py are imported where they are used: each needs packages that not every environment has.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from PIL import Image

from captioner.prompts import Prompt
from captioner.sampling import CompletionParams

API_KEY_VARIABLE: Final = "OPENAI_API_KEY"  # environment variable with the key of a server


@dataclass(frozen=True)
class Completion:
    """Text of a model. `finish_reason` is "stop", "length", "repetition" (vLLM ended a loop), a server's own word, or
    None if unknown. `tokens_in` includes the picture's tokens. Both counts are 0 if a server does not report them."""

    text: str
    finish_reason: str | None
    tokens_in: int
    tokens_out: int


class VisionEngine(Protocol):
    """A model that is shown a picture. Calls may overlap, which fills its batches."""

    name: str
    model: str  # folder or name of the weights

    async def complete(self, prompt: Prompt, image: Image.Image, params: CompletionParams) -> Completion:
        """The model's text for this picture (RGB, already resized). Cancelling the call removes the request from the
        engine.

        RequestFailed concerns this picture only. After EngineDied every further call fails: start another engine.
        EngineUnusable means that another engine would fail as well until the user has fixed what the message says.
        """
        ...

    async def close(self) -> None:
        """Free memory and processes, also after EngineDied. Calls that are still running fail."""
        ...


class EngineFailure(StrEnum):
    """Why a request has no completion: a few kinds, to be counted."""

    REFUSED = "engine refused the request"
    ENGINE = "engine failed on the request"
    DIED = "engine died on the picture"
    BUSY = "server busy"  # 429
    SERVER = "server error"  # 5xx
    UNREACHABLE = "server unreachable"
    TIMEOUT = "server timeout"
    GARBAGE = "server sent no completion"


class RequestFailed(Exception):
    """One request has no completion; the engine works on. `failure` is counted, the message is for the user."""

    def __init__(self, failure: EngineFailure, detail: str) -> None:
        super().__init__(f"{failure}: {detail}")
        self.failure, self.detail = failure, detail

    def __reduce__(self) -> tuple[type["RequestFailed"], tuple[EngineFailure, str]]:
        return RequestFailed, (self.failure, self.detail)  # so that it can leave its process


class EngineDied(Exception):
    """The engine ended, and with it every request in flight. Another engine may work."""


class EngineUnusable(Exception):
    """No engine with these settings can work. The message is one line that says what to do."""
