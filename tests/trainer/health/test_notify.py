"""Events posted to a local server, and addresses that are wrong, secret or out of reach."""

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pipeline.core.errors import JobFailed, UsageError
from trainer.health import notify
from trainer.health.notify import Notifier, check_address

SECRET = "s3cr3t-t0ken"


class Receiver(ThreadingHTTPServer):
    """Records what is posted to it; `status` is its answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.requests = 204, list[tuple[str, dict[str, str], Any]]()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), json.loads(body)))
        self.send_response(self.server.status)
        if self.server.status == 302:
            self.send_header("Location", f"http://{self.server.host}/elsewhere")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_PAUSE_SECONDS", 0.0)


def notifier(url: str | None) -> Notifier:
    return Notifier(url, run="/data/my run", stage="256", step=7, stop_step=7)


def test_an_event_says_what_happened_where_and_when(receiver: Receiver) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    with notifier(f"http://{receiver.host}/hook?token={SECRET}") as sender:
        sender.send("stalled", "no step\nfor a while")
        while not receiver.requests:
            time.sleep(0.01)
    [(path, headers, stalled), (_, _, ended)] = receiver.requests
    assert path == f"/hook?token={SECRET}"
    assert headers["Content-Type"] == "application/json"
    assert before <= datetime.fromisoformat(stalled.pop("time")) <= datetime.now(UTC)
    assert stalled == {
        "event": "stalled", "run": "my run", "stage": "256", "step": 7, "reason": "no step for a while",
    }  # fmt: skip
    assert (ended["event"], ended["reason"]) == ("ended", "7 of 7 steps")


@pytest.mark.parametrize(
    ("error", "event", "reason"),
    [
        (JobFailed("the disk is full"), "failed", "the disk is full"),
        (KeyError(), "failed", "KeyError"),
        (KeyboardInterrupt(), "ended", "interrupted after 3 of 7 steps"),
        (None, "ended", "stopped after 3 of 7 steps"),
    ],
)
def test_the_end_of_a_job_is_an_event(receiver: Receiver, error: BaseException | None, event: str, reason: str) -> None:
    def job() -> None:
        with notifier(f"http://{receiver.host}") as sender:
            sender.step = 3
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            job()
    else:
        job()
    [(_, _, body)] = receiver.requests
    assert (body["event"], body["step"]) == (event, 3)
    assert body["reason"].startswith(reason)


def test_credentials_are_sent_as_a_header(receiver: Receiver) -> None:
    with notifier(f"http://me:{SECRET}%40@{receiver.host}/"):
        pass
    [(_, headers, _)] = receiver.requests
    assert headers["Authorization"] == f"Basic {base64.b64encode(f'me:{SECRET}@'.encode()).decode()}"
    assert headers["Host"] == receiver.host


@pytest.mark.parametrize("status", [302, 404, 500])
def test_an_address_that_refuses_costs_a_warning(
    receiver: Receiver, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    receiver.status = status
    with notifier(f"http://me:{SECRET}@{receiver.host}/{SECRET}"):
        pass
    assert [path for path, _, _ in receiver.requests] == [f"/{SECRET}"] * 2, "redirects are not followed"
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        f"run: posting to the address of --notify failed: it answers {status}; 'ended' was not sent\n"
    )


def test_an_address_out_of_reach_costs_a_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "_POST_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        host = f"127.0.0.1:{silent.getsockname()[1]}"
        with notifier(f"http://{host}/{SECRET}"):
            pass
    for url in (f"http://{host}/{SECRET}", f"https://{host}/{SECRET}", f"http://{SECRET}.invalid/"):
        with notifier(url):
            pass
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 4, printed
    assert all(line.startswith("run: posting to the address of --notify failed: ") for line in lines)
    assert SECRET not in printed.err + printed.out


def test_the_end_of_a_job_waits_for_unsent_events_only_so_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(notify, "_CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(notify, "_deliver", lambda *_: answers.wait(300))
    with notifier("http://host"):
        pass
    answers.set()
    assert "no answer within" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url",
    [
        f"ftp://host/{SECRET}",
        f"file:///{SECRET}",
        f"host/{SECRET}",
        f"http:///{SECRET}",
        f"http://host:70000/{SECRET}",
        f"http://[::1/{SECRET}",
        f"http://host/{SECRET} x",
        f"http://host/{SECRET}\n",
        f"http://höst/{SECRET}",
        "",
    ],
)
def test_other_addresses_are_refused_without_showing_them(url: str) -> None:
    with pytest.raises(UsageError, match="--notify") as refused:
        check_address(url)
    assert SECRET not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_address_is_no_part_of_the_text_of_a_notifier() -> None:
    assert SECRET not in repr(notifier(f"http://{SECRET}"))


def test_without_an_address_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "_post", lambda *_: pytest.fail("sent"))
    with notifier(None) as sender:
        sender.send("stalled", "no step")
