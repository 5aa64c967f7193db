"""Any server that speaks OpenAI's chat completions, such as a running `vllm serve`. The key is in OPENAI_API_KEY."""

import asyncio
import base64
import io
import json
import os
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import aiohttp
from PIL import Image

from captioner.engines import KEY, Completion, Draw, EngineUnusable, Failure, RequestFailed
from captioner.prompts import Prompt

T = TypeVar("T")

_LONGEST_ANSWER: Final = 1 << 20  # bytes: a caption has a few hundred
_MOST_TOKENS: Final = 1 << 24  # of one answer: three of them fit a column of 32 bits
_LONGEST_PAUSE: Final = 60.0  # seconds, whatever a server asks for
_AGAIN: Final = {408: Failure.TIMEOUT, 409: Failure.BUSY, 425: Failure.BUSY, 429: Failure.BUSY}


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """A server, and how patient we are with it."""

    url: str  # "http://127.0.0.1:8000", with or without "/v1"
    model: str = ""  # "": the only one that the server has
    timeout: float = 180.0  # seconds for one try, from connecting to the last byte: a busy server queues
    tries: int = 5  # of one request
    first_pause: float = 1.0  # seconds before the second try; doubles with each
    key: str = field(default_factory=lambda: os.environ.get(KEY, ""), repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.url} is no address of a server: give one such as http://127.0.0.1:8000/v1")
        if parts.username is not None or parts.password is not None:
            raise ValueError(f"the URL has a user or password, which messages would show: set {KEY} instead")
        if not self.key.isprintable():
            raise ValueError(f"{KEY} has a line break or another character that prints nothing; set it again without")
        if self.tries < 1 or self.timeout <= 0:
            raise ValueError(f"{self.tries} tries of {self.timeout} s: give at least 1 try and more than 0 s")

    @property
    def api(self) -> str:
        url = self.url.rstrip("/")
        return url if url.endswith("/v1") else f"{url}/v1"


class OpenAIEngine:
    """Connect with `OpenAIEngine.connect`; belongs to the event loop that it was connected in.

    How many requests are under way at a time is the caller's choice.
    """

    name = "openai"

    def __init__(self, settings: ServerSettings, session: aiohttp.ClientSession, model: str) -> None:
        self.model = model
        self._settings = settings
        self._session = session

    @classmethod
    async def connect(cls, settings: ServerSettings) -> "OpenAIEngine":
        """EngineUnusable where the server cannot be reached, wants another key, or has no such model."""
        session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {settings.key}"} if settings.key else {},
            timeout=aiohttp.ClientTimeout(total=settings.timeout),
            connector=aiohttp.TCPConnector(limit=0),
        )
        try:
            return cls(settings, session, await _find_model(session, settings))
        except BaseException:
            await session.close()
            raise

    async def complete(self, prompt: Prompt, image: Image.Image, draw: Draw) -> Completion:
        picture = {"type": "image_url", "image_url": {"url": await asyncio.to_thread(data_url, image)}}
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt.content(picture)}],
            "seed": draw.seed,
            "temperature": draw.temperature,
            "top_p": draw.top_p,
            "max_tokens": draw.max_tokens,
        }

        async def ask() -> Completion:
            return completion_of(await _ask(self._session, "POST", f"{self._settings.api}/chat/completions", body))

        return await _patiently(ask, self._settings)

    async def close(self) -> None:
        await self._session.close()


def data_url(image: Image.Image) -> str:
    """The picture as a JPEG inside a URL. Full colour resolution: thin red lines on white are what drawings are of."""
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=92, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"


class TryAgain(Exception):
    """One try failed in a way that may pass."""

    def __init__(self, failure: Failure, detail: str, pause: float = 0.0) -> None:
        super().__init__(detail)
        self.failure = failure
        self.pause = pause  # seconds that the server asked for


def completion_of(answer: Any) -> Completion:
    """TryAgain for what is no chat completion. No text is an answer too, and judged as such.

    All of it is checked, as it goes into files with types: one odd answer would cost a whole shard.
    """
    try:
        choice = answer["choices"][0]
        text = choice["message"].get("content") or choice["message"].get("refusal") or ""
        if not isinstance(text, str):
            raise TypeError(f"its content is a {type(text).__name__}")
        finish_reason = choice.get("finish_reason")
        if not isinstance(finish_reason, str | None):
            raise TypeError(f"its finish_reason is a {type(finish_reason).__name__}")
        usage = answer.get("usage") or {}
        tokens_in, tokens_out = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        if not (0 <= tokens_in <= _MOST_TOKENS and 0 <= tokens_out <= _MOST_TOKENS):
            raise ValueError(f"it counts {tokens_in} and {tokens_out} tokens")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise TryAgain(Failure.GARBAGE, f"{type(error).__name__} {error} in {_line(json.dumps(answer))}") from None
    return Completion(_encodable(text), finish_reason and _encodable(finish_reason), tokens_in, tokens_out)


