"""A Ray cluster of two nodes, as deploy/start-ray.sh starts it: who is let in, and what becomes of submitted jobs.

The commands are those of the README, to the letter; the cluster's environment says where the dataset and the run are.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
IMAGES = 120
ROWS_PER_SHARD = 3
UPLOADED = (".gitignore", "README.md", "captioner", "deploy", "pipeline", "pyproject.toml", "trainer")
# Client settings that would let a test in by way of the machine's own.
RAY_SETTINGS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

Finished = CompletedProcess[str]


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
        """Of the processes of its tasks and actors, which name what they are about."""
        return " ".join(part for child in self.raylet.children() for part in child.cmdline())


@dataclass
class Cluster:
    folder: Path  # short: sockets lie in it, whose paths have at most 107 bytes
    python: Path  # its folder
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
        """Of a shell beside the cluster, with nothing of Ray's but `more`. Ray waits for a refused driver 2 seconds."""
        inherited = {name: value for name, value in os.environ.items() if name not in RAY_SETTINGS}
        path = f"{self.python}{os.pathsep}{os.environ['PATH']}"
        return inherited | {"HOME": str(self.folder), "PATH": path, "RAY_NUM_REDIS_GET_RETRIES": "2"} | more

    def client(self, **more: str) -> dict[str, str]:
        """Of a shell with the token."""
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}
        return self.environment(**token, RAY_API_SERVER_ADDRESS=self.dashboard, **more)

    def start(self, *role: object) -> Node:
        """Returns once the node is there."""
        log = self.folder / f"node-{len(self.nodes)}.log"
        environment = self.environment(
            RAY_AUTH_TOKEN_PATH=str(self.token), RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="1",
            HDM_DATASET=str(self.dataset), HDM_RUN=str(self.run), HF_HUB_OFFLINE="1",
        )  # fmt: skip
        (agent,) = free_ports(1)
        command = [
            *("sh", "deploy/start-ray.sh", *map(str, role), "--object-store-memory", "80000000"),
            *("--dashboard-agent-listen-port", str(agent), "--min-worker-port", "0", "--max-worker-port", "0"),
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self.nodes.append(Node(process, log))
        wait_until(lambda: process.poll() is not None or b"--block" in log.read_bytes())
        assert process.poll() is None, log.read_text()
        self.agent = self.agent or f"http://127.0.0.1:{agent}"
        return self.nodes[-1]

    def submit(self, *command: object, wait: bool = True, cwd: Path = ROOT, **more: str) -> Any:
        """`ray job submit` ...: the finished command, or without `wait` the running one."""
        line = {"args": ["ray", "job", "submit", *map(str, command)], "cwd": cwd, "env": self.client(**more)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        if wait:
            return subprocess.run(**line, **pipes, timeout=240, check=False)
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

    def jobs(self) -> dict[str, dict[str, Any]]:
        """What the dashboard knows of submitted jobs, by their submission ids."""
        status, text = self.request(f"{self.dashboard}/api/jobs/", self.token.read_text())
        assert status == 200, text
        return {job["submission_id"]: job for job in json.loads(text) if job["submission_id"]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="hdm-"))
    (folder / "venv").symlink_to(sys.prefix)  # Ray starts workers from no path with a space
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


def log_of(job: Finished) -> list[str]:
    """The lines of the job itself, as they were streamed."""
    lines = job.stdout.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith("Running entrypoint")), None)
    assert start is not None, job.stdout
    return lines[start + 1 :]


def succeeded(job: Finished) -> str:
    assert job.returncode == 0, job.stdout
    assert "succeeded" in job.stdout
    return "\n".join(log_of(job))


def refused(job: Finished) -> str:
    """The one line of a job that left with 2: in its log, and again in the status that the dashboard keeps."""
    assert job.returncode == 1, job.stdout
    assert "Job entrypoint command failed with exit code 2" in job.stdout
    (line,) = {line for line in log_of(job) if line.startswith("error: ")}
    assert "Traceback" not in job.stdout
    return line


# --- Who is let in ----------------------------------------------------------------------------------------------------


def test_a_token_is_made_once_for_this_user_alone_also_by_two_at_a_time(tmp_path: Path) -> None:
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


