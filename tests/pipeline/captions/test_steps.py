"""The caption pipeline on Ray: processes that are killed, a picture that kills its process, nodes that join."""

import asyncio
import ctypes
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from PIL import Image
from ray import cloudpickle

from captioner.engines import Completion
from captioner.prompts import PROMPT_VERSION, Prompt
from captioner.sampling import CompletionParams, Sampling
from pipeline.captions import steps
from pipeline.captions.caption_rows import decode_rows
from pipeline.captions.engine_config import CaptionSettings, EngineConfig
from pipeline.captions.engine_pool import EnginePool, plan_pool
from pipeline.captions.model_captions import CaptionTask
from pipeline.captions.stats import CaptionMeter
from pipeline.captions.tag_captions import ImageShard
from pipeline.core import row_pipeline
from pipeline.core.cluster import cluster as connected
from pipeline.core.cluster import node_resources, nodes_of
from pipeline.core.errors import ShardsFailed
from pipeline.core.jobs import run
from pipeline.core.records import IMAGES, TAG_CATEGORIES
from pipeline.core.tables import DIED
from pipeline.storage.shards import Store

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import a test module

ROOT = Path(__file__).parents[3]
ONE_ENGINE = plan_pool(None, 1, [], use_gpus=False)
LETTERS = "bcdfghjklm"
HELD_AFTER = 200  # requests of the jobs on a cluster, until the test lets them go on


@dataclass(frozen=True, kw_only=True)
class Logged(EngineConfig):
    """An engine that appends what it is asked to a file."""

    log: str
    seconds: float = 0.0  # per answer
    held_after: int | None = None  # requests in all, from which on it waits until the file `go` is beside the log

    async def start(self) -> Any:
        return LoggedEngine(self)


class LoggedEngine:
    name, model = "logged", "none"

    def __init__(self, config: Logged) -> None:
        self.config = config

    async def complete(self, prompt: Prompt, image: Image.Image, params: CompletionParams) -> Completion:
        hint = prompt.hints.rpartition("Seen: ")[2].rstrip(".")
        log = Path(self.config.log)
        with log.open("a") as file:
            file.write(f"{hint}|{os.getpid()}|{image.getpixel((0, 0))}\n")
        await asyncio.sleep(self.config.seconds)
        held = self.config.held_after is not None and log.read_text().count("\n") > self.config.held_after
        while held and not log.with_name("go").exists():
            await asyncio.sleep(0.1)
        return Completion(f"A girl stands in a field at night and points at {hint} above.", "stop", 10, 5)

    async def close(self) -> None:
        pass


def star(number: int) -> str:
    """A hint without digits, because captions that differ only in digits count as repeated."""
    return "star " + "".join(LETTERS[int(digit)] + "o" for digit in f"{number:03}")


def colour(number: int) -> tuple[int, int, int]:
    return (number % 256, 90, 255 - number % 256)


def picture(number: int, side: int = 40) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", (side, side), colour(number)).save(encoded, "PNG")
    return encoded.getvalue()


