"""Posts events of a training run to a web address. Imports only the standard library.

The address may hold a password or a token, so it is shown nowhere: messages speak of "the address of --notify".
"""

import base64
import json
import socket
import ssl
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPMessage
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pipeline.core.errors import UsageError

Event = Literal["ended", "failed", "stalled", "rolled back"]

_POST_SECONDS: Final = 10.0  # without an answer
_PAUSE_SECONDS: Final = 2.0  # between the two attempts
_CLOSE_SECONDS: Final = 25.0  # for all unsent events together, at the end of the job
_LONGEST_REASON: Final = 500  # characters


@dataclass(frozen=True)
class Notice:
    """A message of a worker that is also an event."""

    event: Event
    reason: str  # one line


def check_address(url: str) -> str:
    """Returns `url`. UsageError, without it, unless it is an http or https address that can be requested."""
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_valid = False
    if not (is_valid and url.isascii() and url.isprintable() and " " not in url):
        raise UsageError(
            "--notify (or HDM_NOTIFY): give an address https://HOST/PATH or http://HOST/PATH, percent-encoded; the "
            "given one is not shown because it may hold a secret"
        )
    return url


@dataclass
class Notifier:
    """Context manager around a training job: its end is the event "ended" or "failed".

    Sends in threads, so the training never waits, and the end of the job waits `_CLOSE_SECONDS` at most. An event that
    cannot be sent costs a warning on stderr.
    """

    url: str | None = field(repr=False)  # None: nothing is sent
    run: str  # path of the run folder; its last part is sent
    stage: str
    step: int  # optimizer steps taken, kept up to date by the job
    stop_step: int
    _threads: list[threading.Thread] = field(default_factory=list, repr=False)

    def send(self, event: Event, reason: str) -> None:
        """Posts {"event", "run", "stage", "step", "reason", "time"} as JSON; time is in UTC, in ISO 8601."""
        if self.url is None:
            return
        body = {
            "event": event,
            "run": Path(self.run).name,
            "stage": self.stage,
            "step": self.step,
            "reason": " ".join(reason.split())[:_LONGEST_REASON],
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        thread = threading.Thread(target=_deliver, args=(self.url, body), daemon=True, name="notify")
        thread.start()
        self._threads.append(thread)

    def __enter__(self) -> "Notifier":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        steps = f"{self.step} of {self.stop_step} steps"
        if error is None:
            self.send("ended", steps if self.step >= self.stop_step else f"stopped after {steps}, which are saved")
        elif isinstance(error, KeyboardInterrupt):
            self.send("ended", f"interrupted after {steps}; the newest checkpoint is kept")
        else:
            self.send("failed", str(error) or type(error).__name__)
        end = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            _warn(f"no answer within {_CLOSE_SECONDS:.0f} s")


def _deliver(url: str, body: dict[str, Any]) -> None:
    try:
        _post(url, body)
    except Exception:
        time.sleep(_PAUSE_SECONDS)
        try:
            _post(url, body)
        except Exception as error:
            _warn(f"{_cause(error)}; {body['event']!r} was not sent")


def _post(url: str, body: dict[str, Any]) -> None:
    parts = urlsplit(url)
    headers = {"Content-Type": "application/json", "User-Agent": "homemade-diffusion"}
    if parts.username is not None:  # urllib would take them for a part of the host's name
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(credentials.encode()).decode()}"
    address = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    request = Request(address, json.dumps(body).encode(), headers, method="POST")
    with build_opener(_NoRedirect).open(request, timeout=_POST_SECONDS):
        pass


class _NoRedirect(HTTPRedirectHandler):
    """A redirect is an error: urllib would send its credentials to another host, and a GET without the event."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


def _cause(error: Exception) -> str:
    """Never an error's own text, which may quote the address."""
    if isinstance(error, HTTPError):
        return f"it answers {error.code}"
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {_POST_SECONDS:.0f} s"
    if isinstance(cause, ssl.SSLError):
        return f"TLS failed ({cause.reason})"
    if isinstance(cause, socket.gaierror):
        return "its host is not known"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return type(cause).__name__


def _warn(why: str) -> None:
    print(f"run: posting to the address of --notify failed: {why}", file=sys.stderr, flush=True)