def test_a_worker_without_the_token_is_not_started(tmp_path: Path) -> None:
    command = ["sh", str(ROOT / "deploy" / "start-ray.sh"), "worker", "127.0.0.1:1"]
    environment = os.environ | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"no token at {tmp_path / 'none'}" in done.stderr


def test_a_ray_of_this_machines_own_finds_a_token_that_other_users_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_the_heads_token_is_for_its_user_alone(cluster: Cluster) -> None:
    assert stat.S_IMODE(cluster.token.stat().st_mode) == 0o600


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("wrong", 403)])
def test_without_the_token_neither_dashboard_nor_agent_answers_or_takes_a_job(
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


@pytest.mark.parametrize(
    ("settings", "why"),
    [({}, "Missing authentication token"), ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"}, "Invalid")],
    ids=["no token", "wrong token"],
)
def test_without_the_token_no_job_is_submitted(cluster: Cluster, settings: dict[str, str], why: str) -> None:
    submitted = subprocess.run(
        ["ray", "job", "submit", "--", "touch", str(cluster.folder / "broken-in")],
        env=cluster.environment(RAY_API_SERVER_ADDRESS=cluster.dashboard, **settings),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert submitted.returncode != 0
    assert why in submitted.stderr
    assert not cluster.jobs()
    assert not (cluster.folder / "broken-in").exists()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "or it requires its token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"}, "or it requires its token"),
        ({"RAY_AUTH_MODE": "token"}, "no authentication token was found; set RAY_AUTH_MODE=token and"),
        ({"RAY_ADDRESS": "http://127.0.0.1:8265"}, "is a dashboard: submit the job to it (ray job submit"),
    ],
    ids=["no token", "wrong token", "mode alone", "dashboard"],
)
def test_without_the_token_no_driver_joins_and_a_job_says_so_in_one_line(
    cluster: Cluster, images: Path, settings: dict[str, str], line: str
) -> None:
    joining = {"RAY_ADDRESS": cluster.address} | settings
    job = subprocess.run(
        [str(cluster.python / "python"), "pipeline/caption.py", "--dataset", str(images), "--name", "never"],
        cwd=ROOT, env=cluster.environment(**joining), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert job.returncode == 2
    *others, error = job.stderr.splitlines()
    assert error.startswith("error: ")
    assert line in error
    assert all("Failed to get cluster ID from GCS server: Unauthenticated" in other for other in others)  # Ray's own
    assert not (images / "captions" / "never").exists()


# --- Jobs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(cluster: Cluster) -> Path:
    folder = cluster.folder / "raw"
    command = (sys.executable, "pipeline/sample_data.py", "--out", folder, "--images", IMAGES)
    subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, timeout=120, check=True)
    return folder


@pytest.fixture(scope="module")
def ingested(cluster: Cluster, raw: Path) -> str:
    """The log of the job."""
    return succeeded(cluster.submit("--", *ingest(raw, cluster.dataset)))


def ingest(raw: Path, dataset: Path) -> tuple[object, ...]:
    flags = ("--raw", raw, "--dataset", dataset, "--rows-per-shard", ROWS_PER_SHARD)
    return ("python", "pipeline/ingest.py", *flags)


@pytest.fixture(scope="module")
def images(cluster: Cluster, ingested: str) -> Path:
    return cluster.dataset


