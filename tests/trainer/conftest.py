"""One small dataset and one run for all tests of training jobs. The run is killed once and resumed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from typing import TextIO

import pytest

RunJob = Callable[..., CompletedProcess[str]]
StartJob = Callable[..., "subprocess.Popen[str]"]

ROOT = Path(__file__).parents[2]
STEPS = 12
# Every step is logged and every fourth one saved; one evaluation, at the end.
SETTINGS = ("--steps", STEPS, "--set", "log_every=1", "--set", "checkpoint_every=4", "--set", f"evaluate_every={STEPS}")


def training(dataset: Path, run: Path) -> tuple[object, ...]:
    """The command of the job with two workers."""
    start = ("trainer/run.py", "--stage", "demo", "--dataset", dataset, "--run", run, "--audit", run / "audit")
    return (*start, *SETTINGS, "--workers", 2, "--prompts", prompts_beside(dataset))


def prompts_beside(dataset: Path) -> Path:
    """The file of the two prompts that evaluations draw, one by each worker. By default they draw eight."""
    return dataset.with_name("prompts.txt")


@pytest.fixture(scope="session")
def dataset(make_with_job: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn, and curated for the demo stage."""
    folder = tmp_path_factory.mktemp("dataset")
    for job in (
        ("pipeline/sample_data.py", "--out", folder / "raw", "--images", 200),
        ("pipeline/ingest.py", "--raw", folder / "raw", "--dataset", folder / "dataset"),
        ("pipeline/caption.py", "--dataset", folder / "dataset"),
        ("pipeline/curate.py", "--dataset", folder / "dataset"),
    ):
        make_with_job(*job)
    prompts_beside(folder / "dataset").write_text("red star\nblue fish\n")
    return folder / "dataset"


def losses(run: Path) -> dict[int, float]:
    """The loss of each step, of the last time that it was taken."""
    file = run / "demo" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {line["step"]: line["loss"] for line in lines}


def saved(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "demo" / "checkpoints").glob("step-*"))


def wait_until(is_true: Callable[[], bool], job: "subprocess.Popen[str]", seconds: float = 480) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert job.poll() is None, f"the job ended with {job.returncode}"
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.02)


def descendants(pid: int) -> list[int]:
    """All processes started by this one, directly or not."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, size = {pid}, 0
    while size < len(found):
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return sorted(found - {pid})


def is_train_worker(pid: int) -> bool:
    try:
        return "RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


@contextmanager
def started(
    dataset: Path, run: Path, address: str, output: int | TextIO, **variables: str
) -> "Iterator[subprocess.Popen[str]]":
    """The job with two workers on the Ray at `address`, or on one that it starts; killed at the end of the block.
    `variables` of its environment."""
    command = [sys.executable, *map(str, training(dataset, run))]
    environment = os.environ | {"RAY_ADDRESS": address} | variables
    job = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield job
    finally:
        job.kill()
        job.wait(timeout=60)


@pytest.fixture(scope="session")
def killed(dataset: Path, ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers, which communicate over gloo. Driver and workers are killed between two checkpoints."""
    run = tmp_path_factory.mktemp("runs") / "killed"
    with started(dataset, run, ray_address, subprocess.DEVNULL) as job:
        wait_until(lambda: max(losses(run), default=0) >= 5 and bool(saved(run)), job)
        workers = [pid for pid in descendants(os.getpid()) if is_train_worker(pid)]
        assert len(workers) >= 2
        for pid in [job.pid, *descendants(job.pid), *workers]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert job.wait() == -signal.SIGKILL
    return run


@dataclass(frozen=True)
class Posted:
    """What a server on this machine was sent, at a path that is a secret."""

    url: str
    secret: str
    bodies: list[dict[str, object]]


@pytest.fixture(scope="session")
def posted() -> Iterator[Posted]:
    bodies: list[dict[str, object]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        secret = "b3f7s3cr3t"
        yield Posted(f"http://user:{secret}@127.0.0.1:{server.server_address[1]}/{secret}", secret, bodies)
        server.shutdown()


@pytest.fixture(scope="session")
def resumed(dataset: Path, killed: Path, posted: Posted) -> tuple[Path, str]:
    """The killed run, resumed to its end, and what the job printed. The job starts Ray itself, as on a laptop."""
    run, printed = shutil.copytree(killed, killed.parent / "resumed"), killed.parent / "printed"
    with printed.open("w") as output, started(dataset, run, "", output, HDM_NOTIFY=posted.url) as job:
        assert job.wait(timeout=480) == 0, printed.read_text()[-2000:]
    return run, printed.read_text()


@pytest.fixture(scope="session")
def whole(resumed: tuple[Path, str]) -> Path:
    """A finished run."""
    return resumed[0]


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DINOv2 with 24 features of patches of 7 pixels."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("vision") / "dinov2"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2Model(
            Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
        )
    model.save_pretrained(folder)
    normalisation = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalisation))
    return folder


@pytest.fixture(scope="session")
def random_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a random model of the demo stage and its text encoder, made without training."""
    import torch  # seconds, which tests of other things should not wait

    from trainer.encoders.load_codec import load_codec
    from trainer.encoders.text import build_local_text_encoder, text_width
    from trainer.model.config import XUTConfig
    from trainer.model.xut import XUT
    from trainer.recipe.stages import STAGES
    from trainer.runs.checkpoint import Checkpoints
    from trainer.runs.ema import EMA
    from trainer.runs.training_state import training_state

    run = tmp_path_factory.mktemp("runs") / "random"
    stage = STAGES["demo"]
    build_local_text_encoder(["red star", "blue fish"], run / "text_encoder", seed=0)
    config = XUTConfig.tiny(
        in_channels=load_codec(stage.codec).channels, patch_size=1, text_dim=text_width(run / "text_encoder")
    )
    torch.manual_seed(0)
    model = XUT(config)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # a new model's last layer gives nothing
    state = training_state(
        stage_name="demo",
        epoch=0,
        position=32,
        first_epoch=0,
        seed=0,
        config={"stage": asdict(stage), "model": config.to_dict(), "example_prompts": ["red star"]},
        selection="abc",
    )
    tensors = {"model": model.state_dict(), "ema": EMA(model, 0.9).state_dict()}
    Checkpoints.of_stage(run, "demo").save(1, tensors, state)
    return run


@dataclass(frozen=True)
class ServedPage:
    """A running trainer/serve.py with the random run, which draws on one thread."""

    url: str  # with a slash at its end
    queue: int = 1
    largest_side: int = 128
    most_steps: int = 1000


@pytest.fixture(scope="session")
def served(random_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPage]:
    page, log = ServedPage(""), tmp_path_factory.mktemp("served") / "log"
    limits = ("--queue", page.queue, "--largest-side", page.largest_side, "--most-steps", page.most_steps)
    command = [sys.executable, ROOT / "trainer/serve.py", "--run", random_run, "--port", 0, *limits]
    with log.open("w") as output:
        server = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        yield replace(page, url=_address(server, log))
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=180) == 0, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        server.kill()
        server.wait(timeout=60)


def _address(server: "subprocess.Popen[bytes]", log: Path) -> str:
    """As soon as the page answers there."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        if found := re.search(r"http://127.0.0.1:\d+/", log.read_text()):
            with urllib.request.urlopen(found[0], timeout=60):
                return found[0]
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices: on a busy machine threads would wait for each other a hundred times as long as they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
