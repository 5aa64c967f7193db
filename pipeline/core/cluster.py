"""Starts Ray on this machine, or joins the cluster named by RAY_ADDRESS, and keeps Ray's log off the terminal."""

import logging
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import ray.data  # configures its loggers when imported, so it must be imported before ours replace them
from ray.exceptions import AuthenticationError

from pipeline.core.errors import UsageError
from pipeline.core.jobs import submission

_TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the token"
_START_IT = "start it, or unset RAY_ADDRESS to start Ray on this machine"
_LOGGERS = ("ray", "ray.data", "ray.train", "ray.tune")  # their messages are nothing that a user can act on


@contextmanager
def cluster(job: str, dashboard: bool = False, niceness: int = 15) -> Iterator[str]:
    """Connects to Ray for the duration of a job and yields the path of its log file.

    Without RAY_ADDRESS, starts a local Ray that ends with the job; `dashboard` starts its dashboard too, which takes
    seconds. `niceness` applies to its workers: Ray's default of 15 keeps a laptop responsive but starves a training
    beside other work. The log file names the folder with the workers' own logs. The log of a submitted job is moved
    there, because its user sees the logs in the dashboard but not the files of the head node.
    """
    log_path = os.path.join(tempfile.gettempdir(), f"hdm-{job}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log")
    _send_logs_to(log_path)
    os.environ.setdefault("RAY_worker_niceness", str(niceness))
    context = _connect(os.environ.get("RAY_ADDRESS"), dashboard)
    session_folder = getattr(context, "address_info", {}).get("session_dir", "")
    if submission():
        log_path = shutil.move(log_path, os.path.join(session_folder, "logs", os.path.basename(log_path)))
        _send_logs_to(log_path)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # replaces Ray's handler, which prints a stack trace
    ray.data.DataContext.get_current().enable_progress_bars = False
    cpus = ray.cluster_resources().get("CPU", 0)
    # The user of a submitted job knows the dashboard under another address than this node does.
    where = f"dashboard http://{context.dashboard_url}; " if context.dashboard_url and not submission() else ""
    print(f"{job}: Ray with {cpus:.0f} CPUs; {where}log: {log_path}", flush=True)
    logging.getLogger("ray").info("session folder of Ray: %s", session_folder)
    try:
        yield log_path
    finally:
        ray.shutdown()


def _connect(address: str | None, dashboard: bool) -> Any:
    if address:
        _check_reachable(address)
        try:
            return ray.init(address=address, log_to_driver=False)
        except AuthenticationError as error:
            line = str(error).partition(". ")[0]
            raise UsageError(f"{line}; {_TOKEN}") from error
        except (ConnectionError, ValueError) as error:
            raise UsageError(
                f"no Ray cluster accepts this job at RAY_ADDRESS={address} (HOST:PORT, or auto): {_START_IT}; or it "
                f"requires its token: {_TOKEN}"
            ) from error
    keep_token_private()
    # At least two: training and its loader take turns on one core, but Ray would wait for a second CPU for ever.
    cpus = max(2, os.cpu_count() or 2)
    # Ray passes this to a shell for workers with an environment of their own, as in training: paths may have spaces.
    python = {"py_executable": shlex.quote(sys.executable)}
    return ray.init(
        address="local", num_cpus=cpus, include_dashboard=dashboard, log_to_driver=False, runtime_env=python
    )


def keep_token_private() -> None:
    """Creates Ray's token file, readable by this user only. A local Ray listens on every interface, and the token file
    that it would create itself is readable by every user of the machine (ray 2.60)."""
    if {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    token = Path.home() / ".ray" / "auth_token"
    token.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    token.chmod(0o600)


def _check_reachable(address: str) -> None:
    """Raises UsageError if nothing listens at the address. Ray itself would retry for minutes."""
    if address.startswith(("http://", "https://")):
        raise UsageError(
            f"RAY_ADDRESS={address} is a dashboard: submit the job to it (ray job submit --working-dir . -- python "
            "FILE ...), or unset RAY_ADDRESS to start Ray on this machine"
        )
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
    except OSError as error:
        raise UsageError(f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); {_START_IT}") from error


def _send_logs_to(path: str) -> None:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False
