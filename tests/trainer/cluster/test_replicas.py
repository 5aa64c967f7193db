"""Pictures drawn under Ray Serve: the same ones, so many at once as there are replicas."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.errors import UsageError
from trainer.drawing.picture_model import PictureModel
from trainer.web.form import RequestLimits, read_form
from trainer.web.stream import DrawingStep, DrawnPicture

FORM: dict[str, Any] = {
    "prompt": "red star", "negative": "", "width": 64, "height": 64, "steps": 2, "guidance": 3, "sampler": "euler",
    "seed": 7, "x_shift": 0.25, "y_shift": 0, "zoom": 1.5,
}  # fmt: skip
LIMITS = RequestLimits(largest_side=4096, most_steps=1000)


@pytest.fixture(scope="module", autouse=True)
def _ray_serve() -> None:
    """Imported here, because it takes a second, also of processes that only collect this file."""
    pytest.importorskip("ray.serve", reason='no Ray Serve: pip install -c deploy/constraints.txt "ray[serve]"')


@pytest.fixture(scope="module")
def replicas(ray_address: str, random_run: Path) -> Iterator[Any]:
    from ray import serve

    from trainer.cluster.replicas import Replicas

    with Replicas.of(str(random_run), 2) as two:
        yield two
    serve.shutdown()  # the session's Ray is other tests', too


def test_the_page_knows_the_model_that_it_does_not_hold(replicas: Any) -> None:
    assert (replicas.count, replicas.info.resolution, replicas.info.token) == (2, 64, 8)
    assert replicas.info.prompts == ["red star"]


def test_two_pictures_are_drawn_at_once_and_are_those_of_the_model(
    replicas: Any, random_run: Path, one_thread: None
) -> None:
    news: list[tuple[int, DrawingStep | DrawnPicture]] = []

    async def draw(seed: int) -> None:
        async for what in replicas.draw(read_form(FORM | {"seed": seed, "steps": 40}, LIMITS)):
            news.append((seed, what))

    async def both() -> None:
        await asyncio.gather(draw(0), draw(1))

    asyncio.run(both())
    model = PictureModel.load(random_run, torch.device("cpu"))
    for seed in (0, 1):
        *steps, drawn = [what for of, what in news if of == seed]
        assert steps == [DrawingStep(done, 40) for done in range(1, 41)]
        assert isinstance(drawn, DrawnPicture)
        [expected] = model.draw(["red star"], [seed], drawn.request.settings)
        assert np.abs(drawn.pixels.astype(int) - expected).max() <= 1  # another number of threads rounds otherwise
    places = [number for number, (_, what) in enumerate(news) if isinstance(what, DrawnPicture)]
    first_of = {seed: [of for of, _ in news].index(seed) for seed in (0, 1)}
    assert max(first_of.values()) < min(places), "the second began before the first was done"


def test_a_replica_is_free_again_when_nobody_follows_it(replicas: Any) -> None:
    async def check() -> None:
        for _ in range(3):  # more than there are replicas, of minutes each
            async with aclosing(replicas.draw(read_form(FORM | {"steps": 1000}, LIMITS))) as news:
                async for what in news:
                    assert what == DrawingStep(1, 1000)
                    break
        last = [what async for what in replicas.draw(read_form(FORM, LIMITS))]
        assert isinstance(last[-1], DrawnPicture)

    asyncio.run(asyncio.wait_for(check(), 180))


def test_what_the_model_refuses_keeps_its_words(replicas: Any) -> None:
    async def draw() -> None:
        async for _ in replicas.draw(read_form(FORM | {"width": 4096, "height": 4096}, LIMITS)):
            raise AssertionError("refused before the first step")

    with pytest.raises(ValueError, match="Ask for a smaller picture"):
        asyncio.run(draw())


def test_a_run_without_a_checkpoint_is_refused_before_replicas_start(ray_address: str, tmp_path: Path) -> None:
    from trainer.cluster.replicas import Replicas

    with pytest.raises(UsageError, match="no checkpoint"), Replicas.of(str(tmp_path), 1):
        pass