def _encodable(text: str) -> str:
    """With the mark of what is no text for halves of characters, which JSON can spell and no file can keep."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


async def _find_model(session: aiohttp.ClientSession, settings: ServerSettings) -> str:
    """The model's name as the server spells it."""

    async def ask() -> list[str]:
        answer = await _ask(session, "GET", f"{settings.api}/models")
        try:
            return [str(model["id"]) for model in answer["data"]]
        except (KeyError, TypeError) as error:
            raise TryAgain(Failure.GARBAGE, f"no list of models: {_line(json.dumps(answer))}") from error

    try:
        models = await _patiently(ask, settings)
    except RequestFailed as error:
        raise EngineUnusable(f"{settings.api}/models: {error}; is it a server of OpenAI's API, and running?") from error
    if settings.model in models:
        return settings.model
    listed = ", ".join(models[:5]) or "no model"
    if settings.model:
        raise EngineUnusable(f"{settings.url} has no model {settings.model}; give --model one of: {listed}")
    if len(models) != 1:
        raise EngineUnusable(f"{settings.url} has {len(models)} models; give --model one of: {listed}")
    return models[0]


async def _patiently(ask: Callable[[], Awaitable[T]], settings: ServerSettings) -> T:
    """Tries until an answer, with pauses that double, apart by chance so that waiting requests do not come back as one.

    RequestFailed with the last try's failure when all are used up.
    """
    pause = settings.first_pause
    for last in range(1, settings.tries + 1):
        try:
            return await ask()
        except TryAgain as again:
            if last == settings.tries:
                raise RequestFailed(again.failure, f"{again}, {last} times") from again
            await asyncio.sleep(min(_LONGEST_PAUSE, max(again.pause, pause * random.uniform(0.5, 1.0))))
            pause *= 2
    raise AssertionError("at least one try")


async def _ask(session: aiohttp.ClientSession, method: str, url: str, body: Any = None) -> Any:
    """The JSON of one answer: TryAgain, RequestFailed or EngineUnusable for what is none."""
    try:
        # A redirect would carry the key elsewhere.
        async with session.request(method, url, json=body, allow_redirects=False) as response:
            text = (await _bounded(response.content)).decode("utf-8", errors="replace")
    except TimeoutError:
        raise TryAgain(Failure.TIMEOUT, f"no whole answer within {session.timeout.total:g} s") from None
    except aiohttp.ClientSSLError as error:
        raise EngineUnusable(
            f"{url}: no trusted connection ({_line(error)}); mend its certificate or the URL"
        ) from error
    except (aiohttp.ClientError, OSError) as error:
        raise TryAgain(Failure.UNREACHABLE, _line(error)) from error
    if response.status != 200:
        raise _refusal(response.status, response.headers, url, text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise TryAgain(Failure.GARBAGE, f"not JSON: {_line(text) or 'nothing'}") from None


async def _bounded(content: aiohttp.StreamReader) -> bytes:
    data = b""
    while chunk := await content.read(1 << 16):
        data += chunk
        if len(data) > _LONGEST_ANSWER:
            raise TryAgain(Failure.GARBAGE, f"an answer of more than {_LONGEST_ANSWER} bytes")
    return data


def _refusal(status: int, headers: Mapping[str, str], url: str, text: str) -> Exception:
    """What an answer with this status means: for the server as it is set up, for this request, or for now only."""
    said = f"{status} {_line(text)}"
    if status in (401, 403):
        return EngineUnusable(f"{url} wants a key, or another one ({said}); set {KEY}")
    if status == 402 or "insufficient_quota" in text:
        return EngineUnusable(f"{url} is not paid for ({said}); raise the account's limit")
    if status == 404:
        return EngineUnusable(f"{url} is not there, or not the model ({said}); give another --url or --model")
    if 300 <= status < 400:
        return EngineUnusable(f"{url} has moved ({status}); give --url {headers.get('Location', 'its new address')}")
    if status in _AGAIN or status >= 500:
        return TryAgain(_AGAIN.get(status, Failure.SERVER), said, _seconds(headers.get("Retry-After")))
    return RequestFailed(Failure.REFUSED, said)


def _seconds(retry_after: str | None) -> float:
    """The header as seconds; 0 for dates and other words, which the pauses of our own do for."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        return 0.0


def _line(words: object) -> str:
    return " ".join(str(words).split())[:300]
