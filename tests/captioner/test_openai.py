"""A server of OpenAI's API on bad days: whose failure is whose, what is tried again and how often."""

import asyncio
import base64
import io
import itertools
import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from captioner.engines import Completion, Draw, EngineUnusable, Failure, RequestFailed
from captioner.engines.openai import KEY, OpenAIEngine, ServerSettings, TryAgain, completion_of, data_url
from captioner.prompts import Prompt, Sampling

PICTURE = Image.new("RGB", (32, 16), (200, 30, 30))
PROMPT = Prompt("Describe it.", "Hints: star.")
DRAW = Draw(seed=7, temperature=0.3, top_p=0.8, max_tokens=64)
GOOD = {
    "choices": [{"message": {"content": "A red star."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 12, "completion_tokens": 5},
}
HANGS_UP = "hangs up"
SILENCE = "silence"


class Server(ThreadingHTTPServer):
    """Answers with what it is told, in order, and with a good completion after that; remembers what it was asked."""

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
        """A client that has gone is nothing to report."""


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
            time.sleep(1.5)
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
    monkeypatch.delenv(KEY, raising=False)
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server: Server, **settings: Any) -> Completion:
    """One completion, with tries that follow each other quickly."""

    async def connect_and_ask() -> Completion:
        patience = {"tries": 3, "timeout": 5.0, "first_pause": 0.01} | settings
        engine = await OpenAIEngine.connect(ServerSettings(url=server.url, **patience))
        try:
            return await engine.complete(PROMPT, PICTURE, DRAW)
        finally:
            await engine.close()

    return asyncio.run(connect_and_ask())


def test_a_completion_has_text_reason_and_tokens(server: Server) -> None:
    assert ask(server) == Completion("A red star.", "stop", 12, 5)


def test_the_request_is_one_message_with_the_picture_between_the_texts(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "secret")
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
        ((429, {"error": "slow down"}), Failure.BUSY),
        ((500, b"oops"), Failure.SERVER),
        ((503, b""), Failure.SERVER),
        (HANGS_UP, Failure.UNREACHABLE),
        ((200, b"<html>"), Failure.GARBAGE),
        ((200, b""), Failure.GARBAGE),
        ((200, {"choices": []}), Failure.GARBAGE),
        ((200, [1, 2]), Failure.GARBAGE),
        ((200, {"choices": [{"message": {"content": ["a", "list"]}}]}), Failure.GARBAGE),
        ((200, {"choices": [{"message": {"content": "A star."}, "finish_reason": {"type": "stop"}}]}), Failure.GARBAGE),
        ((200, {"choices": [{"message": {"content": "A star."}, "finish_reason": 3}]}), Failure.GARBAGE),
        ((200, GOOD | {"usage": {"prompt_tokens": 10**11}}), Failure.GARBAGE),
        ((200, GOOD | {"usage": {"prompt_tokens": float("inf")}}), Failure.GARBAGE),
        ((200, GOOD | {"usage": {"prompt_tokens": -1}}), Failure.GARBAGE),
        ((200, b"[" * 200_000), Failure.GARBAGE),
        ((200, GOOD, {"Content-Length": "9999999"}), Failure.TIMEOUT),
        ((200, b" " * (1 << 20) + b" "), Failure.GARBAGE),
        (SILENCE, Failure.TIMEOUT),
    ],
)
def test_what_may_pass_is_tried_again_so_often_and_then_is_the_requests_failure(
    server: Server, fault: Any, failure: Failure
) -> None:
    server.answers = [fault] * 2
    assert ask(server, timeout=0.5).text == "A red star."
    assert len(server.asked) == 3

    server.answers = [fault] * 3
    with pytest.raises(RequestFailed) as failed:
        ask(server, timeout=0.5)
    assert failed.value.failure is failure
    assert "\n" not in str(failed.value)
    assert len(server.asked) == 6


def test_pauses_double_and_a_server_may_ask_for_longer_ones(server: Server) -> None:
    server.answers = [(500, b""), (500, b""), (429, b"", {"Retry-After": "0.6"}), (429, b"", {"Retry-After": "Tue"})]
    ask(server, tries=5, first_pause=0.1)
    times = [at for at, _, _ in server.asked]
    first, second, third, fourth = (b - a for a, b in itertools.pairwise(times))
    assert first >= 0.05
    assert second >= 0.1
    assert third >= 0.6
    assert fourth >= 0.4


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_is_not_tried_again(server: Server, status: int) -> None:
    server.answers = [(status, {"error": {"message": "too long"}})]
    with pytest.raises(RequestFailed, match="too long") as failed:
        ask(server)
    assert failed.value.failure is Failure.REFUSED
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("answer", "mend"),
    [
        ((401, b"no"), f"wants a key, .*set {KEY}"),
        ((403, b"no"), f"wants a key, .*set {KEY}"),
        ((402, b"no"), "not paid for"),
        ((429, {"error": {"code": "insufficient_quota"}}), "not paid for"),
        ((404, b"no"), "give another --url or --model"),
        ((308, b"", {"Location": "https://elsewhere.example/v1"}), "give --url https://elsewhere.example/v1"),
    ],
)
def test_what_will_never_work_is_said_once_with_its_mend(server: Server, answer: Any, mend: str) -> None:
    server.answers = [answer]
    with pytest.raises(EngineUnusable, match=mend) as unusable:
        ask(server)
    assert "\n" not in str(unusable.value)
    assert len(server.asked) == 1


