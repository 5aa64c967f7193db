"""One click on Draw, from the form to the stored file or a message."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from trainer.drawing.picture_model import PictureModel
from trainer.web import picture_events
from trainer.web.drawing_queue import DrawingQueue
from trainer.web.form import RequestLimits
from trainer.web.page_metrics import PageMetrics
from trainer.web.stream import DrawingStep, DrawnPicture, ModelInfo, stream_picture

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD: dict[str, Any] = {
    "prompt": "red star", "negative": "", "width": 64, "height": 48, "steps": 2, "guidance": 3, "sampler": "euler",
    "seed": 7, "x_shift": 0.25, "y_shift": 0, "zoom": 1.5,
}  # fmt: skip


@pytest.fixture
def context(model: PictureModel, tmp_path: Path) -> picture_events.PageContext:
    queue = DrawingQueue(1, 0)
    return picture_events.PageContext(
        info=ModelInfo.of(model),
        limits=RequestLimits(largest_side=128, most_steps=1000),
        draw=lambda request: stream_picture(model, request),
        queue=queue,
        metrics=PageMetrics(lambda: queue.waiting),
        folder=tmp_path,
    )


def last_event(context: picture_events.PageContext, **changed: Any) -> Any:
    async def events() -> list[Any]:
        return [event async for event in picture_events.picture_events(context, GOOD | changed)]

    return asyncio.run(events())[-1]


def test_the_number_of_stored_pictures_is_limited(
    context: picture_events.PageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all sessions, because not every session is ended."""
    monkeypatch.setattr(picture_events, "_MOST_STORED", 2)
    first, *others = (last_event(context, seed=seed).path for seed in range(3))
    assert sorted(context.folder.glob("*/*.png")) == sorted(others)
    assert not first.parent.exists()


def test_a_failed_drawing_is_reported_and_counted_and_the_next_one_works(
    context: picture_events.PageContext, model: PictureModel, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fails_once(request: Any) -> AsyncIterator[DrawingStep | DrawnPicture]:
        requests.append(request)
        if len(requests) == 1:
            raise RuntimeError("a cable\nwas cut")
        async for event in stream_picture(model, request):
            yield event

    requests: list[Any] = []
    object.__setattr__(context, "draw", fails_once)
    assert "failed (RuntimeError: a cable)" in last_event(context)
    assert "was cut" in capsys.readouterr().err
    assert last_event(context).path.exists()
    assert b"hdm_page_failed_total 1.0" in context.metrics.text()
