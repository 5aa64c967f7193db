"""JOB: a web page that draws with a trained model, with the camera as three sliders."""

import asyncio
import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.core.errors import UsageError
from pipeline.core.jobs import run
from trainer.web.command import ServeJob, parse_args

if TYPE_CHECKING:
    from trainer.web.stream import Draw, ModelInfo

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Backend(NamedTuple):
    """What draws: a model in this process, or replicas of Ray Serve."""

    info: "ModelInfo"
    draw: "Draw"
    concurrency: int  # pictures drawn at once


def main() -> None:
    job = parse_args(__doc__)
    listener = listen(job.host, job.port)  # before the model is loaded, which can take minutes
    if job.host not in _LOOPBACK:
        _warn(job)
    with listener, _backend(job) as backend, tempfile.TemporaryDirectory(prefix="hdm-page-") as folder:
        _serve(job, backend, listener, Path(folder))
    print("serve: ended", flush=True)


def listen(host: str, port: int) -> socket.socket:
    """Raises UsageError if the port is taken, or if the address is not one of this machine."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # "::" also takes IPv4
        return socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {port} of {host} is taken. Choose another, such as --port {port + 1}, or end what listens there."
            ) from error
        raise UsageError(f"--host {host} --port {port}: cannot listen there ({error})") from error


def _warn(job: ServeJob) -> None:
    who = "who knows a name and password" if job.logins else "who reaches this port"
    advice = "passwords and pictures are not encrypted: put a proxy with TLS in front"
    if not job.logins:
        advice = "--password-file asks for a password, --host 127.0.0.1 restricts it to this machine"
    print(f"serve: WARNING: listening on {job.host}: everybody {who} can draw here; {advice}", flush=True)


@contextmanager
def _backend(job: ServeJob) -> Iterator[Backend]:
    if job.serve:
        from pipeline.core.cluster import cluster
        from trainer.cluster.replicas import Replicas

        path = job.run if "://" in job.run else os.path.abspath(job.run)  # workers run in other folders
        with cluster("serve"), Replicas.of(path, job.replicas) as replicas:
            yield Backend(replicas.info, replicas.draw, replicas.count)
        return
    import torch  # takes seconds to import, which --help does not need

    from trainer.web.stream import ModelInfo, load_model, stream_picture

    model = load_model(job.run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    yield Backend(ModelInfo.of(model), partial(stream_picture, model), 1)


def _serve(job: ServeJob, backend: Backend, listener: socket.socket, folder: Path) -> None:
    """Until SIGINT or SIGTERM."""
    from trainer.web.form import RequestLimits

    try:
        limits = RequestLimits(job.largest_side or min(4096, 2 * backend.info.resolution), job.most_steps)
    except ValueError as error:
        raise UsageError(str(error)) from error
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
    try:
        from trainer.web.server import page_app, run_server
    except ModuleNotFoundError as error:
        raise UsageError(f'{error}: pip install -c deploy/constraints.txt -e ".[web]"') from error
    from trainer.web.drawing_queue import DrawingQueue
    from trainer.web.page_metrics import PageMetrics
    from trainer.web.picture_events import PageContext

    queue = DrawingQueue(backend.concurrency, job.queue)
    context = PageContext(backend.info, limits, backend.draw, queue, PageMetrics(lambda: queue.waiting), folder)
    app = page_app(context, job.logins)
    print(f"serve: {backend.info.description}", flush=True)
    print(f"serve: {_address(listener)} (end with Ctrl-C)", flush=True)
    with suppress(KeyboardInterrupt):  # uvicorn has ended in order and passes the signal on
        asyncio.run(run_server(app, listener))


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


if __name__ == "__main__":
    run(main)
