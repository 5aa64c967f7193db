"""The caption job with --engine openai and a local server: every row is accounted for, each gets its own answer, and
finished rows are never asked for again.

The server makes its caption from the hints in the prompt. Each picture has a hint that no other has, such as `mark of
alpha bravo cedar`.
"""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from captioner.engines import EngineFailure
from captioner.prompts import PROMPT_VERSION
from captioner.requests import CaptionReason
from pipeline.captions import engine_choice
from pipeline.captions.tag_captions import caption_shard, image_shards
from pipeline.core.records import CAPTIONS, IMAGES
from pipeline.storage import lease as leases
from pipeline.storage.manifest import Catalog
from pipeline.storage.shards import Store

Finished = subprocess.CompletedProcess[str]
RunJob = Callable[..., Finished]
StartJob = Callable[..., "subprocess.Popen[str]"]

MODEL = "fake-pixtral"
LETTERS = ("alpha", "bravo", "cedar", "delta", "ember", "frost", "grape", "hazel", "ivory", "jewel")
BROKEN = b"\xff\xd8\xff no longer a JPEG"


# --- A dataset and its captions ---------------------------------------------------------------------------------------


def words_of(number: int) -> str:
    """A number from 0 to 999 in words."""
    return " ".join(LETTERS[int(digit)] for digit in f"{number:03}")


def hint(number: int) -> str:
    return f"mark of {words_of(number)}"


def good_caption(number: int) -> str:
    return f"A girl stands in a quiet field at night and holds up the mark of {words_of(number)} with both hands."


def tag_caption(number: int) -> str:
    return f"1girl, {hint(number)}"


def picture(number: int, side: int = 48) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side + number % 5), (number % 256, 90, 255 - number % 256)).save(buffer, "PNG")
    return buffer.getvalue()


def image_row(number: int, data: bytes) -> dict[str, Any]:
    tags: dict[str, Any] = {
        f"tags_{category}": [] for category in ("artist", "character", "copyright", "general", "meta")
    }
    return {
        "id": f"danbooru:{number}", "source": "danbooru", "image": data, "format": "PNG", "width": 48, "height": 48,
        "sha256": f"{number:064x}", "phash": number, "rating": None, "score": None, "favourites": None,
        "created_at": None, "page": 0, "parent": None, "pixiv_id": None, **tags,
        "tags_general": ["1girl", hint(number).replace(" ", "_")],
    }  # fmt: skip


def write_images(root: Path, shards: dict[str, range], **special: bytes) -> Path:
    """`special` has pictures by "row<number>"."""
    for shard, numbers in shards.items():
        with Store(str(root)).writing_table(f"images/{shard}.parquet", IMAGES) as write:
            for group in (numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]):
                rows = [image_row(number, special.get(f"row{number}", picture(number))) for number in group]
                write(pa.Table.from_pylist(rows, IMAGES))
    return root


def captions(root: Path, folder: str = "captions") -> dict[str, dict[str, Any]]:
    """Rows of all shards by id. Asserts that each shard has the rows of its images in their order."""
    store, rows = Store(str(root)), {}
    for shard in store.shards("images"):
        table = store.read_table(f"{folder}/{shard}.parquet")
        assert table["id"].to_pylist() == store.read_table(f"images/{shard}.parquet", ["id"])["id"].to_pylist()
        rows |= {row["id"]: row for row in table.to_pylist()}
    return rows


def record(root: Path, folder: str = "captions") -> dict[str, Any]:
    return json.loads((root / folder / "run.json").read_text())


# --- A server ---------------------------------------------------------------------------------------------------------

