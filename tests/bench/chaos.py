"""Kills processes of data jobs at random, runs each job again until it ends with 0, and compares what it wrote with the
output of an undisturbed run: every table row by row, and the counts in run.json.

Starts a Ray of two nodes on loopback and a server that answers as a captioner does, draws a few hundred pictures, and
runs ingest, caption, score and curate once without disturbance. Then each kill takes a job, a kind of process (driver,
Ray worker, actor, raylet of the second node) and a moment at random. A killed node is started again at once. Ends with
1 if any output deviates. Only processes that this script started are killed. Takes half a minute per kill.

    python tests/bench/chaos.py --kills 30 --seed 0
"""

import argparse
import base64
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import psutil
import pyarrow.parquet as pq
from onnx import TensorProto, helper, numpy_helper

ROOT: Final = Path(__file__).parents[2]
_SECONDS: Final = 240.0  # in which a job must end
_RUNS: Final = 5  # of a job after a kill, until it must have ended with 0
_NODE_SECONDS: Final = 120.0  # in which a node must start
_NODE_TRIES: Final = 3
_NO_WORK: Final = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")  # agents end with their node
_SIDE: Final = 32  # pixels of the classifier's input
_RAY_SETTINGS: Final = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


@dataclass(frozen=True)
class Job:
    """A data job of the pipeline."""

    name: str
    flags: str  # with {raw}, {server} and {model}
    needs: tuple[str, ...]  # folders of the dataset that it reads
    writes: tuple[str, ...]
    victims: tuple[str, ...] = ("driver", "worker", "raylet")


