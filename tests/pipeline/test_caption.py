"""Captions by a model, through the real `--engine openai` and a server of this test's own: every row is accounted for,
each is bound to its own answer, and what is finished is never asked for again.

The server puts its caption together from the hints in the prompt, of which each picture has one of its own: `mark of
alpha bravo` is the hint of exactly one row.
"""

import base64
import io
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from captioner.engines import Failure
from captioner.requests import Reason
from pipeline.core.records import CAPTIONS, IMAGES
from pipeline.storage.shards import Store

Finished = subprocess.CompletedProcess[str]
RunJob = Callable[..., Finished]
StartJob = Callable[..., "subprocess.Popen[str]"]

MODEL = "fake-pixtral"
LETTERS = ("alpha", "bravo", "cedar", "delta", "ember", "frost", "grape", "hazel", "ivory", "jewel")
BROKEN = b"\xff\xd8\xff no longer a JPEG"


# --- A dataset, and what its captions must be -------------------------------------------------------------------------


def words_of(number: int) -> str:
    """0..999 in words, each number in its own."""
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
    """`special`: pictures by "row<number>"."""
    for shard, numbers in shards.items():
        with Store(str(root)).writing_table(f"images/{shard}.parquet", IMAGES) as write:
            for group in (numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]):
                rows = [image_row(number, special.get(f"row{number}", picture(number))) for number in group]
                write(pa.Table.from_pylist(rows, IMAGES))
    return root


def captions(root: Path, folder: str = "captions") -> dict[str, dict[str, Any]]:
    """Rows by id, of all shards, after checking that each shard has the rows of its images in their order."""
    store, rows = Store(str(root)), {}
    for shard in store.shards("images"):
        table = store.read_table(f"{folder}/{shard}.parquet")
        assert table["id"].to_pylist() == store.read_table(f"images/{shard}.parquet", ["id"])["id"].to_pylist()
        rows |= {row["id"]: row for row in table.to_pylist()}
    return rows


def record(root: Path, folder: str = "captions") -> dict[str, Any]:
    return json.loads((root / folder / "run.json").read_text())


# --- A server ---------------------------------------------------------------------------------------------------------