# Answer to the n-th request (from 0) for a row: a status, a text, "silence", or None for the good caption.
Behaviour = Callable[[int, int], int | str | None]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()
        self.in_flight = 0
        self.reset()

    def reset(self, behaviour: Behaviour = lambda number, nth: None) -> None:
        """Behave like this from now on, and forget all requests."""
        self.behaviour = behaviour
        self.pause: Callable[[int], float] = lambda number: 0.0  # seconds before an answer
        self.asked: Counter[int] = Counter()  # requests by row
        self.bodies: list[dict[str, Any]] = []
        self.max_in_flight = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not report clients that hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": MODEL}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, number = self.server, self._number(body)
        with server.lock:
            nth = server.asked[number]
            server.asked[number] += 1
            server.bodies.append(body)
            server.in_flight += 1
            server.max_in_flight = max(server.max_in_flight, server.in_flight)
        try:
            time.sleep(server.pause(number))
            said = server.behaviour(number, nth)
            if said == "silence":
                time.sleep(1.5)
                self.close_connection = True
            elif isinstance(said, int):
                self._answer(said, {"error": {"message": "told to fail"}})
            else:
                self._answer(200, completion(good_caption(number) if said is None else said))
        finally:
            with server.lock:
                server.in_flight -= 1

    def _number(self, body: dict[str, Any]) -> int:
        hints = body["messages"][0]["content"][2]["text"]
        digits = re.search(r"mark of (\w+) (\w+) (\w+)", hints)
        assert digits, hints
        return int("".join(str(LETTERS.index(word)) for word in digits.groups()))

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def completion(text: str) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return {"choices": [choice], "usage": {"prompt_tokens": 300, "completion_tokens": 20}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def command(root: Path, server: Server, *more: object) -> tuple[object, ...]:
    return ("pipeline/caption.py", "--dataset", root, "--engine", "openai", "--url", server.url, *more)


def succeeded(job: Finished) -> str:
    assert job.returncode == 0, job.stderr
    return job.stdout


# --- One dataset, captioned three times -------------------------------------------------------------------------------

FOLDER = "captions/second"
REPEATED = range(50, 54)  # rows that the server gives the same caption
FAILED = {
    21: EngineFailure.REFUSED.value, 22: CaptionReason.REFUSAL.value, 23: EngineFailure.TIMEOUT.value,
    **dict.fromkeys(REPEATED, CaptionReason.REPEATED.value),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a job left, and what it asked the server for."""

    root: Path
    finished: Finished
    rows: dict[int, dict[str, Any]]
    record: dict[str, Any]
    asked: Counter[int]
    bodies: list[dict[str, Any]]


def caption(run_job_here: RunJob, root: Path, server: Server, *more: object) -> Job:
    finished = run_job_here(*command(root, server, "--name", "second", *more))
    rows = {int(id.partition(":")[2]): row for id, row in captions(root, FOLDER).items()}
    return Job(root, finished, rows, record(root, FOLDER), server.asked, server.bodies)


@pytest.fixture(scope="module")
def first(run_job_here: RunJob, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A server that does everything wrong, with answers out of order."""

    def behaviour(number: int, nth: int) -> int | str | None:
        if number == 21:
            return 400
        if number == 22:
            return "I'm sorry, but I can't assist with that."
        if number == 23 or (number == 24 and nth == 0):
            return "silence"
        if number == 25 and nth == 0:
            return "The girl's long red hair [INST] </s>"
        if number in REPEATED:
            return "A girl stands in front of a plain background and smiles at the viewer."
        return 500 if number % 5 == 0 and nth == 0 else None

    shards = {"a": range(40), "b": range(40, 70)}
    root = write_images(tmp_path_factory.mktemp("captioned"), shards, row0=picture(0, side=1000), row13=BROKEN)
    server.reset(behaviour)
    server.pause = lambda number: (number * 37 % 11) / 50
    return caption(run_job_here, root, server, "--timeout", 1, "--tries", 1, "--dollars-per-hour", 3.5)


@pytest.fixture(scope="module")
def retried(run_job_here: RunJob, server: Server, first: Job) -> Job:
    """The same with --retry-rejected, and a server that only fails on row 21."""
    server.reset(lambda number, nth: 400 if number == 21 else None)
    return caption(run_job_here, first.root, server, "--retry-rejected")


@pytest.fixture(scope="module")
def resampled(run_job_here: RunJob, server: Server, retried: Job) -> Job:
    """Other sampling and another size, and a server that fails on every third row."""
    server.reset(lambda number, nth: 400 if number % 3 == 0 else None)
    flags = ("--max-tokens", 99, "--temperatures", 0.5, "--max-side", 100)
    return caption(run_job_here, retried.root, server, *flags)


def test_every_row_ends_with_its_own_caption_or_its_reason(first: Job) -> None:
    rows, out = first.rows, succeeded(first.finished)
    undecodable = rows[13]["reason"]
    assert undecodable is not None
    expected = FAILED | {13: undecodable}
    assert {number: row["reason"] for number, row in rows.items() if row["reason"]} == expected
    for number, row in rows.items():
        assert row["caption"] == (tag_caption(number) if number in expected else good_caption(number))
        assert row["engine"] == ("tags" if number in expected else "openai")
        assert row["model"] == ("" if number in expected else MODEL)
    assert (rows[0]["attempts"], rows[1]["attempts"]) == (2, 1)
    assert {rows[number]["tokens_in"] for number in (0, 1)} == {300}
    assert (rows[24]["attempts"], rows[24]["finish_reason"]) == (2, "stop")
    assert (rows[25]["attempts"], rows[25]["tokens_out"]) == (2, 40)
    assert (rows[22]["attempts"], first.asked[22]) == (3, 3)
    assert (rows[13]["attempts"], first.asked[13]) == (0, 0)

    run = first.record
    assert (run["rows_in"], run["rows_out"]) == (70, 62)
    assert run["rejected"] == Counter(expected.values())
    costs = run["this_job"]
    assert (costs["rows_answered"], costs["engines_started"]) == (70, 1)
    assert costs["rejected"] == run["rejected"]
    assert costs["tokens_in"] == 300 * (70 - 3 + 2 + 1)  # without rows 13, 21, 23; row 22 three times, row 25 twice
    assert costs["dollars"] is not None
    assert "70 rows in = 62 out + 8 rejected" in out
    assert not (first.root / FOLDER / "partial").exists()
    assert not list((first.root / "captions").glob("*.parquet")), "--name keeps the other captions"
    assert {max(sent(body).size) for body in first.bodies} == {768, 48, 49, 50, 51, 52}


def sent(body: dict[str, Any]) -> Image.Image:
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_retry_asks_only_for_rows_that_the_model_failed_on_with_new_seeds(first: Job, retried: Job) -> None:
    succeeded(retried.finished)
    assert retried.asked == {number: 3 if number == 21 else 1 for number in FAILED}
    assert not {body["seed"] for body in first.bodies} & {body["seed"] for body in retried.bodies}
    before, after = first.rows, retried.rows
    assert {number for number in after if after[number] != before[number]} == set(FAILED)
    assert {number for number in FAILED if after[number]["reason"]} == {21}
    assert all(after[number]["caption"] == good_caption(number) for number in FAILED if number != 21)
    assert [after[number]["attempts"] for number in (21, 22, 50)] == [6, 4, 2]
    assert after[13] == before[13]


def test_a_further_run_asks_for_nothing(call_job: RunJob, server: Server, retried: Job, resampled: Job) -> None:
    server.reset()
    flags = ("--name", "second", "--max-tokens", 99, "--temperatures", 0.5, "--max-side", 100)
    assert "2 image shards, 2 already captioned" in succeeded(call_job(*command(retried.root, server, *flags)))
    assert not server.asked


def test_other_sampling_or_size_asks_for_all_rows(resampled: Job) -> None:
    assert resampled.asked == {number: 1 for number in range(70) if number != 13}
    assert {body["max_tokens"] for body in resampled.bodies} == {99}
    assert {max(sent(body).size) for body in resampled.bodies} == {100, 48, 49, 50, 51, 52}


def test_a_server_that_fails_on_a_third_of_the_rows_fails_the_job_and_finished_rows_are_kept(resampled: Job) -> None:
    assert resampled.finished.returncode == 1
    assert "failed: the engine failed on 24 of 70 rows, mostly: engine refused the request" in resampled.finished.stderr
    assert resampled.record["rows_out"] == 70 - 24 - 1
    assert all(
        row["caption"] == (tag_caption(number) if number % 3 == 0 or number == 13 else good_caption(number))
        for number, row in resampled.rows.items()
    )


# --- Other datasets ---------------------------------------------------------------------------------------------------


def test_a_killed_job_continues_with_its_unfinished_rows(
    run_job_here: RunJob, start_job: StartJob, server: Server, tmp_path: Path
) -> None:
    root = write_images(tmp_path, {"a": range(300), "b": range(300, 320)})
    server.reset()
    # The last rows of the first shard are answered only after the kill.
    killed = threading.Event()
    server.pause = lambda number: float(270 <= number < 300 and not killed.wait(60))
    job = start_job(*command(root, server, "--at-once", 16))
    partial = root / "captions" / "partial"

    def kept() -> set[str]:
        files = [str(path.relative_to(root)) for path in partial.glob("*/*.parquet")]
        return {id for name in files for id in Store(str(root)).read_table(name, ["id"])["id"].to_pylist()}

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (len(kept()) < 128 or server.max_in_flight < 16):
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    time.sleep(1)  # until Ray has ended the job's actor
    done = kept()
    assert 128 <= len(done) <= 300
    assert server.max_in_flight == 16
    killed.set()
    while server.in_flight:
        time.sleep(0.02)

    # A file with another provenance is removed.
    store = Store(str(partial / "a"))
    table = store.read_table(f"{store.shards()[0]}.parquet")
    store.write_table("captions-000000299-999.parquet", table, table.schema, made_from='{"images": "of long ago"}')

    server.reset()
    succeeded(run_job_here(*command(root, server)))
    assert server.asked == Counter(number for number in range(320) if f"danbooru:{number}" not in done)
    rows = captions(root)
    assert len(rows) == 320
    for number in range(320):
        assert rows[f"danbooru:{number}"] == {
            "id": f"danbooru:{number}", "caption": good_caption(number), "reason": None, "engine": "openai",
            "model": MODEL, "prompt_version": PROMPT_VERSION, "attempts": 1, "finish_reason": "stop",
            "tokens_in": 300, "tokens_out": 20, "notes": [],
        }  # fmt: skip
    assert not (root / "captions" / "partial").exists()
    assert record(root)["this_job"]["rows_kept"] == len(done)


def test_a_trial_shows_rows_of_the_whole_dataset_and_writes_only_its_page(
    call_job: RunJob, server: Server, tmp_path: Path
) -> None:
    root = write_images(tmp_path, {"a": range(60), "b": range(60, 80)}, row4=BROKEN)
    attack = "I'm sorry, <script>alert(1)</script> I can't help."
    server.reset(lambda number, nth: attack if number == 36 else None)
    before = {path for path in root.rglob("*") if path.is_file()}
    out = succeeded(call_job(*command(root, server, "--try", 10, "--engines", 2, "--dollars-per-hour", 0.5)))
    assert set(server.asked) == {12, 20, 28, 36, 44, 52, 60, 68, 76}
    assert {path for path in root.rglob("*") if path.is_file()} - before == {root / "caption-trial.html"}
    assert re.search(r"All 80 images with 2 engines: 0:0\d:\d\d, \$0\.0\d\.", out)

    page = (root / "caption-trial.html").read_text()
    assert page.count("<article>") == 10
    assert page.count('<img src="data:image/webp') == 9
    assert "<script" not in page
    assert "I&#39;m sorry, &lt;script&gt;" in page
    assert "default-src 'none'; img-src data:" in page
    for number in (12, 76):
        article = next(part for part in page.split("<article>") if f">danbooru:{number}<" in part)
        assert good_caption(number) in article
        assert hint(number) in article
    refused = next(part for part in page.split("<article>") if ">danbooru:36<" in part)
    assert f'<p class="refused">{CaptionReason.REFUSAL.value}</p>' in refused
    assert tag_caption(36) in refused


def test_captions_of_tags_do_not_replace_those_of_a_model(call_job: RunJob, tmp_path: Path) -> None:
    store = Store(str(write_images(tmp_path, {"a": range(3)})))
    table = pa.Table.from_pylist([], CAPTIONS)
    store.write_table("captions/a.parquet", table, CAPTIONS, made_from='{"engine": "vllm", "model": "pixtral"}')
    before = (tmp_path / "captions" / "a.parquet").read_bytes()
    refused = call_job("pipeline/caption.py", "--dataset", tmp_path)
    assert refused.returncode == 2
    assert "has captions of pixtral; give --name tags" in refused.stderr
    assert (tmp_path / "captions" / "a.parquet").read_bytes() == before


@pytest.fixture(scope="module")
def one_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("one"), {"a": range(1)})


def caption_by(model: str | None, root: Path) -> None:
    """What caption.py writes for all shards: captions of a model, or None: from tags."""
    catalog = Catalog(Store(str(root)))
    for part in image_shards(catalog, catalog.images()).values():
        caption_shard(part, str(root), "captions")
        if model:
            name = f"captions/{part.shard}.parquet"
            made_from = json.dumps({"engine": "vllm", "model": model})
            catalog.dataset.write_table(name, catalog.dataset.read_table(name), CAPTIONS, made_from=made_from)


@pytest.mark.parametrize(
    ("model", "code", "said"),
    [("a-pixtral", 2, "has captions of a-pixtral"), (None, 0, "1 image shards, 1 already captioned")],
)
def test_captions_of_a_job_that_ended_before_this_one_has_the_lease_are_kept(
    call_job: RunJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str | None, code: int, said: str
) -> None:
    root = write_images(tmp_path, {"a": range(2)})

    @contextmanager
    def late(*arguments: object) -> Iterator[None]:
        caption_by(model, root)
        yield

    monkeypatch.setattr(leases, "lease", late)
    job = call_job("pipeline/caption.py", "--dataset", root, "--engine", "tags")
    assert job.returncode == code, job.stderr
    assert said in job.stdout + job.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--engine", "tags", "--model", "x"), "--model needs a model, which --engine tags does not use"),
        (("--url", "http://127.0.0.1:1"), "give --engine openai"),
        (("--engine", "vllm"), "--model FOLDER"),
        (("--try", 3), "--try needs a model, and none can run: no model is given by --model or HDM_CAPTION_MODEL"),
        (("--retry-rejected",), "--retry-rejected needs a model"),
        (("--gpu-memory", 1.5), "--gpu-memory above 0 and at most 1"),
        (("--max-model-len", 2048), "too short for a picture of 768 pixels"),
        (("--engine", "openai"), "--url"),
        (("--engine", "openai", "--url", "http://127.0.0.1:1", "--tensor-parallel", 2), "--tensor-parallel"),
        (("--engine", "openai", "--url", "127.0.0.1"), "not the address of a server"),
        (("--engine", "openai", "--url", "http://127.0.0.1:1", "--tries", 1), "server unreachable"),
        (("--engine", "openai", "--url", "http://127.0.0.1:1", "--prompt", "none"), "--prompt: invalid choice: 'none'"),
        (("--engine", "openai", "--url", "http://127.0.0.1:1", "--temperatures", 0.1, 0.9), "lower temperature"),
        (("--name", "../x"), "letters, digits"),
        (("--name", "partial"), "partial"),
        (("--engines", 0), "above 0"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_refused_in_one_line(
    call_job: RunJob, one_image: Path, arguments: tuple[object, ...], said: str
) -> None:
    root = one_image
    job = call_job("pipeline/caption.py", "--dataset", root, *arguments)
    assert job.returncode == 2
    (line,) = job.stderr.splitlines()
    assert said in line
    assert not (root / "captions").exists()


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("config.json", "has neither config.json"),
        ("processor_config.json", "has no processor_config.json: download"),
        ("tokenizer.json", "has no tokenizer.json: download"),
        ("model.safetensors", "has no weights (*.safetensors): download"),
        ("nothing", "run: make captioner"),
    ],
)
@pytest.mark.parametrize("trial", [(), ("--try", 1)])
def test_a_model_folder_that_lacks_something_is_refused_before_anything_starts(
    call_job: RunJob,
    monkeypatch: pytest.MonkeyPatch,
    one_image: Path,
    tmp_path: Path,
    without: str,
    said: str,
    trial: tuple[object, ...],
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # vLLM cannot be what refuses
    python = None if without == "nothing" else Path("python of another environment")
    monkeypatch.setattr("pipeline.captions.engine_choice._other_python", lambda: python)
    config = {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"model_type": "pixtral"}}
    tokens = [{"id": number, "content": token} for number, token in enumerate(("<s>", "[INST]", "[/INST]", "[IMG]"))]
    files = {
        "config.json": config, "processor_config.json": {}, "tokenizer.json": {"added_tokens": tokens},
        "model.safetensors": {},
    }  # fmt: skip
    model = tmp_path / "model"
    model.mkdir()
    for name, content in files.items():
        if name != without:
            (model / name).write_text(json.dumps(content))
    job = call_job("pipeline/caption.py", "--dataset", one_image, "--engine", "vllm", "--model", model, *trial)
    assert job.returncode == 2
    (line,) = job.stderr.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("python", "said"), [(sys.executable, "does not have pixtral in its name"), (None, "run: make captioner")]
)
def test_a_model_that_vllm_cannot_run_here_is_refused_in_one_line(
    call_job: RunJob, monkeypatch: pytest.MonkeyPatch, one_image: Path, python: str | None, said: str
) -> None:
    monkeypatch.setattr(engine_choice, "_other_python", lambda: python and Path(python))
    job = call_job("pipeline/caption.py", "--dataset", one_image, "--engine", "vllm", "--model", "nothing/here")
    assert job.returncode == 2
    (line,) = job.stderr.splitlines()
    assert said in line
