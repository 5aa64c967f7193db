"""One Ray and one S3 server for the whole test session, and job files run as their users run them: as processes."""

import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# Real illustrations and a small released model that a checkout may lie beside; tests that use them skip without.
SHARED_DATA = ROOT.parent / "shared" / "data"

RunJob = Callable[..., "subprocess.CompletedProcess[str]"]
StartJob = Callable[..., "subprocess.Popen[str]"]


def _quoted_python(environment: dict[str, str] | None) -> dict[str, str]:
    """Where the path has a space: for the session's Ray what pipeline/cluster.py does for a Ray of the job's own."""
    if " " not in sys.executable or "RAY_ADDRESS" in (environment or {}):
        return {}
    job = {"runtime_env": {"py_executable": shlex.quote(sys.executable)}}
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """An S3 bucket on a real server of this machine, reached through the environment as any S3 is."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # or every failure shows hundreds of requests
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("datasets")
        yield "s3://datasets"
    server.stop()


@pytest.fixture(scope="session")
def ray_address(bucket: str) -> Iterator[str]:
    """The address of a local Ray with 3 logical CPUs: two training workers and one to read pictures.

    Its workers have the environment that Ray starts in: the bucket comes first.
    """
    import ray

    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def _job(ray_address: str, script: str, arguments: tuple[object, ...], environment: dict[str, str] | None) -> Any:
    """What `subprocess` needs to run a job file."""
    return {
        "args": [sys.executable, str(ROOT / script), *map(str, arguments)],
        "env": os.environ | {"RAY_ADDRESS": ray_address} | _quoted_python(environment) | (environment or {}),
        "text": True,
    }


@pytest.fixture(scope="session")
def run_job(ray_address: str) -> RunJob:
    """run_job("pipeline/ingest.py", "--raw", ...) -> the finished process, its output as text."""

    def run(script: str, *arguments: object, environment: dict[str, str] | None = None, cwd: Path = ROOT) -> object:
        job = _job(ray_address, script, arguments, environment)
        return subprocess.run(**job, capture_output=True, timeout=240, cwd=cwd, check=False)

    return run  # type: ignore[return-value]


@pytest.fixture
def start_job(ray_address: str) -> Iterator[StartJob]:
    """start_job("pipeline/ingest.py", "--raw", ...) -> the running process; it is ended with the test."""
    jobs: list[subprocess.Popen[str]] = []

    def start(script: str, *arguments: object, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        job = _job(ray_address, script, arguments, environment)
        jobs.append(subprocess.Popen(**job, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()
        job.wait(timeout=60)


@pytest.fixture(scope="session")
def real_illustrations() -> Path:
    folder = SHARED_DATA / "hdm-samples"
    if not folder.exists():
        pytest.skip("no folder of real illustrations beside this checkout")
    return folder
