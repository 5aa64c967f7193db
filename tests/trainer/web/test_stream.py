"""A picture while it is drawn."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from trainer.drawing.picture_model import PictureModel
from trainer.drawing.settings import PictureRequest, SamplingSettings
from trainer.web.stream import DrawingStep, DrawnPicture, stream_picture

pytestmark = pytest.mark.usefixtures("one_thread")


def red_star(width: int = 64, height: int = 48, steps: int = 2) -> PictureRequest:
    return PictureRequest(prompt="red star", seed=7, settings=SamplingSettings(width=width, height=height, steps=steps))


def test_every_step_is_streamed_and_then_the_models_picture(model: PictureModel) -> None:
    request = red_star(width=60, steps=3)

    async def events() -> list[DrawingStep | DrawnPicture]:
        return [event async for event in stream_picture(model, request)]

    *steps, drawn = asyncio.run(events())
    assert steps == [DrawingStep(1, 3), DrawingStep(2, 3), DrawingStep(3, 3)]
    assert isinstance(drawn, DrawnPicture)
    assert (drawn.request.settings.width, drawn.request.settings.shift) == (64, (48 / 64) ** 0.5)
    [again] = model.draw(["red star"], [7], drawn.request.settings)
    np.testing.assert_array_equal(drawn.pixels, again)


def _drawing_threads() -> int:
    return sum(thread.name == "drawing" for thread in threading.enumerate())


def test_a_drawing_stops_when_its_reader_leaves(model: PictureModel) -> None:
    request = red_star(steps=1000)

    async def leave() -> None:
        async with aclosing(stream_picture(model, request)) as events:  # type: ignore[type-var]
            async for event in events:
                assert _drawing_threads() == 1
                if event == DrawingStep(2, 1000):
                    break
        deadline = time.monotonic() + 60
        while _drawing_threads() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    asyncio.run(leave())
    assert _drawing_threads() == 0


def test_a_picture_waits_for_the_last_step_of_one_whose_reader_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise repeated Draw and Stop would draw any number of pictures at once."""
    told: list[str] = []
    may_end = threading.Event()

    def draw_picture(model: Any, request: str, on_step: Callable[[int, int], None]) -> Any:
        told.append(f"{request} begins")
        on_step(1, 2)
        if request == "first":
            may_end.wait(60)
        told.append(f"{request} ends")
        on_step(2, 2)
        return DrawnPicture(np.zeros((1, 1, 3), np.uint8), request, {})  # type: ignore[arg-type]

    async def leave_and_draw() -> None:
        async with aclosing(stream_picture(None, "first")) as events:  # type: ignore[type-var, arg-type]
            assert await anext(events) == DrawingStep(1, 2)
        async with aclosing(stream_picture(None, "second")) as events:  # type: ignore[type-var, arg-type]
            second = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.05)
            assert told == ["first begins"]
            may_end.set()
            assert await second == DrawingStep(1, 2)
            assert told[:3] == ["first begins", "first ends", "second begins"]

    monkeypatch.setattr("trainer.web.stream.draw_picture", draw_picture)
    asyncio.run(leave_and_draw())


def test_a_refusal_of_the_model_is_raised_in_the_reader(model: PictureModel) -> None:
    request = red_star(4096, 4096)

    async def draw() -> None:
        async for _ in stream_picture(model, request):
            raise AssertionError("refused before the first step")

    with pytest.raises(ValueError, match="smaller picture"):
        asyncio.run(draw())
