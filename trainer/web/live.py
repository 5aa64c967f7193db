"""One picture while it is drawn: its steps, then its pixels. The drawing has a thread; whoever follows it may leave."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.core.errors import UsageError
from trainer.diffusion.sampler import OnStep
from trainer.drawing.pictures import PictureModel, Pixels, Request


@dataclass(frozen=True)
class Step:
    done: int
    of: int


@dataclass(frozen=True)
class Drawn:
    pixels: Pixels
    request: Request  # with the size and the time shift that were taken
    made_with: dict[str, Any]  # PictureModel.made_with


@dataclass(frozen=True)
class ModelFacts:
    """What a page must know of a model that it does not hold itself."""

    resolution: int  # pixels: side of the training's crops
    token: int  # pixels: side of a token
    prompts: list[str]  # examples that were kept with the run
    about: str  # one line

    @classmethod
    def of(cls, model: PictureModel) -> "ModelFacts":
        parameters = sum(parameter.numel() for parameter in model.model.parameters())
        return cls(
            model.resolution,
            model.token,
            list(model.record["example_prompts"]),
            f"{parameters / 1e6:.1f}M parameters, {model.steps_taken} steps, {model.resolution}-pixel crops, "
            f"on {model.made_with['device']}",
        )


Draw = Callable[[Request], AsyncIterator[Step | Drawn]]  # the Drawn comes last


def load_model(run: str, device: torch.device) -> PictureModel:
    """As `PictureModel.load`; UsageError for what cannot be loaded."""
    try:
        return PictureModel.load(run, device)
    except ValueError as error:
        raise UsageError(str(error)) from error


# A step of a picture that was left goes on for a while after its turn: the next one is not drawn beside it.
_DRAWING = threading.Lock()


class _Left(Exception):
    """Nobody follows any more."""


def draw_one(model: PictureModel, request: Request, on_step: OnStep) -> Drawn:
    """As `sample.py` draws this picture alone. ValueError for a size that the model, or the GPU's memory, cannot do."""
    settings = model.fitting(request.settings)
    settings = replace(settings, shift=model.time_shift(settings))
    try:
        [pixels] = model.draw([request.prompt], [request.seed], settings, on_step=on_step)
    except torch.OutOfMemoryError as error:
        size = f"{settings.width} x {settings.height}"
        raise ValueError(f"the GPU has not enough memory for {size} pixels: ask for a smaller picture") from error
    return Drawn(pixels, replace(request, settings=settings), model.made_with)


async def follow(model: PictureModel, request: Request) -> AsyncIterator[Step | Drawn]:
    """Draw in a thread, one picture at a time in this process. What `draw_one` raises is raised here; when this
    iterator is closed, the drawing ends with its step."""
    loop = asyncio.get_running_loop()
    news: asyncio.Queue[Step | Drawn | Exception] = asyncio.Queue()
    left = threading.Event()

    def tell(what: Step | Drawn | Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server ends
            loop.call_soon_threadsafe(news.put_nowait, what)

    def on_step(done: int, of: int) -> None:
        if left.is_set():
            raise _Left
        tell(Step(done, of))

    def draw() -> None:
        try:
            with _DRAWING:
                if not left.is_set():
                    tell(draw_one(model, request, on_step))
        except Exception as error:  # belongs to whoever follows
            tell(error)

    threading.Thread(target=draw, daemon=True, name="drawing").start()
    try:
        while True:
            what = await news.get()
            if isinstance(what, Exception):
                raise what
            yield what
            if isinstance(what, Drawn):
                return
    finally:
        left.set()
