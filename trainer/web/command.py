"""Command line of trainer/serve.py."""

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import UsageError
from pipeline.core.jobs import Parser, default_run
from pipeline.core.text_files import read_text

Logins = list[tuple[str, str]]  # names and passwords


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    run: str
    host: str
    port: int
    queue: int  # pictures that may wait
    largest_side: int | None  # pixels; None: twice the training resolution
    most_steps: int
    logins: Logins | None  # None: no password is needed
    serve: bool  # with Ray Serve
    replicas: int | None  # None: one per GPU


def parse_args(description: str | None) -> ServeJob:
    parser = Parser(prog="serve.py", description=description)
    add = parser.add_argument
    add("--run", default=default_run(), metavar="DIR",
        help="Folder of trainer/run.py, or its copy on s3://. Default: $HDM_RUN, then ./run")  # fmt: skip
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="Default: 127.0.0.1, only this machine")
    add("--port", type=int, default=7860, help="Default: 7860. 0: any free port")
    add("--queue", type=int, default=8, metavar="N", help="Number of pictures that may wait. Default: 8")
    add("--largest-side", type=int, metavar="PIXELS", help="Limit of a side. Default: twice that of the training crops")
    add("--most-steps", type=int, default=100, metavar="N", help="Limit for sampling steps. Default: 100")
    add("--password-file", metavar="FILE",
        help="NAME:PASSWORD lines that the page asks for. Default: $HDM_PAGE_PASSWORD, as NAME:PASSWORD")  # fmt: skip
    add("--serve", action="store_true", help="Draw on every GPU of the cluster, with Ray Serve")
    add("--replicas", type=int, metavar="N", help="Number of replicas, with --serve. Default: one per GPU")
    args = vars(parser.parse_args())
    job = ServeJob(logins=_logins(args.pop("password_file"), os.environ.get("HDM_PAGE_PASSWORD")), **args)
    for flag, value, least in (
        ("--queue", job.queue, 0),
        ("--largest-side", job.largest_side, 1),
        ("--most-steps", job.most_steps, 1),
        ("--replicas", job.replicas, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{flag} {value}: must be at least {least}")
    if not 0 <= job.port < 2**16:
        raise UsageError(f"--port {job.port}: must be from 0 to {2**16 - 1}")
    if job.replicas is not None and not job.serve:
        raise UsageError(f"--replicas {job.replicas} needs --serve")
    return job


def _logins(file: str | None, variable: str | None) -> Logins | None:
    if file is None:
        return None if variable is None else read_logins(variable, "HDM_PAGE_PASSWORD")
    try:
        return read_logins(read_text(Path(file)), f"--password-file {file}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--password-file {file}: {error}. Give a text file of NAME:PASSWORD lines.") from error


def read_logins(text: str, source: str) -> Logins:
    """Parses NAME:PASSWORD lines. Raises UsageError, naming the source, if there are none or one is malformed."""
    logins = []
    for number, line in enumerate(text.splitlines(), start=1):
        name, _, password = line.strip().partition(":")
        if line.strip() and not (name and password):
            raise UsageError(f"{source}, line {number}: give NAME:PASSWORD on each line")
        if line.strip():
            logins.append((name, password))
    if not logins:
        raise UsageError(f"{source} is empty: give NAME:PASSWORD lines")
    return logins
