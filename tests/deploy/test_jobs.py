"""A Ray cluster of two nodes started by deploy/start-ray.sh: who gets access, and how submitted jobs end.

The commands are those of the documentation, to the letter. The cluster's environment names the dataset and the run.
"""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from pipeline.ingestion.commit import ingest_shard
from pipeline.ingestion.preflight import plan_shards
from pipeline.ingestion.rules import IngestRules
from pipeline.storage.shards import Store

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
IMAGES = 120
STARTS = 3  # of a node: Ray gives up if its agents need more than 15 seconds, as on a busy machine
ROWS_PER_SHARD = 3
UPLOADED = (".gitignore", "README.md", "captioner", "deploy", "pipeline", "pyproject.toml", "trainer")
# Settings of this machine that would give a test access.
RAY_SETTINGS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

Finished = CompletedProcess[str]
RunJob = Callable[..., Finished]


def wait_until(true: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not true within {seconds} s"
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass
class Node:
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def raylet(self) -> psutil.Process:
        return next(child for child in psutil.Process(self.process.pid).children() if "raylet" in child.name())

    def titles(self) -> str:
        """Command lines of its tasks and actors, which contain their names."""
        return " ".join(part for child in self.raylet.children() for part in child.cmdline())


@dataclass
class Cluster:
    folder: Path  # short, because paths of sockets have at most 107 bytes
    python: Path  # folder of the interpreter
    address: str = ""
    dashboard: str = ""
    agent: str = ""
    nodes: list[Node] = field(default_factory=list)

    @property
    def token(self) -> Path:
        return self.folder / "secrets" / "token"

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def environment(self, **more: str) -> dict[str, str]:
        """Environment of a shell without settings of Ray except `more`. Refused drivers give up after two attempts."""
        inherited = {name: value for name, value in os.environ.items() if name not in RAY_SETTINGS}
        path = f"{self.python}{os.pathsep}{os.environ['PATH']}"
        return inherited | {"HOME": str(self.folder), "PATH": path, "RAY_NUM_REDIS_GET_RETRIES": "2"} | more

    def client(self, **more: str) -> dict[str, str]:
        """Environment of a shell that has the token."""
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        return self.environment(**token, RAY_API_SERVER_ADDRESS=self.dashboard, **more)

    def start(self, *role: object, **more: str) -> Node:
        """Start a node and wait until it runs."""
        log = self.folder / f"node-{len(self.nodes)}.log"
        environment = self.environment(
            RAY_AUTH_TOKEN_PATH=str(self.token), RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="1",
            HDM_DATASET=str(self.dataset), HDM_RUN=str(self.run), HF_HUB_OFFLINE="1", **more,
        )  # fmt: skip
        (agent,) = free_ports(1)
        command = [
            *("sh", "deploy/start-ray.sh", *map(str, role), "--object-store-memory", "80000000"),
            *("--dashboard-agent-listen-port", str(agent), "--min-worker-port", "0", "--max-worker-port", "0"),
        ]
        for _ in range(STARTS):
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
                )
            wait_until(lambda process=process: process.poll() is not None or b"--block" in log.read_bytes())
            if process.poll() is None or b"timed out during startup" not in log.read_bytes():
                break
        self.nodes.append(Node(process, log))
        assert process.poll() is None, log.read_text()
        self.agent = self.agent or f"http://127.0.0.1:{agent}"
        return self.nodes[-1]

    def submit(self, *command: object, wait: bool = True, seconds: float = 240, cwd: Path = ROOT, **more: str) -> Any:
        """Run `ray job submit` with these arguments; with `wait`, until it has finished."""
        line = {"args": ["ray", "job", "submit", *map(str, command)], "cwd": cwd, "env": self.client(**more)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        if wait:
            return subprocess.run(**line, **pipes, timeout=seconds, check=False)
        return subprocess.Popen(**line, **pipes)

    def request(self, url: str, token: str | None, body: object = None) -> tuple[int, str]:
        """Status and text of the answer."""
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode())
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def stop(self, job: str) -> None:
        """The request of `ray job stop`: a small job would end before that command has started."""
        assert self.request(f"{self.dashboard}/api/jobs/{job}/stop", self.token.read_text(), {})[0] == 200

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Submitted jobs as the dashboard lists them, by submission id."""
        status, text = self.request(f"{self.dashboard}/api/jobs/", self.token.read_text())
        assert status == 200, text
        return {job["submission_id"]: job for job in json.loads(text) if job["submission_id"]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="hdm-"))
    (folder / "venv").symlink_to(sys.prefix)  # Ray cannot start workers from a path with a space
    cluster = Cluster(folder, folder / "venv" / "bin")
    gcs, dashboard, client = free_ports(3)
    cluster.dashboard = f"http://127.0.0.1:{dashboard}"
    ports = ("--port", gcs, "--dashboard-port", dashboard, "--ray-client-server-port", client)
    started: list[psutil.Process] = []
    try:
        cluster.start("head", *ports, "--num-cpus", "1", "--temp-dir", folder / "ray")
        cluster.address = (folder / "ray" / "ray_current_cluster").read_text().strip()
        cluster.start("worker", cluster.address, "--num-cpus", "2")
        yield cluster
    finally:
        for node in cluster.nodes:
            with_children = [psutil.Process(node.process.pid)] if node.process.poll() is None else []
            started += [each for top in with_children for each in (top, *top.children(recursive=True))]
            node.process.terminate()
        psutil.wait_procs(started, timeout=20)
        for process in started:
            if process.is_running():
                process.kill()
        for node in cluster.nodes:
            node.process.wait(timeout=20)
        shutil.rmtree(folder)


def finish(job: "subprocess.Popen[str]", seconds: float = 240) -> Finished:
    output, _ = job.communicate(timeout=seconds)
    return CompletedProcess(job.args, job.returncode, output)


def log_of(job: Finished) -> list[str]:
    """The lines that the job printed."""
    lines = job.stdout.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith("Running entrypoint")), None)
    assert start is not None, job.stdout
    return lines[start + 1 :]


def succeeded(job: Finished) -> str:
    assert job.returncode == 0, job.stdout
    assert "succeeded" in job.stdout
    return "\n".join(log_of(job))


def refused(job: Finished) -> str:
    """The error line of a job that exited with 2."""
    assert job.returncode == 1, job.stdout
    assert "Job entrypoint command failed with exit code 2" in job.stdout
    (line,) = {line for line in log_of(job) if line.startswith("error: ")}
    assert "Traceback" not in job.stdout
    return line


# --- Access -----------------------------------------------------------------------------------------------------------


def test_concurrent_starts_create_one_token_that_only_this_user_can_read(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "token"
    command = ["sh", str(ROOT / "deploy" / "ray-token.sh"), str(file)]
    makers = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    assert [maker.wait(timeout=60) for maker in makers] == [0] * 4
    made = file.read_text()
    assert len(bytes.fromhex(made)) == 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["token"]
    file.chmod(0o644)
    subprocess.run(command, check=True)
    assert file.read_text() == made
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text("")
    subprocess.run(command, check=True)
    assert len(file.read_text()) == 64


def test_a_worker_without_the_token_does_not_start(tmp_path: Path) -> None:
    command = ["sh", str(ROOT / "deploy" / "start-ray.sh"), "worker", "127.0.0.1:1"]
    environment = os.environ | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"no token at {tmp_path / 'none'}" in done.stderr


def test_a_local_ray_uses_a_token_that_other_users_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.core.cluster import keep_token_private

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in RAY_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    token = tmp_path / ".ray" / "auth_token"
    keep_token_private()
    made = token.read_text()
    assert len(bytes.fromhex(made)) == 32
    token.chmod(0o644)
    keep_token_private()
    assert (token.read_text(), stat.S_IMODE(token.stat().st_mode)) == (made, 0o600)


def test_only_its_user_can_read_the_heads_token(cluster: Cluster) -> None:
    assert stat.S_IMODE(cluster.token.stat().st_mode) == 0o600


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("wrong", 403)])
def test_without_the_token_dashboard_and_agent_refuse_requests_and_jobs(
    cluster: Cluster, token: str | None, status: int
) -> None:
    job = {"entrypoint": f"touch {cluster.folder / 'broken-in'}"}
    for url in (f"{cluster.dashboard}/api/jobs/", f"{cluster.agent}/api/job_agent/jobs/"):
        assert cluster.request(url, token, job)[0] == status
    for path in ("/api/version", "/api/jobs/", "/api/cluster_status", "/nodes?view=summary", "/api/v0/logs", "/logs"):
        assert cluster.request(cluster.dashboard + path, token)[0] == status, path
    assert cluster.request(f"{cluster.dashboard}/api/version", cluster.token.read_text())[0] == 200
    assert not cluster.jobs()
    assert not (cluster.folder / "broken-in").exists()


WRONG = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"}
SUBMISSIONS = {"no token": ({}, "Missing authentication token"), "wrong token": (WRONG, "Invalid")}
DRIVERS = {
    "no token": ({}, "or it requires its token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"),
    "wrong token": (WRONG, "or it requires its token"),
    "mode alone": ({"RAY_AUTH_MODE": "token"}, "no authentication token was found; set RAY_AUTH_MODE=token and"),
    "dashboard": ({"RAY_ADDRESS": "http://127.0.0.1:8265"}, "is a dashboard: submit the job to it (ray job submit"),
}


@pytest.fixture(scope="module")
def attempts(cluster: Cluster, images: Path) -> dict[tuple[str, str], Finished]:
    """What every command without access prints, started at the same time: most of their seconds are waits."""

    def start(command: list[str], **settings: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            command, cwd=ROOT, env=cluster.environment(**settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    submit = ["ray", "job", "submit", "--", "touch", str(cluster.folder / "broken-in")]
    caption = [str(cluster.python / "python"), "pipeline/caption.py", "--dataset", str(images), "--name"]
    running = {
        ("submission", name): start(submit, RAY_API_SERVER_ADDRESS=cluster.dashboard, **settings)
        for name, (settings, _) in SUBMISSIONS.items()
    } | {
        # Each writes a folder of its own: of two jobs in one, the second finds its lease taken.
        ("driver", name): start([*caption, _folder(name)], **{"RAY_ADDRESS": cluster.address} | settings)
        for name, (settings, _) in DRIVERS.items()
    }
    ended = {key: (process, process.communicate(timeout=120)) for key, process in running.items()}
    return {key: CompletedProcess([], process.returncode, *output) for key, (process, output) in ended.items()}


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_without_the_token_no_job_is_submitted(
    cluster: Cluster, attempts: dict[tuple[str, str], Finished], name: str
) -> None:
    submitted = attempts["submission", name]
    assert submitted.returncode != 0
    assert SUBMISSIONS[name][1] in submitted.stderr
    assert not cluster.jobs()
    assert not (cluster.folder / "broken-in").exists()


@pytest.mark.parametrize("name", DRIVERS)
def test_without_the_token_no_driver_joins_and_its_job_says_so_in_one_line(
    attempts: dict[tuple[str, str], Finished], images: Path, name: str
) -> None:
    job = attempts["driver", name]
    assert job.returncode == 2
    *others, error = job.stderr.splitlines()
    assert error.startswith("error: ")
    assert DRIVERS[name][1] in error
    assert all("Failed to get cluster ID from GCS server: Unauthenticated" in other for other in others)  # Ray's own
    assert not (images / "captions" / _folder(name)).exists()


def _folder(driver: str) -> str:
    return f"never-{driver.replace(' ', '-')}"


# --- Jobs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(cluster: Cluster) -> Path:
    folder = cluster.folder / "raw"
    command = (sys.executable, "pipeline/sample_data.py", "--out", folder, "--images", IMAGES)
    subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, timeout=120, check=True)
    return folder


@pytest.fixture(scope="module")
def images(cluster: Cluster, raw: Path) -> Path:
    """The dataset, ingested in this process without Ray."""
    store, rules = Store(str(cluster.dataset)), IngestRules()
    plan = plan_shards([str(raw)], "auto", ROWS_PER_SHARD, store, rules)
    for part in plan.shards.values():
        ingest_shard(part, store.root, rules)
    return cluster.dataset


def shards(cluster: Cluster, folder: str) -> dict[str, int]:
    """When each finished shard was written, by name."""
    return {path.name: path.stat().st_mtime_ns for path in (cluster.dataset / folder).glob("*.parquet")}


@pytest.fixture(scope="module")
def captioned(cluster: Cluster, images: Path) -> tuple[str, dict[str, int], str]:
    """Output of a job that is stopped halfway, the shards it leaves, and the output of the same command run again."""
    job = cluster.submit("--submission-id", "stopped", "--", "python", "pipeline/caption.py", wait=False)
    wait_until(lambda: job.poll() is not None or shards(cluster, "captions"))
    cluster.stop("stopped")
    finish(job)
    # The command's own output may lack the last line: it ends when the job does.
    logs = cluster.request(f"{cluster.dashboard}/api/jobs/stopped/logs", cluster.token.read_text())[1]
    output = str(json.loads(logs)["logs"])
    kept = shards(cluster, "captions")
    return output, kept, succeeded(cluster.submit("--", "python", "pipeline/caption.py"))


def test_a_stopped_data_job_keeps_its_shards_and_the_same_command_continues(
    cluster: Cluster, captioned: tuple[str, dict[str, int], str]
) -> None:
    stopped, kept, again = captioned
    assert "stopped; run the same command to go on" in stopped, stopped
    assert cluster.jobs()["stopped"]["status"] == "STOPPED"
    assert 0 < len(kept) < len(shards(cluster, "images"))
    assert f"{len(shards(cluster, 'images'))} image shards, {len(kept)} already captioned" in again
    assert shards(cluster, "captions").items() >= kept.items()
    assert shards(cluster, "captions").keys() == shards(cluster, "images").keys()


def test_the_dashboard_lists_the_log_file_of_a_submitted_job(
    cluster: Cluster, captioned: tuple[str, dict[str, int], str]
) -> None:
    (line,) = (line for line in captioned[2].splitlines() if "; log: " in line or ": log: " in line)
    assert "http://" not in line
    name = Path(line.partition("log: ")[2]).name
    nodes = json.loads(cluster.request(f"{cluster.dashboard}/api/v0/nodes", cluster.token.read_text())[1])
    head = next(node["node_id"] for node in nodes["data"]["result"]["result"] if node["is_head_node"])
    url = f"{cluster.dashboard}/api/v0/logs/file?node_id={head}&filename={name}"
    status, text = cluster.request(url, cluster.token.read_text())
    assert status == 200
    assert "session folder of Ray" in text


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose code differs from the cluster's, with every ignored folder that `make demo` leaves."""
    folder = tmp_path_factory.mktemp("lap") / "top"
    for name in UPLOADED:
        (folder / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for name in (".venv/lib", ".venv-captioner/lib", ".git", "demo/raw", "demo-mine/raw", "dataset/images", "run/demo"):
        (folder / name).mkdir(parents=True)
        with (folder / name / "big").open("wb") as file:
            file.truncate(600 << 20)  # more than Ray uploads
    engine = folder / "captioner" / "engines" / "tags.py"
    changed = engine.read_text().replace('"engine": "tags"', '"engine": "tags of the laptop"')
    assert changed != engine.read_text()
    engine.write_text(changed)
    return folder


@pytest.fixture(scope="module")
def side_by_side(cluster: Cluster, captioned: object, laptop: Path) -> tuple[Finished, Finished]:
    """Two jobs that run at the same time. One is submitted from the laptop. The other curates for the demo stage and
    then tries the last stage with encoders that need no download."""
    last = "--stage 1024 --set selection=demo --set codec=dct --set text_encoder=local --from nothing"
    commands = f"python pipeline/curate.py --stage demo && python trainer/run.py {last}"
    curate = cluster.submit("--submission-id", "last", "--", "sh", "-c", commands, wait=False)
    caption = "python pipeline/caption.py"
    commands = f"{caption} --dataset demo; {caption} --name laptop"
    uploaded = cluster.submit("--working-dir", ".", "--", "sh", "-c", commands, cwd=laptop, wait=False)
    return finish(uploaded), finish(curate)


def test_from_a_laptop_its_code_runs_on_all_nodes_and_ignored_files_are_not_uploaded(
    cluster: Cluster, side_by_side: tuple[Finished, Finished]
) -> None:
    error = "error: --dataset demo would be in the uploaded folder, which Ray removes: give s3://bucket/prefix or"
    assert error in succeeded(side_by_side[0])
    written = list((cluster.dataset / "captions" / "laptop").glob("*.parquet"))
    assert len(written) == len(shards(cluster, "images"))
    engines = {engine for path in written for engine in pq.read_table(path)["engine"].to_pylist()}
    assert engines == {"tags of the laptop"}
    uploaded = cluster.folder.glob("ray/session_*/runtime_resources/working_dir_files/*/*")
    assert {path.name for path in uploaded} == set(UPLOADED)


# --- Training ---------------------------------------------------------------------------------------------------------


def test_without_a_gpu_the_last_stage_is_refused_and_the_job_fails_with_that_line(
    cluster: Cluster, side_by_side: tuple[Finished, Finished]
) -> None:
    line = refused(side_by_side[1])
    assert "there is no GPU, and stage 1024 trains" in line
    last = cluster.jobs()["last"]
    assert (last["status"], last["driver_exit_code"]) == ("FAILED", 2)
    assert line in last["message"]


def test_a_stage_without_a_selection_names_the_command_that_makes_it(
    call_job: RunJob, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HDM_DATASET", str(images))
    job = call_job("trainer/run.py", "--stage", "1024")
    assert job.returncode == 2
    command = f"python pipeline/curate.py --dataset {images} --stage 1024"
    assert f"{images} has no selection '1024'; run: {command}" in job.stderr


@pytest.mark.usefixtures("side_by_side")
def test_a_stopped_training_saves_a_checkpoint_and_the_same_job_resumes(cluster: Cluster) -> None:
    prompts = cluster.folder / "prompts.txt"
    prompts.write_text("red star\n")  # one picture in place of eight at the end
    settings = ("--set", "log_every=1", "--set", "batch_size=16", "--prompts", prompts)
    command = ("--", "python", "trainer/run.py", "--stage", "demo", *settings)
    job = cluster.submit("--submission-id", "training", *command, wait=False)
    metrics = cluster.run / "demo" / "metrics.jsonl"
    wait_until(lambda: job.poll() is not None or (metrics.exists() and metrics.read_text()))
    cluster.stop("training")
    output = finish(job).stdout
    steps = len(metrics.read_text().splitlines())
    assert f"run: stopped after step {steps}, which is saved" in output
    saved = [path.name for path in (cluster.run / "demo" / "checkpoints").glob("step-*")]
    assert saved == [f"step-{steps:08}"]
    assert cluster.jobs()["training"]["status"] == "STOPPED"
    again = succeeded(cluster.submit(*command, "--steps", steps + 1))
    assert f"going on from step {steps}" in again


# --- A model on a captioner node --------------------------------------------------------------------------------------

CAPTIONER = ROOT / ".venv-captioner"
_VERSIONS = "import platform, ray; print(platform.python_version(), ray.__version__)"


@pytest.fixture(scope="module")
def captioner(cluster: Cluster) -> Iterator[Path]:
    """A third node, started in the captioner's environment, and the folder of a tiny model, which only that node's
    environment can load. It has left the cluster when the next tests begin."""
    if not (CAPTIONER / ".ready").exists():
        pytest.skip("there is no environment with vLLM: make captioner")
    link = cluster.folder / "captioner"
    link.symlink_to(CAPTIONER)
    model = cluster.folder / "tiny-pixtral"
    command = [str(link / "bin" / "python"), "tests/captioner/tiny_pixtral.py", str(model)]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=True)
    role = ("worker", cluster.address, "--num-cpus", "1", "--resources", '{"captioner": 1}')
    node = cluster.start(*role, PATH=f"{link / 'bin'}{os.pathsep}{os.environ['PATH']}")
    yield model
    cluster.nodes.remove(node)
    processes = [psutil.Process(node.process.pid), *psutil.Process(node.process.pid).children(recursive=True)]
    node.process.terminate()
    for process in psutil.wait_procs(processes, timeout=20)[1]:
        process.kill()
    node.process.wait(timeout=20)


def versions(python: Path) -> str:
    done = subprocess.run([str(python), "-c", _VERSIONS], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.usefixtures("captioner")
def test_both_environments_have_the_same_python_and_ray() -> None:
    assert versions(CAPTIONER / "bin" / "python") == versions(Path(sys.executable))


def test_the_bare_command_captions_with_the_model_of_a_captioner_node(
    cluster: Cluster, captioner: Path, images: Path
) -> None:
    """The driver runs on the head, whose environment has no vLLM."""
    dataset = cluster.folder / "for the model"
    (dataset / "images").mkdir(parents=True)
    shards = sorted((images / "images").glob("*.parquet"))[:2]
    for path in shards:
        shutil.copy(path, dataset / "images")
    settings = {"env_vars": {"HDM_CAPTION_MODEL": str(captioner), "HDM_DATASET": str(dataset)}}
    flags = ("--runtime-env-json", json.dumps(settings))
    # vLLM starts in half a minute, or in many beside other work.
    job = cluster.submit(*flags, "--", "python", "pipeline/caption.py", seconds=600)
    assert "from tags" not in succeeded(job)
    record = json.loads((dataset / "captions" / "run.json").read_text())
    rows = pq.read_table([dataset / "captions" / path.name for path in shards]).to_pylist()
    ids = pq.read_table(shards, columns=["id"])["id"].to_pylist()
    assert [row["id"] for row in rows] == ids
    assert record["rows_in"] == len(ids) > 0
    assert record["engine"] == "vllm"
    assert record["model"].startswith("tiny-pixtral@")
    assert all(row["tokens_in"] > 0 for row in rows)  # answers are nonsense, mostly replaced by the tags


def test_from_a_laptop_a_model_that_the_captioner_node_lacks_is_refused_in_one_line(
    cluster: Cluster, captioner: Path, laptop: Path
) -> None:
    settings = {"env_vars": {"HDM_CAPTION_MODEL": f"{captioner} of another machine"}}
    flags = ("--working-dir", ".", "--runtime-env-json", json.dumps(settings))
    job = cluster.submit(*flags, "--", "python", "pipeline/caption.py", cwd=laptop)
    assert f"{captioner} of another machine is not a folder" in refused(job)


# --- A node is killed -------------------------------------------------------------------------------------------------

# Two actors: the first node has room for one of them. Each shard has one row, done when the file `go` exists.
WITH_ACTORS = """
import sys, time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.core.cluster import cluster
from pipeline.core.row_pipeline import Actors, Pending, Step, stream_rows
from pipeline.core.tables import ROW, SHARD

def read(shard, wanted):
    yield pa.table({ROW: wanted})

def make():
    def work(table):
        for shard in table[SHARD].to_pylist():
            (folder / f"{shard}.begun").touch()
        until = time.monotonic() + 120
        while not (folder / "go").exists() and time.monotonic() < until:
            time.sleep(0.05)
        yield table.select([SHARD, ROW])
    return work

def commit(shard):
    (folder / f"{shard}.done").touch()
    return {"done": 1}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with cluster("actors"):
        todo = {name: Pending(shard=name, rows=np.zeros(1, np.int32)) for name in "abcdefgh"}
        step = Step(name="work", work=Actors(make=make, least=2, most=2), cpus=0.6)
        print(stream_rows("actors", todo, read, [step], commit))
"""


@pytest.fixture(scope="module")
def survivors(cluster: Cluster, raw: Path, images: Path) -> tuple[Finished, Finished, Path]:
    """A job with actors, an ingest, and the dataset of the latter. A node with an actor and all tasks is killed while
    both jobs run."""
    folder, dataset = cluster.folder / "actors", cluster.folder / "second"
    folder.mkdir()
    script = folder / "job.py"
    script.write_text(WITH_ACTORS)
    actors = cluster.submit("--", "python", script, folder, wait=False)
    wait_until(lambda: actors.poll() is not None or len(list(folder.glob("*.begun"))) == 2)
    flags = ("--raw", raw, "--dataset", dataset, "--rows-per-shard", ROWS_PER_SHARD)
    tasks = cluster.submit("--", "python", "pipeline/ingest.py", *flags, wait=False)
    wait_until(lambda: tasks.poll() is not None or len(list((dataset / "images").glob("*.parquet"))) > 2)
    with_actors = [node for node in cluster.nodes[1:] if "ray::MapWorker(MapBatches(work))" in node.titles()]
    with_actors[0].raylet.kill()  # the head has room for one actor only
    finished_before = len(list((dataset / "images").glob("*.parquet")))
    (folder / "go").touch()
    ended = finish(actors), finish(tasks)
    assert finished_before < IMAGES // ROWS_PER_SHARD
    return *ended, dataset


def _reasons(dataset: Path) -> list[str]:
    files = (dataset / "rejected").glob("*.parquet")
    return [reason for path in files for reason in pq.read_table(path)["reason"].to_pylist()]


def test_an_ingest_whose_node_is_killed_writes_the_files_of_an_undisturbed_one(
    images: Path, survivors: tuple[Finished, Finished, Path]
) -> None:
    _, job, dataset = survivors
    succeeded(job)
    reasons = [Counter(_reasons(each)) for each in (dataset, images)]
    assert reasons[0] == reasons[1], job.stdout
    for folder in ("images", "rejected"):
        written = {path.name: path for path in (dataset / folder).glob("*.parquet*")}
        expected = {path.name: path for path in (images / folder).glob("*.parquet*")}
        assert written.keys() == expected.keys()
        for name, path in written.items():
            assert pq.read_table(path).to_pylist() == pq.read_table(expected[name]).to_pylist(), (name, job.stdout)
            assert path.read_bytes() == expected[name].read_bytes(), name
    record = json.loads((dataset / "images" / "run.json").read_text())
    rejected = reasons[1]
    assert (record["rows_in"], record["rejected"], record["failed"]) == (IMAGES, rejected, {})
    assert record["rows_out"] == IMAGES - rejected.total()


def test_rows_of_actors_on_a_killed_node_are_done_by_others(
    cluster: Cluster, survivors: tuple[Finished, Finished, Path]
) -> None:
    assert "{}" in succeeded(survivors[0]).splitlines()
    assert {path.stem for path in (cluster.folder / "actors").glob("*.done")} == set("abcdefgh")
