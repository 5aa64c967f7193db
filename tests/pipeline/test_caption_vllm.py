"""The caption job with real vLLM on a tiny random Pixtral, which says nonsense: every row is accounted for.

.venv-captioner/bin/python -m pytest tests/pipeline/test_caption_vllm.py
"""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from captioner.captioning import MODEL_FAILURES
from captioner.engines import API_KEY_VARIABLE
from pipeline.core.records import IMAGES, TAG_CATEGORIES
from pipeline.storage.shards import Store

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM has an environment of its own: make captioner", allow_module_level=True)

import psutil  # which vLLM brings along

ROOT = Path(__file__).parents[2]
ROWS = 20  # of each shard


def write_images(root: Path, shard: str, first: int, count: int = ROWS) -> None:
    rows = []
    for number in range(first, first + count):
        encoded = io.BytesIO()
        Image.new("RGB", (64, 64 + number % 64), (number % 256, 90, 255 - number % 256)).save(encoded, "PNG")
        rows.append(
            {
                "id": f"danbooru:{number}", "source": "danbooru", "format": "PNG", "width": 64,
                "height": 64 + number % 64,
                "image": b"no picture" if number == 3 else encoded.getvalue(), "sha256": "", "phash": number, "page": 0,
                **{f"tags_{category}": [] for category in TAG_CATEGORIES}, "tags_general": ["1girl", "red_star"],
            }
        )  # fmt: skip
    Store(str(root)).write_table(f"images/{shard}.parquet", pa.Table.from_pylist(rows, IMAGES), IMAGES)


def command(root: Path, *more: object) -> dict[str, Any]:
    """What `subprocess` needs to run the job, which starts a Ray of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {
        "args": [sys.executable, "pipeline/caption.py", "--dataset", str(root), "--max-side", "64", *map(str, more)],
        "cwd": ROOT, "env": environment | {"PYTHONPATH": str(ROOT), API_KEY_VARIABLE: "secret"}, "text": True,
    }  # fmt: skip


def captions(root: Path) -> dict[str, dict[str, Any]]:
    """Rows by id, after a look at what must be true of each: nonsense is no caption, but for a wonder."""
    rows: dict[str, dict[str, Any]] = {}
    for shard in Store(str(root)).shards("images"):
        table = Store(str(root)).read_table(f"captions/{shard}.parquet")
        images = Store(str(root)).read_table(f"images/{shard}.parquet", ["id"])
        assert table["id"].to_pylist() == images["id"].to_pylist()
        rows |= {row["id"]: row for row in table.to_pylist()}
    broken = rows.pop("danbooru:3")
    assert broken["reason"] not in MODEL_FAILURES | {None}
    for row in rows.values():
        assert row["tokens_in"] > 0
        assert row["finish_reason"] in ("stop", "length", "repetition")
        assert row["reason"] in MODEL_FAILURES | {None}
        assert row["caption"] == "1girl, red star" or row["reason"] is None
    return rows


def test_every_row_is_accounted_for(tiny_pixtral: Path, tmp_path: Path) -> None:
    for shard, first in (("a", 0), ("b", ROWS)):
        write_images(tmp_path, shard, first)
    asked = ("--engine", "vllm", "--model", tiny_pixtral, "--max-tokens", 8)
    job = subprocess.run(**command(tmp_path, *asked), capture_output=True, timeout=280, check=False)
    assert job.returncode == 0, job.stderr
    rows = captions(tmp_path)
    assert len(rows) == 2 * ROWS - 1
    assert all(row["attempts"] == 3 or row["reason"] is None for row in rows.values())
    record = json.loads((tmp_path / "captions" / "run.json").read_text())
    assert record["rows_in"] == record["rows_out"] + sum(record["rejected"].values()) == 2 * ROWS
    assert record["model"].startswith("tiny-pixtral")
    assert record["this_job"]["engines_started"] == 1
    assert not engines_alive(), "an engine lives on"


def test_killed_it_leaves_no_engine_and_goes_on_where_it_was(tiny_pixtral: Path, tmp_path: Path) -> None:
    write_images(tmp_path, "a", 0, 1000)
    asked = ("--engine", "vllm", "--model", tiny_pixtral, "--max-tokens", 64, "--temperatures", 0.5)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    job = subprocess.Popen(**command(tmp_path, *asked), **quiet)
    partial = tmp_path / "captions" / "partial" / "a"
    wait_for(lambda: any(partial.glob("*.parquet")) or job.poll() is not None, 240)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    wait_for(lambda: not engines_alive(), 60)
    kept = {}
    for file in partial.glob("*.parquet"):
        kept |= {row["id"]: row for row in Store(str(partial)).read_table(file.name).to_pylist()}
    assert 256 <= len(kept) < 1000
    again = subprocess.run(**command(tmp_path, *asked), capture_output=True, timeout=280, check=False)
    assert again.returncode == 0, again.stderr
    rows = captions(tmp_path)
    assert len(rows) == 999
    record = json.loads((tmp_path / "captions" / "run.json").read_text())
    assert (record["this_job"]["rows_kept"], record["this_job"]["rows_answered"]) == (len(kept), 1000 - len(kept))


def test_a_running_server_of_vllm_captions_every_row(
    vllm_server: tuple[str, "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    url, server = vllm_server
    for shard, first in (("a", 0), ("b", ROWS)):
        write_images(tmp_path, shard, first)
    wait_for(lambda: is_up(url) or server.poll() is not None, 240)
    asked = ("--engine", "openai", "--url", url, "--max-tokens", 8)
    job = subprocess.run(**command(tmp_path, *asked), capture_output=True, timeout=280, check=False)
    assert job.returncode == 0, job.stderr
    rows = captions(tmp_path)
    assert len(rows) == 2 * ROWS - 1
    assert {(row["engine"], row["model"]) for row in rows.values() if row["reason"] is None} <= {("openai", "tiny")}
    record = json.loads((tmp_path / "captions" / "run.json").read_text())
    assert record["rows_in"] == record["rows_out"] + sum(record["rejected"].values()) == 2 * ROWS
    assert record["this_job"]["tokens_in"] > 0


def is_up(url: str) -> bool:
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": "Bearer secret"})
    try:
        with urllib.request.urlopen(request, timeout=5):
            return True
    except OSError:
        return False


def wait_for(is_true: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.05)


def engines_alive() -> list[psutil.Process]:
    """vLLM's processes that were started here, but those of the server."""
    return [p for p in psutil.process_iter() if _name(p).startswith("VLLM") and _is_ours(p) and not _is_served(p)]


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _is_served(process: psutil.Process) -> bool:
    try:
        return any("api_server" in " ".join(parent.cmdline()) for parent in process.parents())
    except psutil.Error:
        return False


def _is_ours(process: psutil.Process) -> bool:
    try:
        return str(ROOT) in process.cwd()
    except psutil.Error:
        return False