def test_the_only_model_of_a_server_is_taken_and_of_several_one_must_be_named(server: Server) -> None:
    server.models = ["one", "two"]
    with pytest.raises(EngineUnusable, match="has 2 models; give --model one of: one, two"):
        ask(server)
    with pytest.raises(EngineUnusable, match="has no model three; give --model one of: one, two"):
        ask(server, model="three")
    ask(server, model="two")
    assert server.asked[0][2]["model"] == "two"


def test_a_server_that_is_not_there_is_said_to_be() -> None:
    server = Server()
    server.server_close()
    with pytest.raises(EngineUnusable, match=r"/v1/models: server unreachable.*running\?"):
        ask(server)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "/models"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="no address of a server"):
        ServerSettings(url=url)


def test_a_password_in_the_address_and_a_key_of_two_lines_are_refused_without_being_shown() -> None:
    for bad in ({"url": "http://me:hunter2@h:1"}, {"url": "http://h:1", "key": "hunter2\n"}):
        with pytest.raises(ValueError, match=KEY) as refused:
            ServerSettings(**bad)
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_api_is_found_below_any_spelling_of_the_address(url: str) -> None:
    assert ServerSettings(url=url).api == "http://h:1/v1"


@pytest.mark.parametrize("message", [{"content": None}, {"content": ""}, {}])
def test_no_text_is_an_answer(message: dict[str, Any]) -> None:
    assert completion_of({"choices": [{"message": message}]}) == Completion("", None, 0, 0)


def test_halves_of_characters_become_what_can_be_written() -> None:
    answer = json.loads(
        r'{"choices": [{"message": {"content": "\ud800 star \ud83d\ude00"}, "finish_reason": "\udc00"}]}'
    )
    completion = completion_of(answer)
    assert (completion.text, completion.finish_reason) == ("\ufffd star \U0001f600", "\ufffd")


def test_a_models_refusal_is_its_text() -> None:
    answer = {"choices": [{"message": {"content": None, "refusal": "I can't."}, "finish_reason": "stop"}]}
    assert completion_of(answer).text == "I can't."


@pytest.mark.parametrize("answer", [None, 3, {}, {"choices": [{}]}, {"choices": [None]}, {"choices": "text"}])
def test_anything_else_is_no_completion(answer: Any) -> None:
    with pytest.raises(TryAgain):
        completion_of(answer)


def test_as_many_requests_are_under_way_as_the_caller_starts(server: Server) -> None:
    meet = threading.Barrier(150, timeout=20)
    answered: Callable[..., None] = _Handler._send

    class Waiting(_Handler):
        def _send(self, *arguments: Any) -> None:
            if self.command == "POST":
                meet.wait()
            answered(self, *arguments)

    server.RequestHandlerClass = Waiting

    async def all_at_once() -> list[Completion]:
        engine = await OpenAIEngine.connect(ServerSettings(url=server.url, tries=1, timeout=30))
        try:
            return await asyncio.gather(*(engine.complete(PROMPT, PICTURE, DRAW) for _ in range(150)))
        finally:
            await engine.close()

    assert len(asyncio.run(all_at_once())) == 150


def test_a_draw_is_the_rows_own_by_attempt() -> None:
    sampling = Sampling(temperatures=(0.6, 0.2), top_p=0.7, max_tokens=99)
    first, second = (Draw.of(sampling, "danbooru:1", attempt) for attempt in (0, 1))
    assert (first.temperature, second.temperature) == (0.6, 0.2)
    assert (first.top_p, first.max_tokens) == (0.7, 99)
    assert len({first.seed, second.seed, Draw.of(sampling, "danbooru:2", 0).seed}) == 3


def test_failures_cross_processes() -> None:
    failed = pickle.loads(pickle.dumps(RequestFailed(Failure.BUSY, "429")))
    assert (failed.failure, failed.detail, str(failed)) == (Failure.BUSY, "429", "server busy: 429")
