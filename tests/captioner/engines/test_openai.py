"""Failures of a server with OpenAI's API: which are retried, which concern one request, which end the job."""

import asyncio
import base64
import io
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from captioner.engines import API_KEY_VARIABLE, Completion, EngineFailure, EngineUnusable, RequestFailed
from captioner.engines.openai import OpenAIEngine, RetryableError, ServerSettings, data_url, parse_completion
from captioner.prompts import Prompt
from captioner.sampling import CompletionParams

PICTURE = Image.new("RGB", (32, 16), (200, 30, 30))
PROMPT = Prompt("Describe it.", "Hints: star.")
PARAMS = CompletionParams(seed=7, temperature=0.3, top_p=0.8, max_tokens=64)
GOOD = {
    "choices": [{"message": {"content": "A red star."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 12, "completion_tokens": 5},
}
HANGS_UP = "hangs up"
SILENCE = "silence"


class Server(ThreadingHTTPServer):
    """Gives the answers in its list, then good completions; records all requests."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.models = ["pixtral"]
        self.answers: list[Any] = []  # (status, body or JSON, headers), HANGS_UP or SILENCE
        self.asked: list[tuple[float, dict[str, str], Any]] = []
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not report clients that hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": model} for model in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((time.monotonic(), dict(self.headers), body))
            answer = self.server.answers.pop(0) if self.server.answers else (200, GOOD)
        if answer == SILENCE:
            time.sleep(0.4)
        if answer in (HANGS_UP, SILENCE):
            self.close_connection = True
            return
        self._send(*answer)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server: Server, **settings: Any) -> Completion:
    """One completion, with short pauses between tries."""

    async def connect_and_ask() -> Completion:
        settings_ = {"tries": 3, "timeout": 5.0, "first_pause": 0.01} | settings
        engine = await OpenAIEngine.connect(ServerSettings(url=server.url, **settings_))
        try:
            return await engine.complete(PROMPT, PICTURE, PARAMS)
        finally:
            await engine.close()

    return asyncio.run(connect_and_ask())


def test_a_completion_has_text_reason_and_tokens(server: Server) -> None:
    assert ask(server) == Completion("A red star.", "stop", 12, 5)


def test_the_request_is_one_message_with_the_picture_between_the_texts(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    ask(server)
    [(_, headers, body)] = server.asked
    assert headers["Authorization"] == "Bearer secret"
    [message] = body.pop("messages")
    assert body == {"model": "pixtral", "seed": 7, "temperature": 0.3, "top_p": 0.8, "max_tokens": 64}
    before, picture, after = message["content"]
    assert (before["text"], after["text"]) == ("Describe it.", "Hints: star.")
    sent = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].partition(",")[2])))
    assert (sent.format, sent.size) == ("JPEG", PICTURE.size)
    assert all(abs(a - b) <= 3 for a, b in zip(sent.getpixel((5, 5)), (200, 30, 30), strict=True))


def test_thin_coloured_lines_keep_their_colour() -> None:
    lines = Image.new("RGB", (32, 32), "white")
    for x in range(0, 32, 2):
        lines.paste((255, 0, 0), (x, 0, x + 1, 32))
    sent = Image.open(io.BytesIO(base64.b64decode(data_url(lines).partition(",")[2])))
    assert sent.getpixel((8, 8))[1] < 60 < 200 < sent.getpixel((9, 8))[1]


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        ((429, {"error": "slow down"}), EngineFailure.BUSY),
        ((500, b"oops"), EngineFailure.SERVER),
        ((503, b""), EngineFailure.SERVER),
        (HANGS_UP, EngineFailure.UNREACHABLE),
        ((200, b"<html>"), EngineFailure.GARBAGE),
        ((200, b""), EngineFailure.GARBAGE),
        ((200, {"choices": []}), EngineFailure.GARBAGE),
        ((200, [1, 2]), EngineFailure.GARBAGE),
        ((200, {"choices": [{"message": {"content": ["a", "list"]}}]}), EngineFailure.GARBAGE),
        (
            (200, {"choices": [{"message": {"content": "A star."}, "finish_reason": {"type": "stop"}}]}),
            EngineFailure.GARBAGE,
        ),
        ((200, {"choices": [{"message": {"content": "A star."}, "finish_reason": 3}]}), EngineFailure.GARBAGE),
        ((200, GOOD | {"usage": {"prompt_tokens": 10**11}}), EngineFailure.GARBAGE),
        ((200, GOOD | {"usage": {"prompt_tokens": float("inf")}}), EngineFailure.GARBAGE),
        ((200, GOOD | {"usage": {"prompt_tokens": -1}}), EngineFailure.GARBAGE),
        ((200, b"[" * 200_000), EngineFailure.GARBAGE),
        ((200, GOOD, {"Content-Length": "9999999"}), EngineFailure.TIMEOUT),
        ((200, b" " * (1 << 20) + b" "), EngineFailure.GARBAGE),
        (SILENCE, EngineFailure.TIMEOUT),
    ],
)
def test_a_fault_that_may_pass_is_retried_and_then_fails_the_request(
    server: Server, fault: Any, failure: EngineFailure
) -> None:
    server.answers = [fault] * 2
    assert ask(server, timeout=0.2).text == "A red star."
    assert len(server.asked) == 3

    server.answers = [fault] * 3
    with pytest.raises(RequestFailed) as failed:
        ask(server, timeout=0.2)
    assert failed.value.failure is failure
    assert "\n" not in str(failed.value)
    assert len(server.asked) == 6


def test_pauses_double_and_a_server_may_ask_for_longer_ones(server: Server) -> None:
    server.answers = [(500, b""), (500, b""), (429, b"", {"Retry-After": "0.4"}), (429, b"", {"Retry-After": "Tue"})]
    ask(server, tries=5, first_pause=0.05)
    times = [at for at, _, _ in server.asked]
    first, second, third, fourth = (b - a for a, b in itertools.pairwise(times))
    assert first >= 0.025
    assert second >= 0.05
    assert third >= 0.4
    assert fourth >= 0.2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_not_retried(server: Server, status: int) -> None:
    server.answers = [(status, {"error": {"message": "too long"}})]
    with pytest.raises(RequestFailed, match="too long") as failed:
        ask(server)
    assert failed.value.failure is EngineFailure.REFUSED
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, b"no"), f"wants a key, .*set {API_KEY_VARIABLE}"),
        ((403, b"no"), f"wants a key, .*set {API_KEY_VARIABLE}"),
        ((402, b"no"), "has no credit left.*raise its limit"),
        ((429, {"error": {"code": "insufficient_quota"}}), "has no credit left.*raise its limit"),
        ((404, b"no"), "give another --url or --model"),
        ((308, b"", {"Location": "https://elsewhere.example/v1"}), "give --url https://elsewhere.example/v1"),
    ],
)
def test_a_wrong_setup_ends_the_job_at_once_with_advice(server: Server, answer: Any, message: str) -> None:
    server.answers = [answer]
    with pytest.raises(EngineUnusable, match=message) as unusable:
        ask(server)
    assert "\n" not in str(unusable.value)
    assert len(server.asked) == 1


def test_the_only_model_of_a_server_is_used_and_one_of_several_must_be_named(server: Server) -> None:
    server.models = ["one", "two"]
    with pytest.raises(EngineUnusable, match="has 2 models; give --model one of: one, two"):
        ask(server)
    with pytest.raises(EngineUnusable, match="has no model three; give --model one of: one, two"):
        ask(server, model="three")
    ask(server, model="two")
    assert server.asked[0][2]["model"] == "two"


def test_an_unreachable_server_is_reported() -> None:
    server = Server()
    server.server_close()
    with pytest.raises(EngineUnusable, match=r"/v1/models: server unreachable.*running there\?"):
        ask(server)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "/models"])
def test_an_invalid_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="not the address of a server"):
        ServerSettings(url=url)


def test_a_password_in_the_address_and_a_key_of_two_lines_are_refused_without_being_shown() -> None:
    for bad in ({"url": "http://me:hunter2@h:1"}, {"url": "http://h:1", "key": "hunter2\n"}):
        with pytest.raises(ValueError, match=API_KEY_VARIABLE) as refused:
            ServerSettings(**bad)
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_address_may_end_with_a_slash_or_v1(url: str) -> None:
    assert ServerSettings(url=url).api == "http://h:1/v1"


@pytest.mark.parametrize("message", [{"content": None}, {"content": ""}, {}])
def test_an_answer_without_text_is_valid(message: dict[str, Any]) -> None:
    assert parse_completion({"choices": [{"message": message}]}) == Completion("", None, 0, 0)


def test_lone_surrogates_are_replaced() -> None:
    answer = json.loads(
        r'{"choices": [{"message": {"content": "\ud800 star \ud83d\ude00"}, "finish_reason": "\udc00"}]}'
    )
    completion = parse_completion(answer)
    assert (completion.text, completion.finish_reason) == ("\ufffd star \U0001f600", "\ufffd")


def test_a_refusal_is_the_text() -> None:
    answer = {"choices": [{"message": {"content": None, "refusal": "I can't."}, "finish_reason": "stop"}]}
    assert parse_completion(answer).text == "I can't."


@pytest.mark.parametrize("answer", [None, 3, {}, {"choices": [{}]}, {"choices": [None]}, {"choices": "text"}])
def test_other_json_is_not_a_completion(answer: Any) -> None:
    with pytest.raises(RetryableError):
        parse_completion(answer)


def test_concurrent_requests_are_not_limited(server: Server) -> None:
    meet = threading.Barrier(150, timeout=120)
    answered: Callable[..., None] = _Handler._send

    class Waiting(_Handler):
        def _send(self, *arguments: Any) -> None:
            if self.command == "POST":
                meet.wait()
            answered(self, *arguments)

    server.RequestHandlerClass = Waiting

    async def all_at_once() -> list[Completion]:
        engine = await OpenAIEngine.connect(ServerSettings(url=server.url, tries=1, timeout=120))
        try:
            return await asyncio.gather(*(engine.complete(PROMPT, PICTURE, PARAMS) for _ in range(150)))
        finally:
            await engine.close()

    assert len(asyncio.run(all_at_once())) == 150


def unsupported(name: str) -> tuple[int, dict[str, Any]]:
    message = f"Unsupported parameter: '{name}' is not supported with this model."
    return 400, {"error": {"message": message, "param": name, "code": "unsupported_parameter"}}


def test_parameters_that_a_server_refuses_are_renamed_or_left_out_for_good(server: Server) -> None:
    server.answers = [unsupported("max_tokens"), unsupported("temperature")]

    async def ask_twice() -> None:
        engine = await OpenAIEngine.connect(ServerSettings(url=server.url, tries=1))
        try:
            for _ in range(2):
                assert (await engine.complete(PROMPT, PICTURE, PARAMS)).text == "A red star."
        finally:
            await engine.close()

    asyncio.run(ask_twice())
    parameters = [set(body) - {"model", "messages"} for _, _, body in server.asked]
    assert parameters == [
        {"seed", "temperature", "top_p", "max_tokens"},
        {"seed", "temperature", "top_p", "max_completion_tokens"},
        {"seed", "top_p", "max_completion_tokens"},
        {"seed", "top_p", "max_completion_tokens"},
    ]
    assert server.asked[1][2]["max_completion_tokens"] == PARAMS.max_tokens


@pytest.mark.parametrize(
    "answer",
    [
        (400, {"error": "max_tokens must be at most 32"}),
        (400, {"error": "the picture is not supported"}),
        (422, {"error": "temperature must be positive"}),
    ],
)
def test_other_refusals_are_told_in_the_servers_words(server: Server, answer: Any) -> None:
    server.answers = [answer]
    with pytest.raises(RequestFailed) as refused:
        ask(server)
    assert answer[1]["error"] in refused.value.detail
    assert len(server.asked) == 1


def test_a_server_that_refuses_a_parameter_again_and_again_is_not_asked_for_ever(server: Server) -> None:
    server.answers = [unsupported("max_tokens")] * 5
    with pytest.raises(RequestFailed, match="max_tokens"):
        ask(server)
    assert len(server.asked) == 2
