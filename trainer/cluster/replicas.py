"""The page's pictures drawn under Ray Serve: a replica for each GPU, on any node. The page talks to their handle."""

import logging
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from pipeline.core.errors import JobFailed, UsageError
from trainer.drawing.picture_model import PictureModel
from trainer.drawing.settings import PictureRequest
from trainer.web.stream import DrawingStep, DrawnPicture, ModelInfo, load_model, stream_picture

try:
    from ray import serve
except ImportError as missing:
    raise UsageError(
        f'--serve: {str(missing).split(". ")[0]}: pip install -c deploy/constraints.txt "ray[serve]"'
    ) from missing


class _Replica:
    """What Ray Serve starts, once for each GPU."""

    def __init__(self, run: str) -> None:
        self._model = PictureModel.load(run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    async def draw(self, request: PictureRequest) -> AsyncIterator[DrawingStep | DrawnPicture]:
        async with aclosing(stream_picture(self._model, request)) as news:  # type: ignore[type-var]
            async for what in news:
                yield what


@dataclass(frozen=True)
class Replicas:
    info: ModelInfo
    count: int
    handle: Any

    @classmethod
    @contextmanager
    def of(cls, run: str, count: int | None) -> Iterator["Replicas"]:
        """On the connected Ray, for as long as the block lasts; `count` None: one for each GPU, or one without any.

        UsageError for a run that cannot be loaded and for more than there are GPUs, JobFailed where they do not start.
        """
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if gpus and count is not None and count > gpus:
            raise UsageError(f"--replicas {count}: the cluster has {gpus} GPUs, and each replica takes one")
        count = count or max(1, gpus)
        # Here, too: what cannot be loaded is refused in one line, and not by each replica in a log of its own.
        info = ModelInfo.of(load_model(run, torch.device("cpu")))
        kind = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        name = f"hdm-page-{uuid.uuid4().hex[:8]}"  # a cluster may have many
        # The queue is the page's: a replica never has more than one picture. Ray's own web server stays off.
        serve.start(proxy_location="Disabled")
        deployment = serve.deployment(_Replica).options(
            name="painter", num_replicas=count, max_ongoing_requests=1, ray_actor_options=kind
        )
        what = "GPUs" if gpus else "CPUs"
        description = f"{info.description.rpartition(', on ')[0]}, on {count} {what} of Ray Serve"
        # Also where it is stopped while they start, which lasts as long as GPUs are not free: a cluster outlives it.
        try:
            try:
                handle = serve.run(deployment.bind(run), name=name, route_prefix=None)
            except RuntimeError as error:
                why = str(error).splitlines()[0]
                raise JobFailed(f"the replicas did not start ({why}); every node must see {run}") from error
            yield cls(replace(info, description=description), count, handle.options(stream=True))
        finally:
            serve.delete(name)

    async def draw(self, request: PictureRequest) -> AsyncIterator[DrawingStep | DrawnPicture]:
        """As `stream.stream_picture`, by whichever replica is free."""
        news = self.handle.draw.remote(request)
        try:
            async for what in news:
                yield what
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise error.cause from error
            raise
        finally:
            news.cancel()