@dataclass(frozen=True)
class Dataset:
    store: Store
    parts: list[ImageShard]
    log: Path

    def task(self, seconds: float = 0.0, held_after: int | None = None) -> CaptionTask:
        engine = Logged(
            engine="logged", model="none", concurrency=12, log=str(self.log), seconds=seconds, held_after=held_after
        )
        settings = CaptionSettings(
            engine="logged", model="none", prompt_version=PROMPT_VERSION, sampling=Sampling(), max_side=768
        )
        return CaptionTask(dataset=self.store.root, folder="captions", engine=engine, settings=settings)

    def asked(self) -> list[list[str]]:
        """Hint, process and colour of each request so far."""
        return [line.split("|") for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def captions(self) -> dict[str, dict[str, Any]]:
        rows = {}
        for part in self.parts:
            table = self.store.read_table(f"captions/{part.shard}.parquet").to_pylist()
            rows |= {row["id"]: row for row in table}
            assert [row["id"] for row in table] == [f"{part.shard}:{number}" for number in range(part.rows)]
        return rows


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    store = Store(str(tmp_path / "dataset"))
    for shard in "ab":
        rows = [
            {
                "id": f"{shard}:{number}", "source": "danbooru", "image": picture(number), "format": "PNG",
                "width": 40, "height": 40, "sha256": "", "phash": 0, "page": 0,
                **{f"tags_{category}": [] for category in TAG_CATEGORIES},
                "tags_general": [star(number + 500 * (shard == "b"))],
            }
            for number in range(200)
        ]  # fmt: skip
        store.write_table(f"images/{shard}.parquet", pa.Table.from_pylist(rows, IMAGES), IMAGES)
    return Dataset(store, [ImageShard(shard, 200, f"digest of {shard}") for shard in "ab"], tmp_path / "log")


def caption(
    dataset: Dataset, seconds: float = 0.0, pool: EnginePool = ONE_ENGINE, held_after: int | None = None
) -> tuple[dict[str, str], CaptionMeter]:
    task = dataset.task(seconds, held_after)
    todo = steps.pending_shards(task, dataset.parts)
    meter = steps.new_meter(todo, None)
    return steps.caption_shards(task, todo, pool, meter), meter


def expected(without: tuple[str, ...] = ()) -> dict[str, str]:
    text = "A girl stands in a field at night and points at {} above."
    rows = {f"{s}:{n}": text.format(star(n + 500 * (s == "b"))) for s in "ab" for n in range(200)}
    return {id: caption for id, caption in rows.items() if id not in without}


def kill(title: str, wanted: Callable[[], bool], killed: list[int]) -> threading.Thread:
    """A thread that kills the first process of this test's Ray with this title once `wanted` is true."""

    def run() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and not killed:
            if wanted():
                for process in psutil.Process().children(recursive=True):
                    try:
                        if process.cmdline()[:1] and title in process.cmdline()[0]:
                            process.send_signal(signal.SIGKILL)
                            killed.append(process.pid)
                            return
                    except psutil.Error:
                        continue
            time.sleep(0.005)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_a_killed_actor_and_a_killed_decoder_change_no_caption(ray_address: str, dataset: Dataset) -> None:
    actor: list[int] = []
    decoder: list[int] = []
    killers = [
        kill("MapBatches(decode)", lambda: len(dataset.asked()) > 10, decoder),
        kill("MapWorker(MapBatches(caption))", lambda: len(dataset.asked()) > 100, actor),
    ]
    failed, meter = caption(dataset, seconds=0.1)
    for killer in killers:
        killer.join()
    assert failed == {}
    assert actor
    assert decoder
    rows = dataset.captions()
    assert {id: row["caption"] for id, row in rows.items()} == expected()
    assert {(row["reason"], row["attempts"], row["engine"]) for row in rows.values()} == {(None, 1, "logged")}
    asked = Counter(hint for hint, *_ in dataset.asked())
    assert set(asked.values()) <= {1, 2}
    assert sum(asked.values()) <= 400 + 5 * 12, "only what was in flight is asked again"
    # The killed one, the one in its place, and the one that does alone each row that was in flight.
    assert len({process for _, process, _ in dataset.asked()}) == 3
    assert meter.record()["engines"] == 3
    assert not dataset.store.exists("captions/partial")


def faulty_decoder(table: pa.Table, poison: bytes, **options: Any) -> Iterator[pa.Table]:
    """decode_rows with a decoder that reads from address 0 when it meets one picture: a real segmentation fault."""
    for row in table.select(["image", "id", DIED]).to_pylist():
        if row["id"] == "b:123" and row["image"] == poison and not row[DIED]:
            ctypes.string_at(0)
    yield from decode_rows(table, **options)


def test_a_picture_that_kills_its_process_costs_its_row_and_is_not_tried_again(
    ray_address: str, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "decode_rows", partial(faulty_decoder, poison=picture(123)))
    failed, meter = caption(dataset)
    assert failed == {}
    rows = dataset.captions()
    died = rows.pop("b:123")
    assert (died["caption"], died["reason"], died["engine"]) == (star(623), "decoder died", "tags")
    assert {id: row["caption"] for id, row in rows.items()} == expected(without=("b:123",))
    assert Counter(hint for hint, *_ in dataset.asked()) == Counter(
        star(number) for number in [*range(200), *range(500, 700)] if number != 623
    )
    # Each row had its own picture.
    numbers = {star(number + 500 * shard): number for shard in range(2) for number in range(200)}
    assert all(pixel == str(colour(numbers[hint])) for hint, _, pixel in dataset.asked())
    assert meter.record()["rejected"] == {"decoder died": 1}


# --- A cluster of several nodes ---------------------------------------------------------------------------------------


def drive(root: str, log: str) -> None:
    """The driver of a job: captions on nodes that offer the resource `captioner` and prints the meter's record. After
    HELD_AFTER requests it waits until the file `go` is beside the log."""
    row_pipeline._LOST_SECONDS = 5.0
    parts = [ImageShard(shard, 200, f"digest of {shard}") for shard in "ab"]
    with connected("caption"):
        pool = plan_pool(None, 1, nodes_of("captioner"), use_gpus=True, resources=node_resources("captioner"))
        failed, meter = caption(Dataset(Store(root), parts, Path(log)), 0.1, pool, HELD_AFTER)
    print(json.dumps(meter.record()))
    if failed:
        raise ShardsFailed(failed)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster on this machine: a head with two CPUs and the dashboard."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": True})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def add_captioner(cluster: Any) -> Iterator[Callable[[], Any]]:
    """Starts a node that offers `captioner` and returns it. It leaves the cluster at the end of the test."""
    nodes = []

    def add() -> Any:
        nodes.append(cluster.add_node(num_cpus=1, resources={"captioner": 1}))
        return nodes[-1]

    yield add
    for node in nodes:
        if node in cluster.worker_nodes:
            cluster.remove_node(node)


