"""Draws one picture in a thread and streams its steps and pixels. A reader that leaves stops the drawing."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.core.errors import UsageError
from trainer.diffusion.sampler import OnStep
from trainer.drawing.picture_files import Pixels
from trainer.drawing.picture_model import PictureModel
from trainer.drawing.settings import PictureRequest


@dataclass(frozen=True)
class DrawingStep:
    done: int
    total: int


@dataclass(frozen=True)
class DrawnPicture:
    pixels: Pixels
    request: PictureRequest  # with the rounded size and the time shift that were used
    made_with: dict[str, Any]  # PictureModel.made_with
    unread: str = ""  # part of a prompt that was too long


@dataclass(frozen=True)
class ModelInfo:
    """What the page needs to know about a model that may run in another process."""

    resolution: int  # pixels: side of the training crops
    token: int  # pixels: side of a token
    prompts: list[str]  # examples stored with the run
    description: str  # one line

    @classmethod
    def of(cls, model: PictureModel) -> "ModelInfo":
        parameters = sum(parameter.numel() for parameter in model.model.parameters())
        return cls(
            model.resolution,
            model.token,
            list(model.record["example_prompts"]),
            f"{parameters / 1e6:.1f}M parameters, {model.steps_taken} steps, {model.resolution}-pixel crops, "
            f"on {model.made_with['device']}",
        )


Draw = Callable[[PictureRequest], AsyncIterator[DrawingStep | DrawnPicture]]  # the picture comes last


def load_model(run: str, device: torch.device) -> PictureModel:
    """As `PictureModel.load`, but raises UsageError."""
    try:
        return PictureModel.load(run, device)
    except ValueError as error:
        raise UsageError(str(error)) from error


# The last step of a picture whose reader has left still runs when the next picture's turn comes.
_DRAWING = threading.Lock()


class _ReaderLeft(Exception):
    pass


def draw_picture(model: PictureModel, request: PictureRequest, on_step: OnStep) -> DrawnPicture:
    """The picture that `sample.py` draws. Raises ValueError for a size that the model or the GPU's memory cannot do."""
    settings = model.round_size(request.settings)
    settings = replace(settings, shift=model.time_shift(settings))
    try:
        [pixels] = model.draw([request.prompt], [request.seed], settings, on_step=on_step)
    except torch.OutOfMemoryError as error:
        size = f"{settings.width} x {settings.height}"
        raise ValueError(f"the GPU has not enough memory for {size} pixels: ask for a smaller picture") from error
    return DrawnPicture(pixels, replace(request, settings=settings), model.made_with, model.unread(request))


async def stream_picture(model: PictureModel, request: PictureRequest) -> AsyncIterator[DrawingStep | DrawnPicture]:
    """Draws in a thread, one picture at a time in this process, and raises what `draw_picture` raises. Closing the
    iterator stops the drawing after its current step."""
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[DrawingStep | DrawnPicture | Exception] = asyncio.Queue()
    left = threading.Event()

    def send(event: DrawingStep | DrawnPicture | Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed because the server ends
            loop.call_soon_threadsafe(events.put_nowait, event)

    def on_step(done: int, total: int) -> None:
        if left.is_set():
            raise _ReaderLeft
        send(DrawingStep(done, total))

    def draw() -> None:
        try:
            with _DRAWING:
                if not left.is_set():
                    send(draw_picture(model, request, on_step))
        except Exception as error:  # is raised in the reader
            send(error)

    threading.Thread(target=draw, daemon=True, name="drawing").start()
    try:
        while True:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if isinstance(event, DrawnPicture):
                return
    finally:
        left.set()
