"""One click on Draw: the form is checked, waits for its turn, is drawn and saved, and the page is told each step."""

import asyncio
import html
import secrets
import shutil
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from trainer.drawing.picture_files import save_picture
from trainer.drawing.settings import PictureRequest
from trainer.web.drawing_queue import DrawingQueue, QueueFull
from trainer.web.form import RequestLimits, read_form
from trainer.web.page_metrics import PageMetrics
from trainer.web.stream import Draw, DrawingStep, DrawnPicture, ModelInfo

# Over all sessions, because gradio does not report every session that ends, and a script need not end its own.
_MOST_STORED: Final = 2000


@dataclass(frozen=True)
class PageContext:
    """What the handlers of one page share."""

    info: ModelInfo
    limits: RequestLimits
    draw: Draw
    queue: DrawingQueue
    metrics: PageMetrics
    folder: Path  # of the pictures, while the server runs
    stored: deque[Path] = field(default_factory=deque)  # pictures on disk, the oldest first


@dataclass(frozen=True)
class SavedPicture:
    path: Path
    message: str


async def picture_events(context: PageContext, values: dict[str, Any]) -> AsyncIterator[str | SavedPicture]:
    """Messages (HTML) while a picture waits and is drawn, then the picture, or a message that says why it failed."""
    metrics, queue = context.metrics, context.queue
    try:
        request = read_form(values, context.limits)
        entry = queue.join()
    except (ValueError, QueueFull) as refusal:
        metrics.refused("queue_full" if isinstance(refusal, QueueFull) else "input")
        yield _refusal(refusal)
        return
    try:
        async for ahead in queue.positions(entry):
            yield status(f"{ahead} before yours")
        started = time.monotonic()
        yield _progress(DrawingStep(0, request.settings.steps))
        async with aclosing(context.draw(request)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, DrawingStep):
                    yield _progress(event)
                else:
                    path = await asyncio.to_thread(_save, context.folder, event)  # takes seconds for a large picture
                    context.stored.append(path)
                    if len(context.stored) > _MOST_STORED:
                        remove_picture(context.stored.popleft())
                    seconds = time.monotonic() - started
                    metrics.drawn(seconds)
                    yield SavedPicture(path, status(_summary(request, event, seconds)))
    except ValueError as refusal:  # of the model
        metrics.refused("input")
        yield _refusal(refusal)
    except Exception as error:
        traceback.print_exc()
        metrics.failed()
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        yield _refusal(f"the drawing failed ({reason}); see the output of the server. Press Draw to try again")
    finally:
        queue.leave(entry)


def _save(folder: Path, drawn: DrawnPicture) -> Path:
    """The file that sample.py writes, in a folder whose name cannot be guessed."""
    return save_picture(folder / secrets.token_urlsafe(16), drawn.pixels, drawn.request, drawn.made_with)


def remove_picture(path: Path) -> None:
    """Removes it with its folder, if it still exists."""
    shutil.rmtree(path.parent, ignore_errors=True)


def _summary(wanted: PictureRequest, drawn: DrawnPicture, seconds: float) -> str:
    asked, used = wanted.settings, drawn.request.settings
    text = f"{used.width} × {used.height} pixels, {used.steps} steps, seed {wanted.seed}, in {seconds:.1f} s"
    if (asked.width, asked.height) != (used.width, used.height):
        text += f"; {asked.width} × {asked.height} was rounded: sides are whole tokens"
    return f"{text}; the prompt is too long, not read: {drawn.unread}" if drawn.unread else text


def status(text: str) -> str:
    return f'<p role="status">{html.escape(text)}</p>'


def _refusal(why: object) -> str:
    return f'<p role="alert" class="refused">{html.escape(str(why))}</p>'


def _progress(step: DrawingStep) -> str:
    bar = f'<progress value="{step.done}" max="{step.total}"></progress>'
    return f'<p role="status">step {step.done} of {step.total}</p>{bar}'
