"""Asks any server with OpenAI's chat completions API, such as a running `vllm serve`. The key is in OPENAI_API_KEY."""

import asyncio
import base64
import io
import json
import os
import random
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import aiohttp
from PIL import Image

from captioner.engines import API_KEY_VARIABLE, Completion, EngineFailure, EngineUnusable, RequestFailed
from captioner.prompts import Prompt
from captioner.sampling import CompletionParams

T = TypeVar("T")

_MAX_RESPONSE_BYTES: Final = 1 << 20  # a caption has a few hundred bytes
_MAX_TOKENS: Final = 1 << 24  # of one answer: the sum of three fits into a 32-bit column
_MAX_PAUSE: Final = 60.0  # seconds, whatever a server asks for
_UNSUPPORTED: Final = re.compile(
    r"(?:not|un|in)[ _-]?(?:supported|recognized|known|permitted|allowed|expected|valid)|extra[ _](?:inputs|fields)"
    r"|does not support|unsupported|no longer",
    re.IGNORECASE,
)
_PARAMETER: Final = re.compile(r"\b(?:max_tokens|temperature|top_p|seed|max_completion_tokens)\b")
_RETRIED: Final = {408: EngineFailure.TIMEOUT} | dict.fromkeys((409, 425, 429), EngineFailure.BUSY)  # by status


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """A server, its timeout and its retries."""

    url: str  # "http://127.0.0.1:8000", with or without "/v1"
    model: str = ""  # "": the only model of the server
    timeout: float = 180.0  # seconds for one try, from connecting to the last byte; includes the server's queue
    tries: int = 5  # of one request
    first_pause: float = 1.0  # seconds before the second try; doubles with each further one
    key: str = field(default_factory=lambda: os.environ.get(API_KEY_VARIABLE, ""), repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{self.url} is not the address of a server: give one such as http://127.0.0.1:8000/v1")
        if parts.username is not None or parts.password is not None:
            raise ValueError(f"the URL has a user or password, which messages would show: set {API_KEY_VARIABLE}")
        if not self.key.isprintable():
            raise ValueError(f"{API_KEY_VARIABLE} has a line break or another unprintable character: set it without")

    @property
    def api(self) -> str:
        url = self.url.rstrip("/")
        return url if url.endswith("/v1") else f"{url}/v1"


class OpenAIEngine:
    """Create it with `OpenAIEngine.connect`. It belongs to that event loop, and does not limit concurrent requests."""

    name = "openai"

    def __init__(self, settings: ServerSettings, session: aiohttp.ClientSession, model: str) -> None:
        self.model = model
        self._settings = settings
        self._session = session
        self._unsupported: set[str] = set()  # parameters that the server has refused

    @classmethod
    async def connect(cls, settings: ServerSettings) -> "OpenAIEngine":
        """Raises EngineUnusable if the server cannot be reached, refuses the key, or does not have the model."""
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

    async def complete(self, prompt: Prompt, image: Image.Image, params: CompletionParams) -> Completion:
        picture = {"type": "image_url", "image_url": {"url": await asyncio.to_thread(data_url, image)}}
        asked = {"model": self.model, "messages": [{"role": "user", "content": prompt.content(picture)}]}
        while True:
            body = asked | self._parameters(params)
            url = f"{self._settings.api}/chat/completions"

            async def ask(url: str = url, body: dict[str, Any] = body) -> Completion:
                return parse_completion(await _ask(self._session, "POST", url, body))

            try:
                return await _with_retries(ask, self._settings)
            except RequestFailed as error:
                name = unsupported_parameter(error)
                if name not in body:
                    raise
                self._unsupported.add(name)  # for all later requests, too

    def _parameters(self, params: CompletionParams) -> dict[str, Any]:
        """The sampling parameters under names that the server takes; without those that it refuses."""
        names = {"seed": params.seed, "temperature": params.temperature, "top_p": params.top_p}
        limit = "max_completion_tokens" if "max_tokens" in self._unsupported else "max_tokens"
        found = names | {limit: params.max_tokens}
        return {name: value for name, value in found.items() if name not in self._unsupported}

    async def close(self) -> None:
        await self._session.close()


def unsupported_parameter(error: RequestFailed) -> str:
    """The sampling parameter that a server refuses, as OpenAI's newer models refuse max_tokens, or ""."""
    if error.failure is not EngineFailure.REFUSED or not _UNSUPPORTED.search(error.detail):
        return ""
    found = _PARAMETER.search(error.detail)
    return found[0] if found else ""


def data_url(image: Image.Image) -> str:
    """The picture as a JPEG in a data URL. Without chroma subsampling, which blurs thin coloured lines of drawings."""
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=92, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"


class RetryableError(Exception):
    """One try failed in a way that may pass."""

    def __init__(self, failure: EngineFailure, detail: str, pause: float = 0.0) -> None:
        super().__init__(detail)
        self.failure = failure
        self.pause = pause  # seconds that the server asked for


def parse_completion(answer: Any) -> Completion:
    """Raises RetryableError if the JSON is not a chat completion. An answer without text is valid, and checked later.

    Every field is checked because it is written to typed columns: one odd answer would cost a whole shard.
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
        if not (0 <= tokens_in <= _MAX_TOKENS and 0 <= tokens_out <= _MAX_TOKENS):
            raise ValueError(f"it counts {tokens_in} and {tokens_out} tokens")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        detail = f"{type(error).__name__} {error} in {_line(json.dumps(answer))}"
        raise RetryableError(EngineFailure.GARBAGE, detail) from None
    return Completion(_encodable(text), finish_reason and _encodable(finish_reason), tokens_in, tokens_out)


def _encodable(text: str) -> str:
    """Replaces lone surrogates, which JSON can spell and UTF-8 cannot encode, with U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


async def _find_model(session: aiohttp.ClientSession, settings: ServerSettings) -> str:
    """The model's name as the server spells it."""

    async def ask() -> list[str]:
        answer = await _ask(session, "GET", f"{settings.api}/models")
        try:
            return [str(model["id"]) for model in answer["data"]]
        except (KeyError, TypeError):
            detail = f"not a list of models: {_line(json.dumps(answer))}"
            raise RetryableError(EngineFailure.GARBAGE, detail) from None

    try:
        models = await _with_retries(ask, settings)
    except RequestFailed as error:
        raise EngineUnusable(f"{settings.api}/models: {error}; is a server with OpenAI's API running there?") from error
    if settings.model in models:
        return settings.model
    listed = ", ".join(models[:5]) or "no model"
    if settings.model:
        raise EngineUnusable(f"{settings.url} has no model {settings.model}; give --model one of: {listed}")
    if len(models) != 1:
        raise EngineUnusable(f"{settings.url} has {len(models)} models; give --model one of: {listed}")
    return models[0]


async def _with_retries(ask: Callable[[], Awaitable[T]], settings: ServerSettings) -> T:
    """Repeat `ask` while it raises RetryableError, with pauses that double and have random jitter. Raises RequestFailed
    with the last failure after all tries."""
    pause = settings.first_pause
    for number in range(1, settings.tries + 1):
        try:
            return await ask()
        except RetryableError as error:
            if number == settings.tries:
                raise RequestFailed(error.failure, f"{error}, {number} times") from error
            await asyncio.sleep(min(_MAX_PAUSE, max(error.pause, pause * random.uniform(0.5, 1.0))))
            pause *= 2
    raise AssertionError("at least one try")


async def _ask(session: aiohttp.ClientSession, method: str, url: str, body: Any = None) -> Any:
    """The JSON of one response. Raises RetryableError, RequestFailed or EngineUnusable."""
    try:
        # A redirect would take the key to another server.
        async with session.request(method, url, json=body, allow_redirects=False) as response:
            text = (await _read(response.content)).decode("utf-8", errors="replace")
    except TimeoutError:
        raise RetryableError(EngineFailure.TIMEOUT, f"no whole answer within {session.timeout.total:g} s") from None
    except aiohttp.ClientSSLError as error:
        raise EngineUnusable(f"{url}: no trusted connection ({_line(error)}); fix its certificate or --url") from error
    except (aiohttp.ClientError, OSError) as error:
        raise RetryableError(EngineFailure.UNREACHABLE, _line(error)) from error
    if response.status != 200:
        raise _status_error(response.status, response.headers, url, text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RetryableError(EngineFailure.GARBAGE, f"not JSON: {_line(text) or 'empty'}") from None


async def _read(content: aiohttp.StreamReader) -> bytes:
    data = b""
    while chunk := await content.read(1 << 16):
        data += chunk
        if len(data) > _MAX_RESPONSE_BYTES:
            raise RetryableError(EngineFailure.GARBAGE, f"an answer of more than {_MAX_RESPONSE_BYTES} bytes")
    return data


def _status_error(status: int, headers: Mapping[str, str], url: str, text: str) -> Exception:
    """The error for this status: wrong setup (EngineUnusable), wrong request, or a fault that may pass."""
    detail = f"{status} {_line(text)}"
    if status in (401, 403):
        return EngineUnusable(f"{url} wants a key, or another one ({detail}); set {API_KEY_VARIABLE}")
    if status == 402 or "insufficient_quota" in text:
        return EngineUnusable(f"the account at {url} has no credit left ({detail}); raise its limit")
    if status == 404:
        return EngineUnusable(f"{url} or the model does not exist ({detail}); give another --url or --model")
    if 300 <= status < 400:
        return EngineUnusable(f"{url} has moved ({status}); give --url {headers.get('Location', 'its new address')}")
    if status in _RETRIED or status >= 500:
        wait = headers.get("Retry-After", "")
        pause = float(wait) if wait.replace(".", "", 1).isdecimal() else 0.0  # ours, if the header is missing or a date
        return RetryableError(_RETRIED.get(status, EngineFailure.SERVER), detail, pause)
    return RequestFailed(EngineFailure.REFUSED, detail)


def _line(words: object) -> str:
    return " ".join(str(words).split())[:300]
