"""The page as its visitors and its user meet it: a served page over HTTP, and the command line."""

import contextlib
import html
import itertools
import json
import math
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import httpx
import pytest

from trainer.drawing.picture_files import read_metadata
from trainer.web.form import FORM, form_of

RunJob = Callable[..., CompletedProcess[str]]

GOOD: dict[str, Any] = {
    "prompt": "red star", "negative": "", "width": 64, "height": 48, "steps": 2, "guidance": 3, "sampler": "euler",
    "seed": 7, "x_shift": 0.25, "y_shift": 0, "zoom": 1.5,
}  # fmt: skip


# --- The server -----------------------------------------------------------------------------------------------------


class Visitor:
    """Speaks gradio's protocol like a browser."""

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
    def events(self) -> Iterator[Iterator[dict[str, Any]]]:
        """Yields messages until the picture is done. Leaving the block closes the connection, like a closed tab."""
        where = f"gradio_api/queue/data?session_hash={self.session}"
        with self.http.stream("GET", where) as stream:
            yield (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: "))

    def message(self, **changed: Any) -> str:
        """Asks for a picture; the page's last message."""
        self.ask(**changed)
        with self.events() as events:
            *_, self.last = itertools.takewhile(lambda message: message["msg"] != "close_stream", events)
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


def test_a_picture_of_the_page_restores_its_form_and_is_redrawn_by_the_sampling_job(
    visitor: Visitor, call_job: RunJob, random_run: Path, tmp_path: Path
) -> None:
    visitor.message(prompt="", negative="空 fish", sampler="heun", y_shift=-0.5)
    path = tmp_path / visitor.file_name()
    path.write_bytes(visitor.picture())
    wanted = GOOD | {"prompt": "", "negative": "空 fish", "sampler": "heun", "y_shift": -0.5}
    assert form_of(read_metadata(path)) == wanted
    done = call_job("trainer/sample.py", "--run", random_run, "--out", tmp_path / "again", "--like", path)
    assert done.returncode == 0, done.stderr
    [again] = (tmp_path / "again").glob("*.png")
    assert again.read_bytes() == path.read_bytes()


def test_every_step_is_shown(visitor: Visitor) -> None:
    visitor.ask(steps=4)
    with visitor.events() as events:
        told = [json.dumps(message) for message in itertools.takewhile(lambda m: m["msg"] != "close_stream", events)]
    for done in range(5):
        assert any(f"step {done} of 4" in message for message in told), done


def test_sides_are_rounded_to_whole_tokens_with_a_notice(visitor: Visitor) -> None:
    message = visitor.message(width=61)
    assert message.startswith("64 × 48 pixels")
    assert "61 × 48 was rounded" in message


def test_invalid_input_is_answered_with_a_message(visitor: Visitor) -> None:
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


def test_a_full_queue_refuses_with_a_message_and_a_closed_tab_leaves_it(served: Any) -> None:
    drawing, waiting, late = (Visitor(served.url) for _ in range(3))
    before = late.figures()
    drawing.ask(steps=1000)
    with drawing.events() as events:
        next(message for message in events if message["msg"] == "process_generating")
        waiting.ask(steps=1000)
        with waiting.events() as others:
            assert waiting.shown(next(m for m in others if m["msg"] == "process_generating")) == "1 before yours"
            assert late.figures()["hdm_page_queue_length"] == 1
            assert "the queue is full: 1 being drawn and 1 waiting" in late.message()
    # Both have left, and 2,000 steps would take minutes. The server notices at the next sign of life that it sends.
    deadline = time.monotonic() + 120
    while not late.message(steps=2).startswith("64 × 48") and time.monotonic() < deadline:
        time.sleep(0.2)
    after = late.figures()
    assert after['hdm_page_refused_total{reason="queue_full"}'] > before['hdm_page_refused_total{reason="queue_full"}']
    assert after["hdm_page_queue_length"] == 0
    assert after["hdm_page_pictures_total"] == before["hdm_page_pictures_total"] + 1
    assert after["hdm_page_seconds_per_picture_count"] == after["hdm_page_pictures_total"]
    assert after["hdm_page_failed_total"] == 0


def test_only_the_page_is_answered_with_a_policy_that_keeps_it_to_this_server(visitor: Visitor) -> None:
    page = visitor.http.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "http" not in page.headers["content-security-policy"]
    for address in (
        "file=http://192.0.2.1/", "file=/etc/passwd", "proxy=http://192.0.2.1/", "upload_progress", "vibe-code",
        "openapi.json", "runs", "../monitoring",
    ):  # fmt: skip
        assert visitor.http.get(f"gradio_api/{address}").status_code in (403, 404), address
    assert visitor.http.post("gradio_api/upload", files={"files": b"x"}).status_code == 404


def test_requests_larger_than_a_form_are_refused(visitor: Visitor) -> None:
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


def test_bad_input_is_refused_in_one_line(call_job: RunJob, random_run: Path, tmp_path: Path) -> None:
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


def test_listening_on_other_addresses_prints_a_warning(call_job: RunJob, tmp_path: Path) -> None:
    arguments = ("trainer/serve.py", "--run", tmp_path, "--port", 0)
    warning = call_job(*arguments, "--host", "0.0.0.0").stdout
    assert warning.count("\n") == 1
    assert "WARNING: listening on 0.0.0.0: everybody" in warning
    assert "--password-file" in warning
    assert call_job(*arguments).stdout == ""
