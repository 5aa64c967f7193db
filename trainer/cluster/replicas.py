"""Draws the page's pictures with Ray Serve: one replica per GPU, on any node."""

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
    """The deployment's class."""

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
        """Runs the replicas on the connected Ray until the block ends. `count` None: one per GPU, or one without GPUs.

        UsageError if the run cannot be loaded or there are too few GPUs, JobFailed if the replicas do not start.
        """
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if gpus and count is not None and count > gpus:
            raise UsageError(f"--replicas {count}: the cluster has {gpus} GPUs, and each replica takes one")
        count = count or max(1, gpus)
        # Loaded here first, so that a bad run gives one error and not one in the log of every replica.
        info = ModelInfo.of(load_model(run, torch.device("cpu")))
        kind = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        name = f"hdm-page-{uuid.uuid4().hex[:8]}"  # a cluster may run several pages
        # The page has the queue: a replica draws one picture at a time. Ray's own web server stays off.
        serve.start(proxy_location="Disabled")
        deployment = serve.deployment(_Replica).options(
            name="painter", num_replicas=count, max_ongoing_requests=1, ray_actor_options=kind
        )
        what = "GPUs" if gpus else "CPUs"
        description = f"{info.description.rpartition(', on ')[0]}, on {count} {what} of Ray Serve"
        # Delete it also if this job is stopped while replicas wait for free GPUs: the cluster outlives the job.
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
        """`stream.stream_picture` on a free replica."""
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
