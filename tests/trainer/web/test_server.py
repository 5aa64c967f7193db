"""Who may see the page, and how often they may log in.

The tests import the server themselves: gradio takes seconds, also of processes that only collect this file.
"""

import asyncio
from pathlib import Path

import httpx

from trainer.drawing.picture_model import PictureModel
from trainer.web.command import read_logins
from trainer.web.drawing_queue import DrawingQueue
from trainer.web.form import RequestLimits
from trainer.web.page_metrics import PageMetrics
from trainer.web.picture_events import PageContext
from trainer.web.stream import ModelInfo, stream_picture


def test_a_page_with_passwords_shows_nothing_before_login_and_limits_logins(
    model: PictureModel, tmp_path: Path
) -> None:
    from trainer.web.server import page_app

    queue = DrawingQueue(1, 1)
    context = PageContext(
        info=ModelInfo.of(model),
        limits=RequestLimits(largest_side=128, most_steps=1000),
        draw=lambda request: stream_picture(model, request),
        queue=queue,
        metrics=PageMetrics(lambda: queue.waiting),
        folder=tmp_path,
    )
    app = httpx.ASGITransport(page_app(context, read_logins("ann:secret:1\n bob:other ", "here")))  # type: ignore[arg-type]
    (tmp_path / "a.png").write_bytes(b"a picture")

    async def visit() -> None:
        async with httpx.AsyncClient(transport=app, base_url="http://page") as client:

            async def seen() -> list[int]:
                return [(await client.get(at)).status_code for at in ("/config", f"/gradio_api/file={tmp_path}/a.png")]

            async def log_in(name: str, password: str) -> int:
                return (await client.post("/login", data={"username": name, "password": password})).status_code

            assert await seen() == [401, 401]
            assert (await log_in("ann", "wrong"), await seen()) == (400, [401, 401])
            assert (await log_in("ann", "other"), await log_in("eve", "other")) == (400, 400)
            assert (await log_in("bob", "other"), await log_in("ann", "secret:1")) == (200, 200)
            assert await seen() == [200, 200]
            assert [await log_in("ann", "wrong") for _ in range(5)] == [400] * 5
            assert (await log_in("ann", "wrong"), await log_in("ann", "secret:1")) == (429, 429)
            assert await seen() == [200, 200]

    asyncio.run(visit())


def test_an_address_may_log_in_ten_times_a_minute() -> None:
    from trainer.web.server import LoginLimiter

    now = 100.0
    logins = LoginLimiter(lambda: now)
    assert [logins.allow("a") for _ in range(12)] == [True] * 10 + [False] * 2
    assert logins.allow("b")
    now += 60
    assert logins.allow("a")