@pytest.fixture
def start_driver(dataset: Dataset, cluster: Any) -> Iterator[Callable[[], "subprocess.Popen[str]"]]:
    drivers: list[subprocess.Popen[str]] = []

    def start() -> "subprocess.Popen[str]":
        command = [sys.executable, __file__, dataset.store.root, str(dataset.log)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address, "RAY_ENABLE_AUTO_CONNECT": "0"}
        drivers.append(subprocess.Popen(command, env=os.environ | environment, **pipes))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.kill()
        driver.communicate(timeout=60)


def wait_until(is_true: Callable[[], bool], driver: "subprocess.Popen[str]", seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.1)


def data_tab(cluster: Any) -> list[dict[str, Any]]:
    """What the dashboard's Data tab gets from its API, of all datasets of the newest job."""
    address = cluster.head_node.address_info["webui_url"]
    token = Path.home() / ".ray" / "auth_token"
    headers = {"Authorization": f"Bearer {token.read_text().strip()}"} if token.exists() else {}

    def get(path: str) -> Any:
        request = urllib.request.Request(f"http://{address}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    job = max(job["job_id"] for job in get("/api/jobs/") if job["job_id"])
    return list(get(f"/api/data/datasets/{job}")["datasets"])


@pytest.mark.cluster
def test_a_captioner_node_joins_a_running_job_and_the_dashboard_shows_its_operators(
    dataset: Dataset,
    cluster: Any,
    add_captioner: Callable[[], Any],
    start_driver: Callable[[], "subprocess.Popen[str]"],
) -> None:
    add_captioner()
    driver = start_driver()
    wait_until(lambda: len(dataset.asked()) > 20, driver)
    add_captioner()
    wait_until(lambda: len({process for _, process, _ in dataset.asked()}) == 2, driver)

    [shown] = data_tab(cluster)
    assert shown["dataset"].startswith("caption_")
    assert (shown["state"], shown["end_time"]) == ("RUNNING", None)
    operators = {operator["name"]: operator for operator in shown["operators"]}
    names = ["MapBatches(read)", "MapBatches(decode)", "MapBatches(caption)", "MapBatches(write)"]
    assert [name for name in operators if name.startswith("MapBatches")] == names
    assert operators["MapBatches(read)"]["total_rows"] == 400
    assert operators["MapBatches(decode)"]["progress"] >= operators["MapBatches(caption)"]["progress"] > 0, (
        shown
    )  # tasks
    assert {operator["state"] for operator in operators.values()} <= {"RUNNING", "FINISHED"}
    # Values of these come from Prometheus, where one runs.
    assert {"queued_blocks", "ray_data_output_rows", "ray_data_current_bytes"} <= operators[names[2]].keys()

    dataset.log.with_name("go").touch()
    output, errors = driver.communicate(timeout=180)
    assert driver.returncode == 0, errors
    assert json.loads(output.splitlines()[-1])["engines"] == 2
    assert {id: row["caption"] for id, row in dataset.captions().items()} == expected()
    assert len(dataset.asked()) == 400


@pytest.mark.cluster
def test_a_job_without_any_captioner_left_stops_and_continues_with_a_new_one(
    dataset: Dataset,
    cluster: Any,
    add_captioner: Callable[[], Any],
    start_driver: Callable[[], "subprocess.Popen[str]"],
) -> None:
    only = add_captioner()
    driver = start_driver()
    wait_until(lambda: len(dataset.asked()) > HELD_AFTER, driver)
    cluster.remove_node(only, allow_graceful=False)
    _, errors = driver.communicate(timeout=180)
    assert driver.returncode == 1
    last = errors.splitlines()[-1]
    assert last.endswith(
        "no node of the cluster has offered captioner for 5 s; finished rows are kept: start such a node and run the "
        "same command again"
    ), errors
    assert "Traceback" not in errors

    before = len(dataset.asked())
    dataset.log.with_name("go").touch()
    add_captioner()
    driver = start_driver()
    output, errors = driver.communicate(timeout=180)
    assert driver.returncode == 0, errors
    kept = json.loads(output.splitlines()[-1])["rows_kept"]
    assert kept >= 128
    assert len(dataset.asked()) - before == 400 - kept
    assert {id: row["caption"] for id, row in dataset.captions().items()} == expected()


if __name__ == "__main__":
    run(lambda: drive(*sys.argv[1:]))