# What becomes of the n-th request (from 0) for a row: a status, a text to say, or "silence"; None: the good caption.
Behaviour = Callable[[int, int], int | str | None]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.behaviour: Behaviour = lambda number, nth: None
        self.pause: Callable[[int], float] = lambda number: 0.0  # seconds before an answer
        self.asked: Counter[int] = Counter()  # requests, by row
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is nothing to report."""


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
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.pause(number))
            said = server.behaviour(number, nth)
            if said == "silence":
                time.sleep(4)
                self.close_connection = True
            elif isinstance(said, int):
                self._answer(said, {"error": {"message": "told to fail"}})
            else:
                self._answer(200, completion(good_caption(number) if said is None else said))
        finally:
            with server.lock:
                server.at_once -= 1

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


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def command(root: Path, server: Server, *more: object) -> tuple[object, ...]:
    return ("pipeline/caption.py", "--dataset", root, "--engine", "openai", "--url", server.url, *more)


def succeeded(job: Finished) -> str:
    assert job.returncode == 0, job.stderr
    return job.stdout


# --- Facts ------------------------------------------------------------------------------------------------------------


def test_whatever_the_server_does_every_row_ends_with_its_own_caption_or_its_reason(
    run_job: RunJob, server: Server, tmp_path: Path
) -> None:
    root = write_images(tmp_path, {"a": range(40), "b": range(40, 70)}, row13=BROKEN)
    server.pause = lambda number: (number * 37 % 11) / 50  # answers come out of order

    def behaviour(number: int, nth: int) -> int | str | None:
        if number == 21:
            return 400  # for ever
        if number == 22:
            return "I'm sorry, but I can't assist with that."
        if number == 23:
            return "silence"  # for ever
        if number == 24 and nth == 0:
            return "silence"
        if number == 25 and nth == 0:
            return "The girl's long red hair [INST] </s>"
        if 50 <= number < 54:
            return "A girl stands in front of a plain background and smiles at the viewer."  # for four pictures
        return 500 if number % 5 == 0 and nth == 0 else None

    server.behaviour = behaviour
    out = succeeded(run_job(*command(root, server, "--timeout", 1, "--tries", 1, "--dollars-per-hour", 3.5)))
    rows = captions(root)

    expected = {
        13: "not decodable", 21: Failure.REFUSED.value, 22: Reason.REFUSAL.value, 23: Failure.TIMEOUT.value,
        **dict.fromkeys(range(50, 54), Reason.REPEATED.value),
    }  # fmt: skip
    reasons = {number: rows[f"danbooru:{number}"]["reason"] for number in range(70)}
    assert reasons[13] is not None
    assert {number: reason for number, reason in reasons.items() if reason} == expected | {13: reasons[13]}
    for number in range(70):
        row = rows[f"danbooru:{number}"]
        assert row["caption"] == (tag_caption(number) if number in expected else good_caption(number))
        assert row["engine"] == ("tags" if number in expected else "openai")
        assert row["model"] == ("" if number in expected else MODEL)
    assert (rows["danbooru:0"]["attempts"], rows["danbooru:1"]["attempts"]) == (2, 1)
    assert {rows[f"danbooru:{number}"]["tokens_in"] for number in (0, 1)} == {300}
    assert (rows["danbooru:24"]["attempts"], rows["danbooru:24"]["finish_reason"]) == (2, "stop")
    assert (rows["danbooru:25"]["attempts"], rows["danbooru:25"]["tokens_out"]) == (2, 40)
    assert (rows["danbooru:22"]["attempts"], server.asked[22]) == (3, 3)
    assert (rows["danbooru:13"]["attempts"], server.asked[13]) == (0, 0)

    run = record(root)
    assert (run["rows_in"], run["rows_out"]) == (70, 62)
    assert run["rejected"] == Counter(expected.values()) - Counter(["not decodable"]) + Counter([reasons[13]])
    costs = run["this_job"]
    assert (costs["rows_answered"], costs["engines_started"]) == (70, 1)
    assert costs["rejected"] == run["rejected"]
    assert costs["tokens_in"] == 300 * (70 - 3 + 2 + 1)  # less rows 13, 21, 23; row 22 thrice, row 25 twice
    assert costs["dollars"] is not None
    assert "70 rows in = 62 out + 8 rejected" in out
    assert not (root / "captions" / "partial").exists()


def test_a_second_run_asks_nothing_and_other_sampling_or_size_asks_for_all(
    run_job: RunJob, call_job: RunJob, server: Server, tmp_path: Path
) -> None:
    root = write_images(tmp_path, {"a": range(12)}, row0=picture(0, side=1000))
    succeeded(run_job(*command(root, server)))
    assert "1 of them captioned before" in succeeded(call_job(*command(root, server)))
    assert server.asked.total() == 12
    assert {max(sent(body).size) for body in server.bodies} == {768, 48, 49, 50, 51, 52}

    succeeded(run_job(*command(root, server, "--max-tokens", 99, "--max-side", 100)))
    assert server.asked.total() == 24
    assert {body["max_tokens"] for body in server.bodies[12:]} == {99}
    assert {max(sent(body).size) for body in server.bodies[12:]} == {100, 48, 49, 50, 51, 52}


def sent(body: dict[str, Any]) -> Image.Image:
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_killed_and_run_again_only_unfinished_rows_are_asked_for(
    run_job: RunJob, start_job: StartJob, server: Server, tmp_path: Path
) -> None:
    shards = {"a": range(600), "b": range(600, 700)}
    whole, killed = write_images(tmp_path / "whole", shards), write_images(tmp_path / "killed", shards)
    succeeded(run_job(*command(whole, server)))
    assert server.asked == Counter(range(700))

    server.asked.clear()
    # Rows of the second half of the first shard are answered only after the kill.
    blocked = threading.Event()
    server.pause = lambda number: float(300 <= number < 600 and not blocked.wait(60))
    job = start_job(*command(killed, server, "--at-once", 16))
    partial = killed / "captions" / "partial" / "a"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if list(partial.glob("*.parquet")) and (killed / "captions" / "b.parquet").exists():
            break
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    kept = set()
    for file in partial.glob("*.parquet"):
        kept |= set(Store(str(partial)).read_table(file.name, ["id"])["id"].to_pylist())
    assert len(kept) >= 256
    assert (killed / "captions" / "b.parquet").exists()
    blocked.set()
    time.sleep(1)  # what the killed job had asked for is answered into the void

    # A file of another prompt lies there too, and is removed.
    stray = partial / "stray.parquet"
    store = Store(str(partial))
    table = store.read_table(next(iter(partial.glob("*.parquet"))).name)
    store.write_table(stray.name, table, table.schema, made_from='{"images": "of long ago"}')

    server.asked.clear()
    succeeded(run_job(*command(killed, server)))
    assert server.asked == Counter(number for number in range(600) if f"danbooru:{number}" not in kept)
    assert captions(killed) == captions(whole)
    assert not (killed / "captions" / "partial").exists()
    assert record(killed)["this_job"]["rows_kept"] == len(kept)


def test_retry_asks_only_for_rows_that_the_model_failed_on_with_new_seeds(
    run_job: RunJob, server: Server, tmp_path: Path
) -> None:
    root = write_images(tmp_path, {"a": range(20), "b": range(20, 30)}, row5=BROKEN)
    server.behaviour = lambda number, nth: 400 if number in (3, 7) else None
    succeeded(run_job(*command(root, server, "--name", "second")))
    before = captions(root, "captions/second")
    seeds = {body["seed"] for body in server.bodies}
    server.asked.clear()
    server.bodies.clear()

    server.behaviour = lambda number, nth: 400 if number == 7 else None
    succeeded(run_job(*command(root, server, "--name", "second", "--retry-rejected")))
    assert server.asked == {3: 1, 7: 3}
    assert not seeds & {body["seed"] for body in server.bodies}
    after = captions(root, "captions/second")
    changed = {id for id in after if after[id] != before[id]}
    assert changed == {"danbooru:3", "danbooru:7"}
    assert (after["danbooru:3"]["caption"], after["danbooru:3"]["reason"]) == (good_caption(3), None)
    assert (after["danbooru:3"]["attempts"], after["danbooru:7"]["attempts"]) == (4, 6)
    assert after["danbooru:5"]["reason"] == before["danbooru:5"]["reason"]
    assert not list((root / "captions").glob("*.parquet")), "other captions lie beside these"


def test_a_trial_shows_rows_of_the_whole_dataset_and_writes_nothing_but_its_page(
    run_job: RunJob, server: Server, tmp_path: Path
) -> None:
    root = write_images(tmp_path, {"a": range(60), "b": range(60, 80)}, row4=BROKEN)
    attack = "I'm sorry, <script>alert(1)</script> I can't help."
    server.behaviour = lambda number, nth: attack if number == 36 else None
    before = {path for path in root.rglob("*") if path.is_file()}
    out = succeeded(run_job(*command(root, server, "--try", 10, "--engines", 2, "--dollars-per-hour", 0.5)))
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
    assert f'<p class="refused">{Reason.REFUSAL.value}</p>' in refused
    assert tag_caption(36) in refused


def test_tags_do_not_replace_what_a_model_was_paid_for(call_job: RunJob, tmp_path: Path) -> None:
    store = Store(str(write_images(tmp_path, {"a": range(3)})))
    table = pa.Table.from_pylist([], CAPTIONS)
    store.write_table("captions/a.parquet", table, CAPTIONS, made_from='{"engine": "vllm", "model": "pixtral"}')
    before = (tmp_path / "captions" / "a.parquet").read_bytes()
    refused = call_job("pipeline/caption.py", "--dataset", tmp_path)
    assert refused.returncode == 2
    assert "holds captions of pixtral; give --name tags" in refused.stderr
    assert (tmp_path / "captions" / "a.parquet").read_bytes() == before


def test_a_server_that_fails_on_many_rows_stops_the_job_and_what_is_finished_is_kept(
    run_job: RunJob, server: Server, tmp_path: Path
) -> None:
    root = write_images(tmp_path, {"a": range(1000), "b": range(200)})
    server.behaviour = lambda number, nth: 400 if number % 3 == 0 else None
    job = run_job(*command(root, server, "--temperatures", 0.5))
    assert job.returncode == 1, job.stderr
    assert re.search(
        r"failed: the engine failed on 201 of the last \d+ rows, mostly: engine refused the request; see", job.stderr
    )
    assert not (root / "captions" / "a.parquet").exists()
    kept = [Store(str(root)).rows(str(file.relative_to(root))) for file in (root / "captions").rglob("*.parquet")]
    assert sum(kept) >= 500


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--engine", "tags", "--model", "x"), "--engine vllm"),
        (("--engine", "vllm"), "--model FOLDER"),
        (("--engine", "openai"), "--url"),
        (("--engine", "openai", "--url", "http://127.0.0.1:1", "--tensor-parallel", 2), "--tensor-parallel"),
        (("--engine", "openai", "--url", "127.0.0.1"), "no address of a server"),
        (("--engine", "openai", "--url", "http://127.0.0.1:1", "--tries", 1), "server unreachable"),
        (("--engine", "vllm", "--model", "nothing/here"), "not called a Pixtral"),
        (("--engine", "openai", "--url", "http://127.0.0.1:1", "--prompt", "none"), "--prompt none"),
        (("--engine", "openai", "--url", "http://127.0.0.1:1", "--temperatures", 0.1, 0.9), "lower temperature"),
        (("--name", "../x"), "letters, digits"),
        (("--name", "partial"), "partial"),
        (("--engines", 0), "above 0"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_refused_in_one_line(
    call_job: RunJob, tmp_path: Path, arguments: tuple[object, ...], said: str
) -> None:
    root = write_images(tmp_path, {"a": range(1)})
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
    tmp_path: Path,
    without: str,
    said: str,
    trial: tuple[object, ...],
) -> None:
    """Where vLLM is not installed, so that it cannot be what refuses."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
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
    root = write_images(tmp_path, {"a": range(1)})
    job = call_job("pipeline/caption.py", "--dataset", root, "--engine", "vllm", "--model", model, *trial)
    assert job.returncode == 2
    (line,) = job.stderr.splitlines()
    assert said in line
