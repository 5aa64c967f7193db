"""Start Ray on this machine, or join the cluster that RAY_ADDRESS names, and keep its log out of the terminal."""

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
import ray.data  # configures its loggers when imported: before ours take their place
from ray.exceptions import AuthenticationError

from pipeline.core.errors import UsageError
from pipeline.core.jobs import submission

_TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file that has it"
_START_IT = "start it, or unset RAY_ADDRESS to use a Ray of this machine's own"
# The chatter of these loggers is what a user cannot act on: where it goes is printed instead.
_LOGGERS = ("ray", "ray.data", "ray.train", "ray.tune")


@contextmanager
def cluster(job: str, dashboard: bool = False, niceness: int = 15) -> Iterator[str]:
    """Ray for the time of one job, yielding the path of its log file.

    Without RAY_ADDRESS it is a local Ray that ends with the job; `dashboard` starts one with it, which takes seconds.
    `niceness`: of its workers; Ray's 15 leaves a laptop to its user, and a training next to nothing beside other work.
    Workers' own logs stay where Ray keeps them; the log file names the folder. A submitted job's log lies there too:
    whoever submitted it sees the dashboard's list of logs, not the head's files.
    """
    log_path = os.path.join(tempfile.gettempdir(), f"hdm-{job}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log")
    _send_logs_to(log_path)
    os.environ.setdefault("RAY_worker_niceness", str(niceness))
    context = _connect(os.environ.get("RAY_ADDRESS"), dashboard)
    session_folder = getattr(context, "address_info", {}).get("session_dir", "")
    if submission():
        log_path = shutil.move(log_path, os.path.join(session_folder, "logs", os.path.basename(log_path)))
        _send_logs_to(log_path)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray put a handler of its own, with a stack trace
    ray.data.DataContext.get_current().enable_progress_bars = False
    cpus = ray.cluster_resources().get("CPU", 0)
    # A job was submitted through the dashboard, whose address is another one from here.
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
                f"no Ray cluster lets this job in at RAY_ADDRESS={address} (HOST:PORT, or auto): {_START_IT}; or it "
                f"wants its token: {_TOKEN}"
            ) from error
    keep_token_private()
    # Reading and training take turns on a machine of one core; Ray would wait for a second one for ever.
    cpus = max(2, os.cpu_count() or 2)
    # Ray hands this to a shell where a worker has an environment of its own, as in training; a path may have a space.
    python = {"py_executable": shlex.quote(sys.executable)}
    return ray.init(
        address="local", num_cpus=cpus, include_dashboard=dashboard, log_to_driver=False, runtime_env=python
    )


def keep_token_private() -> None:
    """A local Ray, which listens on every interface, makes itself a token (ray 2.60) that all users of the machine may
    read: so it finds one that they may not."""
    if {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    token = Path.home() / ".ray" / "auth_token"
    token.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    token.chmod(0o600)


def _check_reachable(address: str) -> None:
    """Ray itself tries an address for minutes and fills the terminal; UsageError at once where nothing listens."""
    if address.startswith(("http://", "https://")):
        raise UsageError(
            f"RAY_ADDRESS={address} is a dashboard: submit the job to it (ray job submit --working-dir . -- python "
            "FILE ...), or unset RAY_ADDRESS to use a Ray of this machine's own"
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
