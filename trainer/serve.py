"""JOB: a web page that draws with a trained model, with the camera as three sliders."""

import asyncio
import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import UsageError
from pipeline.core.jobs import Parser, default_run, run
from trainer.web.passwords import CheckLogin, login_check

if TYPE_CHECKING:
    from trainer.web.live import Draw, ModelFacts

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    run: str
    host: str
    port: int
    queue: int  # pictures that may wait
    largest_side: int | None  # pixels; None: twice the training's
    most_steps: int
    login: CheckLogin | None
    serve: bool  # under Ray Serve
    replicas: int | None  # None: one for each GPU


@dataclass(frozen=True)
class Painter:
    """What draws: a model of this process, or replicas of Ray Serve."""

    facts: "ModelFacts"
    draw: "Draw"
    at_once: int  # pictures


def parse_args() -> ServeJob:
    parser = Parser(prog="serve.py", description=__doc__)
    parser.add_argument("--run", default=default_run(), metavar="DIR", help="of trainer/run.py, or its copy at s3://")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860; 0: any that is free")
    parser.add_argument("--queue", type=int, default=8, metavar="N", help="pictures that may wait; default: 8")
    parser.add_argument(
        "--largest-side", type=int, metavar="PIXELS", help="of a picture; default: twice that of the training crops"
    )
    parser.add_argument("--most-steps", type=int, default=100, metavar="N", help="of the sampler; default: 100")
    parser.add_argument(
        "--password-file", metavar="FILE",
        help="lines of NAME:PASSWORD that the page asks for; or HDM_PAGE_PASSWORD=NAME:PASSWORD",
    )  # fmt: skip
    parser.add_argument("--serve", action="store_true", help="draw on every GPU of the cluster, under Ray Serve")
    parser.add_argument("--replicas", type=int, metavar="N", help="with --serve; default: one for each GPU")
    args = vars(parser.parse_args())
    file = args.pop("password_file")
    job = ServeJob(**args, login=login_check(file, os.environ.get("HDM_PAGE_PASSWORD")))
    _check(job)
    return job


def _check(job: ServeJob) -> None:
    if not 0 <= job.port < 2**16:
        raise UsageError(f"--port {job.port}: from 0 to {2**16 - 1}")
    if job.queue < 0:
        raise UsageError(f"--queue {job.queue}: at least 0, where nobody waits")
    if job.largest_side is not None and job.largest_side < 1:
        raise UsageError(f"--largest-side {job.largest_side}: at least 1 pixel")
    if job.most_steps < 1:
        raise UsageError(f"--most-steps {job.most_steps}: at least 1")
    if job.replicas is not None and (job.replicas < 1 or not job.serve):
        raise UsageError(f"--replicas {job.replicas}: at least 1, and with --serve")


def main() -> None:
    job = parse_args()
    listener = listen(job.host, job.port)  # before a model is loaded, which can take minutes
    if job.host not in _LOOPBACK:
        _warn(job)
    with listener, _painter(job) as painter, tempfile.TemporaryDirectory(prefix="hdm-page-") as folder:
        _serve(job, painter, listener, Path(folder))
    print("serve: ended", flush=True)


def listen(host: str, port: int) -> socket.socket:
    """UsageError where the port is taken, or the address none of this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"--host {host}: {error}; give an address of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            mend = f"choose another, --port {port + 1}, or end what listens there"
            raise UsageError(f"port {port} of {host} is taken: {mend}") from error
        raise UsageError(
            f"cannot listen at {host} port {port}: {error}; give --host and --port that this user may use"
        ) from error
    return listener


def _warn(job: ServeJob) -> None:
    who = "who knows a name and password" if job.login else "who reaches this port"
    mend = "passwords and pictures go over it in the clear: put it behind TLS"
    if not job.login:
        mend = "--password-file asks for a password, --host 127.0.0.1 keeps it to this machine"
    print(f"serve: WARNING: listening on {job.host}: everybody {who} can draw here; {mend}", flush=True)


@contextmanager
def _painter(job: ServeJob) -> Iterator[Painter]:
    if job.serve:
        from pipeline.core.cluster import cluster
        from trainer.cluster.replicas import Replicas

        path = job.run if "://" in job.run else os.path.abspath(job.run)  # a worker may be in another folder
        with cluster("serve"), Replicas.of(path, job.replicas) as replicas:
            yield Painter(replicas.facts, replicas.draw, replicas.count)
        return
    import torch  # takes seconds: not for --help

    from trainer.web.live import ModelFacts, follow, load_model

    model = load_model(job.run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    yield Painter(ModelFacts.of(model), partial(follow, model), 1)


def _serve(job: ServeJob, painter: Painter, listener: socket.socket, folder: Path) -> None:
    """Until SIGINT or SIGTERM."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported
    try:
        import uvicorn

        from trainer.web.page import Studio, page_app
    except ModuleNotFoundError as error:
        raise UsageError(f'{error}: pip install -c deploy/constraints.txt -e ".[web]"') from error
    from trainer.web.form import Limits
    from trainer.web.page_metrics import PageFigures
    from trainer.web.turns import Turns

    try:
        limits = Limits(job.largest_side or min(4096, 2 * painter.facts.resolution), job.most_steps)
    except ValueError as error:
        raise UsageError(str(error)) from error
    turns = Turns(painter.at_once, job.queue)
    studio = Studio(painter.facts, limits, painter.draw, turns, PageFigures(lambda: turns.waiting), folder)
    # Open pages hold a connection each, which would keep the server from its end.
    config: dict[str, Any] = {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 3}
    server = uvicorn.Server(uvicorn.Config(page_app(studio, job.login), **config))
    print(f"serve: {painter.facts.about}", flush=True)
    print(f"serve: {_address(listener)} (end with Ctrl-C)", flush=True)
    with suppress(KeyboardInterrupt):  # uvicorn has ended in order, and hands the signal on
        asyncio.run(server.serve(sockets=[listener]))


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


if __name__ == "__main__":
    run(main)
