"""The page without a browser: what its form means, whose turn it is, and what its server answers."""

import asyncio
import contextlib
import html
import itertools
import json
import math
import re
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import astuple
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from pipeline.core.errors import UsageError
from trainer.diffusion.positions import camera, full_position_map
from trainer.drawing.pictures import PictureModel, read_origin
from trainer.web.camera_outline import view
from trainer.web.form import FORM, Limits, example_rows, form_of, read_form, size_presets
from trainer.web.live import Drawn, ModelFacts, Step, follow
from trainer.web.page_metrics import PageFigures
from trainer.web.passwords import Attempts, login_check, read_logins
from trainer.web.turns import QueueFull, Ticket, Turns

pytestmark = pytest.mark.usefixtures("one_thread")

RunJob = Callable[..., CompletedProcess[str]]

LIMITS = Limits(largest_side=128, most_steps=1000)
GOOD: dict[str, Any] = {
    "prompt": "red star", "negative": "", "width": 64, "height": 48, "steps": 2, "guidance": 3, "sampler": "euler",
    "seed": 7, "x_shift": 0.25, "y_shift": 0, "zoom": 1.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(random_run: Path) -> PictureModel:
    return PictureModel.load(random_run, torch.device("cpu"))


# --- The form -------------------------------------------------------------------------------------------------------


def test_a_form_is_one_picture_and_a_browsers_numbers_are_of_one_type() -> None:
    request = read_form(GOOD | {"width": 64.0, "seed": 7.0, "zoom": 2}, LIMITS)
    assert (request.prompt, request.seed, request.settings.width, request.settings.zoom) == ("red star", 7, 64, 2.0)
    assert isinstance(request.seed, int)
    assert isinstance(request.settings.zoom, float)
    assert read_form(GOOD | {"prompt": None, "negative": None}, LIMITS).prompt == ""


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("zoom", 0, "zoom"),
        ("zoom", -1, "above 0"),
        ("zoom", math.nan, "zoom"),
        ("zoom", math.inf, "zoom"),
        ("x_shift", math.nan, "x_shift"),
        ("y_shift", -math.inf, "y shift"),
        ("guidance", math.nan, "guidance"),
        ("guidance", 10**400, "guidance"),
        ("width", 0, "width"),
        ("width", -64, "width"),
        ("width", 129, "128 pixels at most"),
        ("height", 10**9, "128 pixels at most"),
        ("height", 10**400, "height is out of all bounds"),
        pytest.param("width", -(10**5000), "width is out of all bounds", id="width-of-5000-digits"),
        ("height", 64.5, "height 64.5: must be a whole number"),
        ("height", math.nan, "height"),
        ("height", math.inf, "height"),
        ("width", None, "width is empty"),
        ("width", "", "width is empty"),
        ("width", "wide", 'width "wide"'),
        ("width", True, "width"),
        ("width", [64], "width"),
        ("steps", 0, "steps"),
        ("steps", 1001, "1000 at most"),
        ("seed", -1, "seed"),
        ("seed", 2.0**70, "seed"),
        ("sampler", "ddim", "euler, heun"),
        ("sampler", None, "euler, heun"),
        ("sampler", {"a": 1}, "sampler"),
        ("prompt", 3, "prompt"),
        ("prompt", "\ud800", "prompt"),
        ("negative", "a" * 4001, "negative prompt has 4001 characters"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line_of_words(field: str, value: Any, named: str) -> None:
    with pytest.raises(ValueError) as refusal:
        read_form(GOOD | {field: value}, LIMITS)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_form_without_a_field_is_refused() -> None:
    with pytest.raises(ValueError, match="zoom is empty"):
        read_form({name: value for name, value in GOOD.items() if name != "zoom"}, LIMITS)


@pytest.mark.parametrize("resolution", [64, 256, 1024])
def test_presets_are_whole_tokens_of_about_the_area_that_was_trained_on(resolution: int) -> None:
    presets = size_presets(resolution, token=8, largest_side=4096)
    assert (resolution, resolution) in presets.values()
    assert {(height, width) for width, height in presets.values()} == set(presets.values())
    for width, height in presets.values():
        assert width % 8 == height % 8 == 0
        assert width * height == pytest.approx(resolution**2, rel=0.15)
    assert list(size_presets(resolution, 8, largest_side=resolution).values()) == [(resolution, resolution)]


def test_each_example_has_a_prompt_and_a_camera_that_can_be_asked_for() -> None:
    rows = example_rows([f"prompt {n}" for n in range(8)])
    assert len({row[1:] for row in rows}) > 4, "moves of several kinds"
    for number, (prompt, x_shift, y_shift, zoom) in enumerate(rows):
        camera_of_row = {"x_shift": x_shift, "y_shift": y_shift, "zoom": zoom}
        assert read_form(GOOD | {"prompt": prompt} | camera_of_row, LIMITS).prompt == f"prompt {number}"


# --- The outline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(64, 64), (128, 64), (64, 160)])
@pytest.mark.parametrize(("x_shift", "y_shift", "zoom"), [(0, 0, 1), (0.25, -0.5, 1), (0, 0, 2), (-0.3, 0.1, 0.7)])
def test_the_outline_is_where_the_camera_puts_the_edges_of_the_picture(
    width: int, height: int, x_shift: float, y_shift: float, zoom: float
) -> None:
    """The outermost tokens' centres are half a token inside of them."""
    rows, columns = height // 8, width // 8
    at_rest = full_position_map(width, height, rows, columns)
    half_y, half_x = (at_rest.amax(0) + torch.tensor([4.0, 4.0]) / math.sqrt(width * height)).tolist()
    moved = camera(at_rest, x_shift, y_shift, zoom)
    (top, left), (bottom, right) = moved.amin(0).tolist(), moved.amax(0).tolist()
    token_x, token_y = 1 / columns / zoom, 1 / rows / zoom  # half a token, in half sides of the frame
    expected = (left / half_x - token_x, top / half_y - token_y, right / half_x + token_x, bottom / half_y + token_y)
    assert astuple(view(width, height, x_shift, y_shift, zoom)) == pytest.approx(expected, abs=1e-5)


def test_a_camera_at_rest_sees_the_frame() -> None:
    assert astuple(view(96, 32, 0, 0, 1)) == (-1, -1, 1, 1)


# --- Turns ----------------------------------------------------------------------------------------------------------


async def _wait(turns: Turns, ticket: Ticket, done: list[Ticket]) -> None:
    async for _ in turns.until(ticket):
        pass
    done.append(ticket)


def test_turns_come_in_order_so_many_at_once_and_others_are_refused() -> None:
    async def check() -> None:
        turns, done = Turns(at_once=2, most_waiting=3), []
        tickets = [turns.take() for _ in range(5)]
        assert turns.waiting == 3
        with pytest.raises(QueueFull, match="2 being drawn and 3 waiting"):
            turns.take()
        waits = [asyncio.create_task(_wait(turns, ticket, done)) for ticket in tickets]
        await asyncio.sleep(0.01)
        assert done == tickets[:2]
        turns.leave(tickets[3])  # while it waits
        waits[3].cancel()
        await asyncio.sleep(0.01)
        assert done == tickets[:2]
        turns.leave(tickets[1])
        await asyncio.sleep(0.01)
        assert done == tickets[:3]
        turns.leave(tickets[0])
        await asyncio.sleep(0.01)
        assert done == [*tickets[:3], tickets[4]]
        assert turns.waiting == 0

    asyncio.run(check())


def test_who_waits_hears_how_many_are_before_them() -> None:
    async def check() -> None:
        turns = Turns(at_once=1, most_waiting=2)
        first, second, third = (turns.take() for _ in range(3))
        heard = []
        async for ahead in turns.until(third):
            heard.append(ahead)
            turns.leave({2: first, 1: second}[ahead])
        assert heard == [2, 1]

    asyncio.run(check())


# --- A picture while it is drawn ------------------------------------------------------------------------------------


def test_every_step_is_told_and_the_picture_is_the_models(model: PictureModel) -> None:
    request = read_form(GOOD | {"width": 60, "steps": 3}, LIMITS)

    async def told() -> list[Step | Drawn]:
        return [what async for what in follow(model, request)]

    *steps, drawn = asyncio.run(told())
    assert steps == [Step(1, 3), Step(2, 3), Step(3, 3)]
    assert isinstance(drawn, Drawn)
    assert (drawn.request.settings.width, drawn.request.settings.shift) == (64, (48 / 64) ** 0.5)
    [again] = model.draw(["red star"], [7], drawn.request.settings)
    np.testing.assert_array_equal(drawn.pixels, again)


def _drawing_threads() -> int:
    return sum(thread.name == "drawing" for thread in threading.enumerate())


def test_a_drawing_ends_when_nobody_follows_it(model: PictureModel) -> None:
    request = read_form(GOOD | {"steps": 1000}, LIMITS)

    async def leave() -> None:
        async with aclosing(follow(model, request)) as news:  # type: ignore[type-var]
            async for what in news:
                assert _drawing_threads() == 1
                if what == Step(2, 1000):
                    break
        deadline = time.monotonic() + 10
        while _drawing_threads() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    asyncio.run(leave())
    assert _drawing_threads() == 0


def test_a_picture_waits_for_the_last_step_of_one_that_was_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise whoever draws and stops, again and again, has the machine draw any number of pictures at once."""
    told: list[str] = []
    may_end = threading.Event()

    def draw_one(model: Any, request: str, on_step: Callable[[int, int], None]) -> Any:
        told.append(f"{request} begins")
        on_step(1, 2)
        if request == "first":
            may_end.wait(10)
        told.append(f"{request} ends")
        on_step(2, 2)
        return Drawn(np.zeros((1, 1, 3), np.uint8), request, {})  # type: ignore[arg-type]

    async def leave_and_draw() -> None:
        async with aclosing(follow(None, "first")) as news:  # type: ignore[type-var, arg-type]
            assert await anext(news) == Step(1, 2)
        async with aclosing(follow(None, "second")) as news:  # type: ignore[type-var, arg-type]
            second = asyncio.ensure_future(anext(news))
            await asyncio.sleep(0.05)
            assert told == ["first begins"]
            may_end.set()
            assert await second == Step(1, 2)
            assert told[:3] == ["first begins", "first ends", "second begins"]

    monkeypatch.setattr("trainer.web.live.draw_one", draw_one)
    asyncio.run(leave_and_draw())


def test_what_the_model_refuses_is_raised_where_it_is_followed(model: PictureModel) -> None:
    request = read_form(GOOD | {"width": 4096, "height": 4096}, Limits(largest_side=4096, most_steps=100))

    async def draw() -> None:
        async for _ in follow(model, request):
            raise AssertionError("refused before the first step")

    with pytest.raises(ValueError, match="ask for a smaller picture"):
        asyncio.run(draw())


# --- The server -----------------------------------------------------------------------------------------------------


class Visitor:
    """A browser's side of gradio's protocol."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=120)
        [self.draw] = [f for f in self.http.get("config").json()["dependencies"] if f["api_name"] == "draw"]
        self.session = secrets.token_hex(8)

    def ask(self, **changed: Any) -> None:
        data = [None, *({**GOOD, **changed}[name] for name in FORM)]  # the first is the session's state
        body = json.dumps({"data": data, "fn_index": self.draw["id"], "session_hash": self.session})
        headers = {"content-type": "application/json"}
        self.http.post("gradio_api/queue/join", content=body, headers=headers).raise_for_status()

    @contextlib.contextmanager
    def news(self) -> Iterator[Iterator[dict[str, Any]]]:
        """Messages until the picture is done; leaving the block closes the connection, as a closed tab does."""
        where = f"gradio_api/queue/data?session_hash={self.session}"
        with self.http.stream("GET", where) as stream:
            yield (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))

    def message(self, **changed: Any) -> str:
        """Ask, and what the page says in the end."""
        self.ask(**changed)
        with self.news() as news:
            *_, self.last = itertools.takewhile(lambda message: message["msg"] != "close_stream", news)
        assert self.last["msg"] == "process_completed"
        return self.shown(self.last)

    @staticmethod
    def shown(message: dict[str, Any]) -> str:
        return html.unescape(re.sub("<.*?>", "", str(message["output"]["data"][0])))

    def picture(self) -> bytes:
        [file, *_] = re.findall(r'"path": "([^"]+\.png)"', json.dumps(self.last))
        return self.http.get(f"gradio_api/file={file}").raise_for_status().content

    def file_name(self) -> str:
        [name, *_] = re.findall(r'"orig_name": "([^"]+\.png)"', json.dumps(self.last))
        return str(name)

    def figures(self) -> dict[str, float]:
        lines = self.http.get("metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


@pytest.fixture
def visitor(served: Any) -> Visitor:
    return Visitor(served.url)


def test_a_picture_is_the_file_that_the_sampling_job_writes(
    visitor: Visitor, call_job: RunJob, random_run: Path, tmp_path: Path
) -> None:
    assert visitor.message().startswith("64 × 48 pixels, 2 steps, seed 7")
    camera = ("--x-shift", 0.25, "--zoom", 1.5)
    size = ("--width", 64, "--height", 48, "--steps", 2, "--seed", 7)
    out = tmp_path / "of the job"
    done = call_job("trainer/sample.py", "--run", random_run, "--out", out, "--prompt", "red star", *size, *camera)
    [path] = out.glob("*.png")
    assert visitor.file_name() == path.name, done.stdout
    assert visitor.picture() == path.read_bytes()


def test_a_picture_of_the_page_brings_its_form_back_and_is_drawn_again_by_the_sampling_job(
    visitor: Visitor, call_job: RunJob, random_run: Path, tmp_path: Path
) -> None:
    visitor.message(prompt="", negative="空 fish", sampler="heun", y_shift=-0.5)
    path = tmp_path / visitor.file_name()
    path.write_bytes(visitor.picture())
    wanted = GOOD | {"prompt": "", "negative": "空 fish", "sampler": "heun", "y_shift": -0.5}
    assert form_of(read_origin(path)) == wanted
    done = call_job("trainer/sample.py", "--run", random_run, "--out", tmp_path / "again", "--like", path)
    assert done.returncode == 0, done.stderr
    [again] = (tmp_path / "again").glob("*.png")
    assert again.read_bytes() == path.read_bytes()


def test_every_step_is_shown(visitor: Visitor) -> None:
    visitor.ask(steps=4)
    with visitor.news() as news:
        told = [json.dumps(message) for message in itertools.takewhile(lambda m: m["msg"] != "close_stream", news)]
    for done in range(5):
        assert any(f"step {done} of 4" in message for message in told), done


def test_sides_that_are_no_whole_tokens_are_rounded_and_the_page_says_so(visitor: Visitor) -> None:
    message = visitor.message(width=61)
    assert message.startswith("64 × 48 pixels")
    assert "61 × 48 was rounded" in message


def test_whatever_is_sent_is_answered_in_words(visitor: Visitor) -> None:
    """Also what no browser would send: the log of the server must have no traceback (see `served`)."""
    refused = visitor.figures()['hdm_page_refused_total{reason="input"}']
    wrong = {
        "zoom": 0, "x_shift": math.nan, "width": 10**9, "height": None, "steps": 10**6, "seed": "one", "sampler": [1],
        "guidance": math.inf, "negative": {"a": 1},
    }  # fmt: skip
    for name, value in wrong.items():
        assert name.split("_")[0] in visitor.message(**{name: value}), name
    assert visitor.message(width="<script>") == 'width "<script>": must be a number'
    assert "&lt;script&gt;" in visitor.last["output"]["data"][0]
    assert visitor.figures()['hdm_page_refused_total{reason="input"}'] == refused + len(wrong) + 1


def test_a_full_queue_refuses_in_words_and_a_closed_tab_leaves_it(served: Any) -> None:
    drawing, waiting, late = (Visitor(served.url) for _ in range(3))
    before = late.figures()
    drawing.ask(steps=1000)
    with drawing.news() as news:
        next(message for message in news if message["msg"] == "process_generating")
        waiting.ask(steps=1000)
        with waiting.news() as others:
            assert waiting.shown(next(m for m in others if m["msg"] == "process_generating")) == "1 before yours"
            assert late.figures()["hdm_page_queue_length"] == 1
            assert "the queue is full: 1 being drawn and 1 waiting" in late.message()
    # Both have left, and 2,000 steps would take minutes. The server notices at the next sign of life that it sends.
    deadline = time.monotonic() + 20
    while not late.message(steps=2).startswith("64 × 48") and time.monotonic() < deadline:
        time.sleep(0.2)
    after = late.figures()
    assert after['hdm_page_refused_total{reason="queue_full"}'] > before['hdm_page_refused_total{reason="queue_full"}']
    assert after["hdm_page_queue_length"] == 0
    assert after["hdm_page_pictures_total"] == before["hdm_page_pictures_total"] + 1
    assert after["hdm_page_seconds_per_picture_count"] == after["hdm_page_pictures_total"]
    assert after["hdm_page_failed_total"] == 0


def test_nothing_but_the_page_is_answered_and_the_page_is_kept_to_its_server(visitor: Visitor) -> None:
    page = visitor.http.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "http" not in page.headers["content-security-policy"]
    for address in (
        "file=http://192.0.2.1/", "file=/etc/passwd", "proxy=http://192.0.2.1/", "upload_progress", "vibe-code",
        "openapi.json", "runs", "../monitoring",
    ):  # fmt: skip
        assert visitor.http.get(f"gradio_api/{address}").status_code in (403, 404), address
    assert visitor.http.post("gradio_api/upload", files={"files": b"x"}).status_code == 404


def test_no_more_is_read_of_a_request_than_a_form_can_have(visitor: Visitor) -> None:
    """With its length and without, and where no password is asked for."""
    parts = [b'{"data": ["', *[b"x" * 2**16] * 17, b'"]}']
    for address in ("gradio_api/queue/join", "gradio_api/cancel"):
        for body in (b"".join(parts), iter(parts)):
            sent = visitor.http.post(address, content=body, headers={"content-type": "application/json"})
            assert sent.status_code == 413, sent.text


# --- The command ----------------------------------------------------------------------------------------------------


def refused(done: CompletedProcess[str], *named: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for name in named:
        assert name in done.stderr


def test_what_cannot_be_served_is_refused_in_one_line(call_job: RunJob, random_run: Path, tmp_path: Path) -> None:
    def call(*arguments: object) -> CompletedProcess[str]:
        return call_job("trainer/serve.py", "--run", random_run, *arguments)

    refused(call_job("trainer/serve.py", "--run", tmp_path, "--port", 0), "no checkpoint", "trainer/run.py")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused(call("--port", port), f"port {port}", "taken", f"--port {port + 1}")
    refused(call("--port", 65536), "--port 65536")
    refused(call("--port", "http"), "--port")
    refused(call("--host", "192.0.2.1"), "192.0.2.1", "--host")
    refused(call("--queue", -1), "--queue")
    refused(call("--largest-side", 0), "--largest-side")
    refused(call("--largest-side", 4097), "4096")
    refused(call("--most-steps", 0), "--most-steps")
    refused(call("--replicas", 2), "--serve")
    refused(call("--password-file", tmp_path / "none"), "--password-file", "NAME:PASSWORD")
    (tmp_path / "empty").write_text("\n")
    refused(call("--password-file", tmp_path / "empty"), "empty")
    (tmp_path / "wrong").write_text("ann:secret\nbob\n")
    refused(call("--password-file", tmp_path / "wrong"), "line 2")


def test_listening_to_others_is_warned_of(call_job: RunJob, tmp_path: Path) -> None:
    arguments = ("trainer/serve.py", "--run", tmp_path, "--port", 0)
    warning = call_job(*arguments, "--host", "0.0.0.0").stdout
    assert warning.count("\n") == 1
    assert "WARNING: listening on 0.0.0.0: everybody" in warning
    assert "--password-file" in warning
    assert call_job(*arguments).stdout == ""


def test_only_names_with_their_own_password_are_let_in() -> None:
    check = login_check(None, "ann:secret:1\n bob:other ")
    assert check is not None
    assert check("ann", "secret:1")
    assert check("bob", "other")
    assert not check("ann", "other")
    assert not check("eve", "")
    assert not check("", "")
    assert login_check(None, None) is None
    with pytest.raises(UsageError, match="HDM_PAGE_PASSWORD"):
        login_check(None, "")


def test_a_page_with_a_password_shows_nothing_before_it_is_given(model: PictureModel, tmp_path: Path) -> None:
    from trainer.web.page import Studio, page_app

    turns = Turns(1, 1)
    figures = PageFigures(lambda: turns.waiting)
    studio = Studio(ModelFacts.of(model), LIMITS, lambda request: follow(model, request), turns, figures, tmp_path)
    app = httpx.ASGITransport(page_app(studio, read_logins("ann:secret", "here")))  # type: ignore[arg-type]
    (tmp_path / "a.png").write_bytes(b"a picture")

    async def visit() -> None:
        async with httpx.AsyncClient(transport=app, base_url="http://page") as client:

            async def seen() -> list[int]:
                return [(await client.get(at)).status_code for at in ("/config", f"/gradio_api/file={tmp_path}/a.png")]

            async def log_in(password: str) -> int:
                return (await client.post("/login", data={"username": "ann", "password": password})).status_code

            assert await seen() == [401, 401]
            assert (await log_in("wrong"), await seen()) == (400, [401, 401])
            assert (await log_in("secret"), await seen()) == (200, [200, 200])
            assert [await log_in("wrong") for _ in range(8)] == [400] * 8
            assert (await log_in("wrong"), await log_in("secret")) == (429, 429)
            assert await seen() == [200, 200]

    asyncio.run(visit())


def test_an_address_may_log_in_ten_times_a_minute() -> None:
    now = 100.0
    attempts = Attempts(lambda: now)
    assert [attempts.may("a") for _ in range(12)] == [True] * 10 + [False] * 2
    assert attempts.may("b")
    now += 60
    assert attempts.may("a")


def test_no_more_pictures_are_stored_than_a_disk_is_known_to_have_room_for(
    model: PictureModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all sessions together: not each is ended."""
    from trainer.web import page

    monkeypatch.setattr(page, "_MOST_STORED", 2)
    turns = Turns(1, 0)
    figures = PageFigures(lambda: turns.waiting)
    studio = page.Studio(ModelFacts.of(model), LIMITS, lambda request: follow(model, request), turns, figures, tmp_path)

    async def draw(seed: int) -> Any:
        return [what async for what in page.drawing(studio, GOOD | {"seed": seed})][-1]

    first, *others = (asyncio.run(draw(seed)).path for seed in range(3))
    assert sorted(tmp_path.glob("*/*.png")) == sorted(others)
    assert not first.parent.exists()


def test_a_drawing_that_fails_is_told_and_counted_and_the_next_one_is_drawn(
    model: PictureModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.web.page import Studio, drawing

    async def fails_once(request: Any) -> AsyncIterator[Step | Drawn]:
        failing.append(request)
        if len(failing) == 1:
            raise RuntimeError("a cable\nwas cut")
        async for what in follow(model, request):
            yield what

    failing: list[Any] = []
    turns = Turns(1, 0)
    figures = PageFigures(lambda: turns.waiting)
    studio = Studio(ModelFacts.of(model), LIMITS, fails_once, turns, figures, tmp_path)

    async def shown() -> list[Any]:
        return [what async for what in drawing(studio, GOOD)]

    assert "failed (RuntimeError: a cable)" in asyncio.run(shown())[-1]
    assert "was cut" in capsys.readouterr().err
    assert asyncio.run(shown())[-1].path.exists()
    assert b"hdm_page_failed_total 1.0" in figures.text()