def shards(cluster: Cluster, folder: str) -> dict[str, int]:
    """Finished ones, by name, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in (cluster.dataset / folder).glob("*.parquet")}


def test_a_submitted_jobs_log_lies_where_the_dashboard_lists_it(cluster: Cluster, ingested: str) -> None:
    (line,) = (line for line in ingested.splitlines() if "; log: " in line or ": log: " in line)
    assert "http://" not in line
    name = Path(line.partition("log: ")[2]).name
    nodes = json.loads(cluster.request(f"{cluster.dashboard}/api/v0/nodes", cluster.token.read_text())[1])
    head = next(node["node_id"] for node in nodes["data"]["result"]["result"] if node["is_head_node"])
    url = f"{cluster.dashboard}/api/v0/logs/file?node_id={head}&filename={name}"
    status, text = cluster.request(url, cluster.token.read_text())
    assert status == 200
    assert "session folder of Ray" in text


@pytest.fixture(scope="module")
def captioned(cluster: Cluster, images: Path) -> tuple[str, dict[str, int], str]:
    """What a job prints that is stopped in its middle, the shards that it leaves, and what the same command prints."""
    job = cluster.submit("--submission-id", "stopped", "--", "python", "pipeline/caption.py", wait=False)
    wait_until(lambda: job.poll() is not None or shards(cluster, "captions"))
    # What `ray job stop` asks for; by the time that it has started, this small job would have ended.
    assert cluster.request(f"{cluster.dashboard}/api/jobs/stopped/stop", cluster.token.read_text(), {})[0] == 200
    output, _ = job.communicate(timeout=60)
    kept = shards(cluster, "captions")
    return output, kept, succeeded(cluster.submit("--", "python", "pipeline/caption.py"))


def test_a_data_job_that_is_stopped_keeps_its_shards_and_the_same_command_goes_on(
    cluster: Cluster, captioned: tuple[str, dict[str, int], str]
) -> None:
    stopped, kept, again = captioned
    assert "stopped; run the same command to go on" in stopped, stopped
    assert cluster.jobs()["stopped"]["status"] == "STOPPED"
    assert 0 < len(kept) < len(shards(cluster, "images"))
    assert f"{len(shards(cluster, 'images'))} image shards, {len(kept)} already captioned" in again
    assert shards(cluster, "captions").items() >= kept.items()
    assert shards(cluster, "captions").keys() == shards(cluster, "images").keys()


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose code differs from the cluster's, with all that lies in one after `make demo`."""
    folder = tmp_path_factory.mktemp("lap") / "top"
    for name in UPLOADED:
        (folder / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for name in (".venv/lib", ".venv-captioner/lib", ".git", "demo/raw", "demo-mine/raw", "dataset/images", "run/demo"):
        (folder / name).mkdir(parents=True)
        with (folder / name / "big").open("wb") as file:
            file.truncate(600 << 20)  # more than Ray takes
    engine = folder / "captioner" / "engines" / "tags.py"
    changed = engine.read_text().replace('"engine": "tags"', '"engine": "tags of the laptop"')
    assert changed != engine.read_text()
    engine.write_text(changed)
    return folder


def test_from_a_laptop_its_own_code_runs_on_all_nodes_and_nothing_that_git_ignores_is_uploaded(
    cluster: Cluster, images: Path, laptop: Path
) -> None:
    caption = "python pipeline/caption.py"
    job = cluster.submit(
        "--working-dir", ".", "--", "sh", "-c", f"{caption} --dataset demo; {caption} --name laptop", cwd=laptop
    )
    error = "error: --dataset demo would be in the uploaded folder, which Ray removes: give s3://bucket/prefix or"
    assert error in succeeded(job)
    written = list((cluster.dataset / "captions" / "laptop").glob("*.parquet"))
    assert len(written) == len(shards(cluster, "images"))
    engines = {engine for path in written for engine in pq.read_table(path)["engine"].to_pylist()}
    assert engines == {"tags of the laptop"}
    uploaded = cluster.folder.glob("ray/session_*/runtime_resources/working_dir_files/*/*")
    assert {path.name for path in uploaded} == set(UPLOADED)


# --- Training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curated(cluster: Cluster, captioned: object) -> Finished:
    """A job that curates for the demo stage, and then tries the last stage with what needs no download."""
    last = "--stage 1024 --set selection=demo --set codec=dct --set text_encoder=local --from nothing"
    commands = f"python pipeline/curate.py --stage demo && python trainer/run.py {last}"
    return cluster.submit("--submission-id", "last", "--", "sh", "-c", commands)


def test_the_last_stage_is_refused_without_a_gpu_and_the_job_has_failed_with_that_line(
    cluster: Cluster, curated: Finished
) -> None:
    line = refused(curated)
    assert "there is no GPU, and stage 1024 trains" in line
    last = cluster.jobs()["last"]
    assert (last["status"], last["driver_exit_code"]) == ("FAILED", 2)
    assert line in last["message"]


def test_the_last_stage_names_the_command_that_makes_its_selection(cluster: Cluster, images: Path) -> None:
    line = refused(cluster.submit("--", "python", "trainer/run.py", "--stage", "1024"))
    assert f"{images} has no selection '1024'; run: python pipeline/curate.py --dataset {images} --stage 1024" in line


@pytest.mark.usefixtures("curated")
def test_a_training_that_is_stopped_saves_a_checkpoint_and_the_same_job_goes_on(cluster: Cluster) -> None:
    command = ("--", "python", "trainer/run.py", "--stage", "demo", "--set", "log_every=1", "--set", "batch_size=16")
    job = cluster.submit("--submission-id", "training", *command, wait=False)
    metrics = cluster.run / "demo" / "metrics.jsonl"
    wait_until(lambda: job.poll() is not None or (metrics.exists() and metrics.read_text()))
    subprocess.run(["ray", "job", "stop", "training"], env=cluster.client(), timeout=240, check=True)
    output, _ = job.communicate(timeout=60)
    steps = len(metrics.read_text().splitlines())
    assert f"run: stopped after step {steps}, which is saved" in output
    saved = [path.name for path in (cluster.run / "demo" / "checkpoints").glob("step-*")]
    assert saved == [f"step-{steps:08}"]
    assert cluster.jobs()["training"]["status"] == "STOPPED"
    again = succeeded(cluster.submit(*command, "--steps", steps + 1))
    assert f"going on from step {steps}" in again


# --- A node is killed -------------------------------------------------------------------------------------------------

# Two actors, of which one is on each node; their shards end when the file `go` is there.
WITH_ACTORS = """
import sys, time
from pathlib import Path
from pipeline.core.cluster import cluster
from pipeline.core.dataflow import Pool, map_shards_with

def make():
    def work(shard):
        (folder / f"{shard}.begun").touch()
        until = time.monotonic() + 120
        while not (folder / "go").exists() and time.monotonic() < until:
            time.sleep(0.05)
        (folder / f"{shard}.done").touch()
    return work

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with cluster("actors"):
        print(map_shards_with(make, {name: name for name in "abcdefgh"}, lambda shard: 1, "actors", Pool(2, 1, 0)))
"""


@pytest.fixture(scope="module")
def survivors(cluster: Cluster, raw: Path) -> tuple[Finished, Finished, Path]:
    """Two jobs that end after the node was killed on which an actor and all tasks were: with actors, and an ingest;
    and the latter's dataset."""
    folder, dataset = cluster.folder / "actors", cluster.folder / "second"
    folder.mkdir()
    script = folder / "job.py"
    script.write_text(WITH_ACTORS)
    actors = cluster.submit("--", "python", script, folder, wait=False)
    wait_until(lambda: actors.poll() is not None or len(list(folder.glob("*.begun"))) == 2)
    tasks = cluster.submit("--", *ingest(raw, dataset), wait=False)
    wait_until(lambda: tasks.poll() is not None or len(list((dataset / "images").glob("*.parquet"))) > 2)
    worker = cluster.nodes[1]
    assert "ray::_Actor" in worker.titles()
    worker.raylet.kill()
    finished_before = len(list((dataset / "images").glob("*.parquet")))
    (folder / "go").touch()
    outputs = [job.communicate(timeout=240)[0] for job in (actors, tasks)]
    assert finished_before < IMAGES // ROWS_PER_SHARD
    return (
        CompletedProcess([], actors.returncode, outputs[0]),
        CompletedProcess([], tasks.returncode, outputs[1]),
        dataset,
    )


def test_tasks_of_a_node_that_is_killed_leave_the_files_of_an_undisturbed_job(
    cluster: Cluster, images: Path, survivors: tuple[Finished, Finished, Path]
) -> None:
    _, job, dataset = survivors
    succeeded(job)
    for folder in ("images", "rejected"):
        written = {path.name: path.read_bytes() for path in (dataset / folder).glob("*.parquet*")}
        assert written == {path.name: path.read_bytes() for path in (images / folder).glob("*.parquet*")}
    records = [json.loads((root / "images" / "run.json").read_text()) for root in (dataset, images)]
    for record in records:
        record.pop("seconds")
    assert records[0] == records[1]


def test_actors_of_a_node_that_is_killed_leave_their_shards_to_others(
    survivors: tuple[Finished, Finished, Path],
) -> None:
    job, _, _ = survivors
    assert "{}" in succeeded(job).splitlines()