JOBS: Final = {
    job.name: job
    for job in (
        Job("ingest", "--raw {raw} --rows-per-shard 25 --downsize 48", (), ("images", "images-48", "rejected")),
        Job(
            "caption", "--engine openai --url {server} --at-once 8", ("images", "rejected"), ("captions",),
            ("driver", "worker", "actor", "raylet"),
        ),
        Job(
            "score", "--model {model} --batch-size 8", ("images", "rejected"), ("scores",),
            ("driver", "worker", "actor", "raylet"),
        ),
        Job("curate", "--stage demo", ("images", "rejected", "captions"), ("selections",)),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """The result of one kill."""

    job: str
    victim: str
    process: str  # title of the killed process
    after: float  # seconds after Ray was ready
    codes: tuple[int, ...]  # exit codes of the job's runs
    deviations: tuple[str, ...]
    said: tuple[str, ...]  # last lines of runs that failed

    def __str__(self) -> str:
        codes = ", ".join(map(str, self.codes))
        result = "; ".join(self.deviations) or "identical"
        said = "".join(f"\n    {line}" for line in self.said)
        return (
            f"{self.job:8} {self.victim:7} {self.process:40} after {self.after:5.1f} s  exits {codes:12} {result}{said}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="Default: 30.")
    parser.add_argument("--seed", type=int, default=0, help="Default: 0.")
    parser.add_argument("--images", type=int, default=300, help="Pictures to draw. Default: 300.")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="Default: all.")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the nodes as well
    rng = random.Random(args.seed)
    pairs = [(name, victim) for name in args.jobs for victim in JOBS[name].victims]
    planned: list[tuple[str, str]] = []
    while len(planned) < args.kills:
        planned += rng.sample(pairs, len(pairs))
    started = time.monotonic()
    kills = []
    with Chaos.started(args.images) as chaos:
        chaos.run_undisturbed(args.jobs)
        for number, (name, victim) in enumerate(planned[: args.kills], 1):
            kills.append(chaos.kill(name, victim, rng))
            print(f"{number:3} {kills[-1]}", flush=True)
    print_table(kills, time.monotonic() - started)
    sys.exit(any(kill.deviations for kill in kills))


def print_table(kills: Sequence[Kill], seconds: float) -> None:
    same = Counter((kill.job, kill.victim) for kill in kills if not kill.deviations)
    every = Counter((kill.job, kill.victim) for kill in kills)
    victims = ("driver", "worker", "actor", "raylet")
    print(f"\n| identical of killed | {' | '.join(victims)} |\n|---|{'---|' * len(victims)}")
    for job in dict.fromkeys(kill.job for kill in kills):
        cells = [f"{same[job, victim]} of {every[job, victim]}" if every[job, victim] else "" for victim in victims]
        print(f"| {job} | {' | '.join(cells)} |")
    first = sum(kill.codes == (0,) for kill in kills)
    print(
        f"\n| chaos: {len(kills)} kills, output identical to an undisturbed run | {same.total()} of {len(kills)} "
        f"({first} jobs went on by themselves); {seconds / 60:.0f} min |"
    )


# --- Jobs on a cluster ------------------------------------------------------------------------------------------------


@dataclass
class Chaos:
    """A cluster, a server, a model and raw pictures, and what each job writes when nothing disturbs it."""

    folder: Path
    cluster: "Cluster"
    server: str
    content: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each job's output
    seconds: dict[str, float] = field(default_factory=dict)  # that each job works
    started_jobs: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @classmethod
    @contextmanager
    def started(cls, images: int) -> Iterator["Chaos"]:
        folder = Path(tempfile.mkdtemp(prefix="hdm-"))  # short, because paths of sockets have at most 107 bytes
        try:
            with Cluster.started(folder) as cluster, answering() as server:
                chaos = cls(folder, cluster, server)
                save_classifier(folder / "model")
                draw = ["pipeline/sample_data.py", "--images", str(images), "--out", str(folder / "raw")]
                environment = cluster.environment()
                subprocess.run([sys.executable, *draw], cwd=ROOT, env=environment, check=True, capture_output=True)
                try:
                    yield chaos
                finally:
                    for process in chaos.started_jobs:
                        process.kill()
                        process.wait()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def undisturbed(self) -> Path:
        return self.folder / "undisturbed"

    def run_undisturbed(self, jobs: Sequence[str]) -> None:
        """Runs all jobs up to the last of these."""
        for name in list(JOBS)[: max(list(JOBS).index(job) for job in jobs) + 1]:
            running = self.start(JOBS[name], self.undisturbed)
            wait_for(running.is_ready)
            ready = time.monotonic()
            assert running.wait() == 0, running.output
            self.seconds[name] = time.monotonic() - ready
            self.content[name] = content(self.undisturbed, JOBS[name])
            assert self.content[name], name

    def start(self, job: Job, dataset: Path) -> "Running":
        paths = {"raw": self.folder / "raw", "model": self.folder / "model", "server": self.server}
        flags = [flag.format(**paths) for flag in job.flags.split()]
        log = self.folder / f"{job.name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, f"pipeline/{job.name}.py", "--dataset", str(dataset), *flags],
                cwd=ROOT, env=self.cluster.environment(), stdout=output, stderr=output,
            )  # fmt: skip
        self.started_jobs.append(process)
        return Running(process, log)

    def kill(self, name: str, victim: str, rng: random.Random) -> Kill:
        """Runs a job, kills a process of this kind at a random moment of the time that the job works, and runs it again
        until it ends with 0."""
        job, moment = JOBS[name], rng.random()
        for _ in range(4):
            dataset = self.folder / "killed"
            shutil.rmtree(dataset, ignore_errors=True)
            dataset.mkdir()
            for folder in job.needs:
                shutil.copytree(self.undisturbed / folder, dataset / folder)
            if job.needs:
                shutil.copy2(self.undisturbed / "dataset.json", dataset)
            running = self.start(job, dataset)
            wait_for(running.is_ready)
            ready = time.monotonic()
            wait_for(lambda: time.monotonic() - ready > moment * self.seconds[name] or running.has_ended)  # noqa: B023
            found = self._found(victim, running, rng)
            after = time.monotonic() - ready
            if found is not None:
                with suppress(psutil.NoSuchProcess):
                    found[0].kill()
                    break
            assert running.wait() == 0, running.output
            moment *= 0.6  # the job was over before
        else:
            raise AssertionError(f"{name} had no {victim}")
        if victim == "raylet":
            self.cluster.restart_second()
        codes, deviations, said = self._until_done(job, dataset, running)
        if codes[-1] == 0:
            deviations += differences(self.content[name], content(dataset, job))
        return Kill(name, victim, found[1][:40], after, codes, tuple(deviations), tuple(said))

    def _found(self, victim: str, running: "Running", rng: random.Random) -> tuple[psutil.Process, str] | None:
        """A process of this kind with its title while the job runs, None if the job ends without one."""
        while not running.has_ended:
            if victim == "driver":
                return psutil.Process(running.process.pid), "driver"
            if victim == "raylet":
                return self.cluster.nodes[1].raylet, "raylet"
            workers = self.cluster.workers()
            if found := [each for each in workers if each[1].startswith("ray::MapWorker") == (victim == "actor")]:
                return rng.choice(found)
            time.sleep(0.02)
        return None

    def _until_done(self, job: Job, dataset: Path, running: "Running") -> tuple[tuple[int, ...], list[str], list[str]]:
        """Exit codes of the job's runs until one is 0, what a user should not see in them, and the last lines of those
        that failed by themselves."""
        codes: list[int] = []
        wrong: list[str] = []
        said: list[str] = []
        while len(codes) < _RUNS:
            codes.append(running.wait())
            last = running.output.splitlines()[-1:]
            wrong += [f"traceback: {line}" for line in last if "Traceback" in running.output]
            if codes[-1] == 0:
                return tuple(codes), wrong, said
            if codes[-1] == 1:
                said += last
            elif codes[-1] != -signal.SIGKILL:
                wrong += [f"exit {codes[-1]}: {line}" for line in last]
            if len(codes) < _RUNS:
                running = self.start(job, dataset)
        return tuple(codes), [*wrong, f"not done after {_RUNS} runs"], said


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def is_ready(self) -> bool:
        """Whether the job has joined Ray, or has ended."""
        return ": Ray with " in self.output or self.has_ended

    def wait(self) -> int:
        """The exit code. A job that takes too long is killed, and has 124."""
        try:
            return self.process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return 124


def wait_for(true: Callable[[], object], seconds: float = _SECONDS) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not true within {seconds} s"
        time.sleep(0.02)


# --- What a job wrote -------------------------------------------------------------------------------------------------


def content(dataset: Path, job: Job) -> dict[str, Any]:
    """Every table below the job's folders, and the counts and hashes of its records, by name."""
    found: dict[str, Any] = {}
    for folder in job.writes:
        for path in sorted((dataset / folder).rglob("*")):
            name = path.relative_to(dataset).as_posix()
            if path.suffix == ".parquet" and not path.name.startswith("."):
                found[name] = pq.read_table(path)
            elif path.name == "run.json":
                record = json.loads(path.read_text())
                found[name] = {key: record[key] for key in ("rows_in", "rows_out", "rejected", "failed")}
            elif path.name == "selection.json":
                found[name] = json.loads(path.read_text())["hash"]
    return found


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    lines = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    lines += [f"{name} should not exist" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        ours, theirs = expected[name], found[name]
        if isinstance(ours, (dict, str)):
            lines += [] if ours == theirs else [f"{name}: {theirs} instead of {ours}"]
        elif not ours.equals(theirs, check_metadata=True):
            rows = zip(ours.to_pylist(), theirs.to_pylist(), strict=False)
            wrong = [number for number, (one, other) in enumerate(rows) if repr(one) != repr(other)]
            lines.append(f"{name}: {ours.num_rows} -> {theirs.num_rows} rows, other rows {wrong[:5]}")
    return lines


# --- Two nodes --------------------------------------------------------------------------------------------------------


@dataclass
class Node:
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def is_ready(self) -> bool:
        return b"--block" in self.log.read_bytes()

    @property
    def raylet(self) -> psutil.Process:
        return next(child for child in psutil.Process(self.process.pid).children() if "raylet" in child.name())


@dataclass
class Cluster:
    """A head and a second node with a token of their own."""

    folder: Path
    address: str = ""
    nodes: list[Node] = field(default_factory=list)
    sessions: set[int] = field(default_factory=set)  # of all processes that were started

    @classmethod
    @contextmanager
    def started(cls, folder: Path) -> Iterator["Cluster"]:
        cluster = cls(folder)
        try:
            port = free_port()
            cluster.address = f"127.0.0.1:{port}"
            temporary = ("--include-dashboard", "false", "--temp-dir", str(folder / "ray"))
            cluster.nodes.append(cluster._start("head", "--port", str(port), *temporary))
            cluster.nodes.append(cluster._start("worker", cluster.address))
            yield cluster
        finally:
            cluster.end()

    def environment(self) -> dict[str, str]:
        """Of a shell that has access."""
        inherited = {name: value for name, value in os.environ.items() if name not in _RAY_SETTINGS}
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        if self.address:
            ray["RAY_ADDRESS"] = self.address
        return inherited | ray | {"PYTHONPATH": str(ROOT), "OPENAI_API_KEY": "none"}

    def _start(self, *role: str) -> Node:
        """Starts a node. Ray's own processes may be too slow on a busy machine: then it is tried again."""
        for _ in range(_NODE_TRIES):
            node = self._try_to_start(*role)
            with suppress(AssertionError):
                wait_for(lambda node=node: node.is_ready or node.process.poll() is not None, _NODE_SECONDS)
            if node.is_ready and node.process.poll() is None:
                return node
            self._kill_session(node.process.pid)
            node.process.wait(20)
        raise AssertionError(node.log.read_text())

    def _try_to_start(self, *role: str) -> Node:
        log = self.folder / f"node-{len(self.sessions)}.log"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        flags = {
            "--num-cpus": 2, "--object-store-memory": 80_000_000, "--min-worker-port": 0, "--max-worker-port": 0,
            "--dashboard-agent-listen-port": free_port(),
        }  # fmt: skip
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["sh", "deploy/start-ray.sh", *role, *(str(part) for flag in flags.items() for part in flag)],
                cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
                env=self.environment() | {"PATH": path, "RAY_ADDRESS": ""},
            )  # fmt: skip
        self.sessions.add(process.pid)
        return Node(process, log)

    def restart_second(self) -> None:
        """Starts the second node again after its raylet was killed."""
        self.nodes[1].process.wait(_SECONDS)
        self.nodes[1] = self._start("worker", self.address)

    def workers(self) -> list[tuple[psutil.Process, str]]:
        """The processes of both nodes that have work, with their titles."""
        found = []
        for node in self.nodes:
            for process in node.raylet.children():
                with suppress(psutil.NoSuchProcess):
                    title = " ".join(process.cmdline())
                    if title.startswith("ray::") and not title.startswith(_NO_WORK):
                        found.append((process, title))
        return found

    def end(self) -> None:
        """Ends all processes of both nodes, also those whose parents were killed."""
        for node in self.nodes:
            node.process.terminate()
        for node in self.nodes:
            with suppress(subprocess.TimeoutExpired):
                node.process.wait(20)
        for session in self.sessions:
            self._kill_session(session)
        for node in self.nodes:
            node.process.wait(20)

    def _kill_session(self, session: int) -> None:
        """Kills the processes of a node that this script started."""
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, PermissionError, psutil.Error):
                if os.getsid(process.pid) == session:
                    process.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


