"""Starts Ray on this machine, or joins the cluster named by RAY_ADDRESS, and keeps Ray's log off the terminal.

Also says which nodes are there for a kind of work: `captioner` and `trainer` are custom resources that nodes with the
packages for it offer (`ray start --resources '{"captioner": 1}'`).
"""

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import ray
import ray.data  # configures its loggers when imported, so it must be imported before ours replace them
from ray.exceptions import AuthenticationError, RayError, RayTaskError

from pipeline.core.errors import JobFailed, S3Refused, S3Unavailable, UsageError
from pipeline.core.jobs import submission

T = TypeVar("T")

_TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the token"
_START_IT = "start it, or unset RAY_ADDRESS to start Ray on this machine"
# Seconds that Ray waits for parts of itself, its defaults being 30. It reads the variables when it starts.
_START_SECONDS: Final = {"RAY_raylet_start_wait_time_s": "60", "RAY_gcs_server_port_wait_time_s": "120"}
# A raylet ends if its agents, two Python programs, need more than 15 seconds to start, which no setting of ray 2.60
# changes. On a busy machine the next start is faster, because the files that they import are in memory then.
_STARTS: Final = 4
_SHARE: Final = 0.01  # of a node's custom resource: up to 100 actors on a node that offers 1
_REPORT_SECONDS: Final = 60.0
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
    # By default a task that is killed because its node runs out of memory is retried for ever (ray 2.60).
    os.environ.setdefault("RAY_task_oom_retries", "1")
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
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UsageError(
                f"no Ray cluster accepts this job at RAY_ADDRESS={address} (HOST:PORT, or auto): {_START_IT}; or it "
                f"requires its token: {_TOKEN}"
            ) from error
    keep_token_private()
    # At least two: training and its reader take turns on one core, but Ray would wait for a second CPU for ever.
    cpus = max(2, os.cpu_count() or 2)
    # By default Ray ends idle processes beyond one per CPU after a second. A row pipeline has more, for tasks that
    # mostly wait, and needs 1.5 s of a core to start one again (ray 2.60).
    os.environ.setdefault("RAY_num_workers_soft_limit", str(2 * cpus))
    # Ray passes this to a shell for workers with an environment of their own, as in training: paths may have spaces.
    python = {"py_executable": shlex.quote(sys.executable)}
    return start_local(num_cpus=cpus, include_dashboard=dashboard, runtime_env=python)


def start_local(**options: Any) -> Any:
    """`ray.init` on this machine with these options, tried several times because Ray gives up early on a busy machine.
    Each failed start is reported on stderr. Raises JobFailed after the last."""
    for name, seconds in _START_SECONDS.items():
        os.environ.setdefault(name, seconds)
    for start in range(1, _STARTS + 1):
        others, began = _child_processes(), time.monotonic()
        try:
            return ray.init(address="local", log_to_driver=False, **options)
        except (UsageError, AuthenticationError):
            raise
        except Exception as error:  # Ray raises RuntimeError, ConnectionError and plain Exception for the same cause
            failure = " ".join(str(error).split())[:300]
            logging.getLogger("ray").exception("start %d of Ray failed", start)
        ray.shutdown()
        _end(_child_processes() - others)
        if start < _STARTS:
            print(
                f"Ray did not start within {time.monotonic() - began:.0f} s; trying again", file=sys.stderr, flush=True
            )
    raise JobFailed(
        f"Ray did not start on this machine in {_STARTS} attempts ({failure}): end other work on it, or look into the "
        f"newest folder {tempfile.gettempdir()}/ray/session_*/logs, then run the same command again"
    )


def _child_processes() -> set[int]:
    found: set[int] = set()
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found |= set(map(int, children.read_text().split()))
    return found


def _end(processes: set[int]) -> None:
    """Ends what a failed start of Ray leaves running until this process exits."""
    for process in processes:
        with suppress(OSError):
            os.kill(process, signal.SIGTERM)


def nodes() -> list[dict[str, float]]:
    """The resources of each living node."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def at_most_a_node(memory: int) -> int:
    """The bytes, or those of the largest node: a task that asks for more would wait for ever."""
    return int(min(memory, max((node.get("memory", 0) for node in nodes()), default=0)))


def node_resources(kind: str) -> dict[str, float]:
    """What a task or actor requests so that it runs on a node for this kind of work, `captioner` or `trainer`: a small
    share of that custom resource. {} if no living node offers it, as on a single machine, where any node will do."""
    return {kind: _SHARE} if any(node.get(kind) for node in nodes()) else {}


def nodes_of(kind: str) -> list[dict[str, float]]:
    """The resources of each living node that offers the custom resource `kind`, or of all nodes if none does."""
    return [node for node in nodes() if node.get(kind)] or nodes()


def wait_for_node(kind: str, seconds: float) -> dict[str, float]:
    """`node_resources`, but waits until a node offers `kind`, up to this many seconds, and says so on stderr."""
    end, told = time.monotonic() + seconds, float("-inf")
    while not (found := node_resources(kind)) and time.monotonic() < end:
        if time.monotonic() - told > _REPORT_SECONDS:
            told = time.monotonic()
            print(f"waiting for a {kind} node, up to {end - told:.0f} s more", file=sys.stderr, flush=True)
        time.sleep(min(1.0, seconds))
    return found


def run_on_node(
    work: Callable[[], T],
    resources: Mapping[str, float],
    runtime_env: Mapping[str, Any],
    description: str,
    gpus: int = 0,
) -> T:
    """Runs `work` once in a process with these resources and environment, and returns its result.

    Raises the work's own UsageError, JobFailed, S3Refused and S3Unavailable, and JobFailed for anything else. A minute
    without a result is reported on stderr.
    """

    def run() -> T:  # Ray wants a plain function
        return work()

    task = ray.remote(num_cpus=0, num_gpus=gpus, resources=dict(resources), runtime_env=dict(runtime_env) or None)(run)
    result, started = task.remote(), time.monotonic()
    while not ray.wait([result], timeout=_REPORT_SECONDS)[0]:
        if lost := [kind for kind in resources if not node_resources(kind)]:
            raise JobFailed(f"{description}: the last node that offers {lost[0]} is gone; start it and run this again")
        minutes = (time.monotonic() - started) / 60
        print(f"{description}: no result after {minutes:.0f} min", file=sys.stderr, flush=True)
    try:
        found: T = ray.get(result)
        return found
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, UsageError | JobFailed | S3Refused | S3Unavailable):
            raise cause from None
        line = " ".join(str(cause).split())[:300]
        raise JobFailed(f"{description}: {type(cause).__name__}: {line}") from error


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
