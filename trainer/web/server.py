"""The HTTP server: the page at /, its metrics at /metrics, and nothing else of what gradio would answer."""

import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import gradio as gr
from fastapi import FastAPI, HTTPException
from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer.web.command import Logins
from trainer.web.page import STYLE, THEME, build_page
from trainer.web.page_metrics import MEDIA_TYPE
from trainer.web.picture_events import PageContext

# gradio also has addresses for uploads, for requests to other servers in the visitor's name, and to edit its source.
_ALLOWED: Final = (
    "app_id", "call/", "cancel", "file=/", "heartbeat/", "info", "login_check", "queue/", "reset", "startup-events",
    "theme.css", "token", "user",
)  # fmt: skip
_API: Final = "/gradio_api/"
_BLOCKED: Final = ("/monitoring", "/svelte", "/pwa_icon", f"{_API}deep_link")
_MAX_BODY: Final = 2**20  # bytes: a form is two texts and some numbers; read before a password is asked for
# The browser loads nothing from elsewhere. gradio's page has inline scripts, and evaluates functions such as that of
# the camera's outline.
_POLICY: Final = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
_LOGINS_PER_MINUTE: Final = 10


def page_app(context: PageContext, logins: Logins | None) -> ASGIApp:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(context.metrics.text(), media_type=MEDIA_TYPE)

    gr.set_static_paths([context.folder])  # served without a copy, byte for byte
    gr.mount_gradio_app(
        app,
        build_page(context),
        path="/",
        auth=logins,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        max_file_size=1,  # nothing is uploaded here
        ssr_mode=False,
        theme=THEME,
        css=STYLE,
    )
    return _RestrictedApp(app)


class LoginLimiter:
    """Allows ten logins a minute per address, so that passwords cannot be guessed. Successful ones count too, so that
    the limit reveals nothing about the password."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._minute_began = clock, clock()
        self._attempts: Counter[str] = Counter()

    def allow(self, address: str) -> bool:
        """Counts an attempt."""
        if self._clock() - self._minute_began >= 60:
            self._minute_began = self._clock()
            self._attempts.clear()
        self._attempts[address] += 1
        return self._attempts[address] <= _LOGINS_PER_MINUTE


class _RestrictedApp:
    """Answers only what the page uses, limits logins and the size of requests, and adds a content security policy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._logins = LoginLimiter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]
        if path.startswith(_BLOCKED) or (path.startswith(_API) and not path.removeprefix(_API).startswith(_ALLOWED)):
            await Response("not here\n", status_code=404, media_type="text/plain")(scope, receive, send)
            return
        address = (scope.get("client") or [""])[0]  # shared by all visitors behind a proxy that does not forward theirs
        if path.startswith("/login") and scope["method"] == "POST" and not self._logins.allow(address):
            await Response("too many logins; try again in a minute\n", 429)(scope, receive, send)
            return
        received = 0

        async def receive_bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > _MAX_BODY:
                raise HTTPException(413, f"{_MAX_BODY} bytes at most")  # FastAPI turns it into the answer
            return message

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
                message = {**message, "headers": [*headers, (b"referrer-policy", b"no-referrer")]}
            await send(message)

        await self._app(scope, receive_bounded, send_with_policy)


async def run_server(app: ASGIApp, listener: socket.socket) -> None:
    """Until SIGINT or SIGTERM."""
    import uvicorn

    # Open pages keep a connection each, which would delay the end.
    config: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 3}
    await uvicorn.Server(uvicorn.Config(app, **config)).serve(sockets=[listener])