# --- A captioner and a classifier -------------------------------------------------------------------------------------

_WORDS: Final = ("amber", "birch", "cedar", "delta", "ember", "frost", "grape", "hazel", "ivory", "jewel", "maple",
                 "north", "olive", "pearl", "river", "stone")  # fmt: skip


class _Captioner(BaseHTTPRequestHandler):
    """Answers as an OpenAI-compatible server. The caption depends on the picture alone."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        [picture] = re.findall(r"base64,([\w+/=]+)", json.dumps(body["messages"]))
        digest = hashlib.sha256(base64.b64decode(picture)).digest()
        time.sleep(0.1)
        mark = " ".join(_WORDS[byte % len(_WORDS)] for byte in digest[:6])
        text = f"A quiet field at night, with an old stone that bears the mark {mark} beside a narrow path."
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        self._answer({"choices": [choice], "usage": {"prompt_tokens": 300, "completion_tokens": 20}})

    def _answer(self, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Killed clients hang up."""


@contextmanager
def answering() -> Iterator[str]:
    """The address of a captioner."""
    with _Server(("127.0.0.1", 0), _Captioner) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def save_classifier(folder: Path) -> None:
    """A classifier whose two scores depend on the mean colour."""
    weights_CL = np.array([[1, -2], [0, 3], [2, 1]], np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 3, _SIDE, _SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(np.array([2, 3]), "axes"), numpy_helper.from_array(weights_CL, "weights")],
    )
    folder.mkdir()
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "model.onnx"
    )
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "warm", "1": "green"}}))
    size = {"height": _SIDE, "width": _SIDE}
    processor = {"image_processor_type": "ViTImageProcessor", "size": size, "resample": 2, "do_normalize": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


if __name__ == "__main__":
    main()
