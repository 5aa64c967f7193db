"""The caption job with real vLLM and a tiny random Pixtral, which answers nonsense: every row is accounted for.

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
    pytest.skip("vLLM is installed in another environment: make captioner", allow_module_level=True)

import psutil  # installed with vLLM

ROOT = Path(__file__).parents[2]


def write_images(root: Path, shard: str, first: int, count: int) -> None:
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
    """Arguments for `subprocess` to run the job with its own Ray, in the dataset's folder."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {
        "args": [sys.executable, *map(str, (ROOT / "pipeline/caption.py", "--dataset", root, "--max-side", 64, *more))],
        "cwd": root, "env": environment | {"PYTHONPATH": str(ROOT), API_KEY_VARIABLE: "secret"}, "text": True,
    }  # fmt: skip


def captions(root: Path) -> dict[str, dict[str, Any]]:
    """Rows by id, without the broken picture's. Asserts what is true of each; nonsense is rarely accepted."""
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


def run_job(root: Path, *arguments: object) -> dict[str, Any]:
    """Run the job to its end and return its record, after checking that it accounts for all rows."""
    job = subprocess.run(**command(root, *arguments), capture_output=True, timeout=280, check=False)
    assert job.returncode == 0, job.stderr
    record = json.loads((root / "captions" / "run.json").read_text())
    assert record["rows_in"] == record["rows_out"] + sum(record["rejected"].values())
    return record


def test_a_killed_job_leaves_no_engine_and_a_second_one_finishes_all_rows(tiny_pixtral: Path, tmp_path: Path) -> None:
    write_images(tmp_path, "a", 0, 600)
    write_images(tmp_path, "b", 600, 20)
    arguments = ("--engine", "vllm", "--model", tiny_pixtral, "--max-tokens", 8)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    job = subprocess.Popen(**command(tmp_path, *arguments), **quiet)
    partial = tmp_path / "captions" / "partial"
    wait_for(lambda: any(partial.glob("*/*.parquet")) or job.poll() is not None, 240)
    assert engines_alive(tmp_path)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    wait_for(lambda: not engines_alive(tmp_path), 60)
    kept = set()
    for file in partial.glob("*/*.parquet"):
        kept |= set(Store(str(file.parent)).read_table(file.name, ["id"])["id"].to_pylist())
    assert 100 < len(kept) < 600
    finished = 20 if (tmp_path / "captions" / "b.parquet").exists() else 0

    record = run_job(tmp_path, *arguments)
    rows = captions(tmp_path)
    assert len(rows) == record["rows_in"] - 1 == 619
    assert all(row["attempts"] == 3 or row["reason"] is None for row in rows.values())
    assert record["model"].startswith("tiny-pixtral")
    assert record["this_job"]["engines_started"] == 1
    assert (record["this_job"]["rows_kept"], record["this_job"]["rows_answered"]) == (
        len(kept),
        620 - finished - len(kept),
    )
    wait_for(lambda: not engines_alive(tmp_path), 60)  # Ray Data kills its actors; the engine notices and ends


def test_a_running_vllm_server_captions_every_row(
    vllm_server: tuple[str, "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    url, server = vllm_server
    write_images(tmp_path, "a", 0, 20)
    wait_for(lambda: is_up(url) or server.poll() is not None, 240)
    record = run_job(tmp_path, "--engine", "openai", "--url", url, "--max-tokens", 8)
    rows = captions(tmp_path)
    assert len(rows) == record["rows_in"] - 1 == 19
    assert {(row["engine"], row["model"]) for row in rows.values() if row["reason"] is None} <= {("openai", "tiny")}
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


def engines_alive(root: Path) -> list[psutil.Process]:
    """vLLM's processes of jobs on this dataset. They work in the folder in which the job was started."""
    return [process for process in psutil.process_iter() if _is_engine_in(root, process)]


def _is_engine_in(root: Path, process: psutil.Process) -> bool:
    try:
        return process.name().startswith("VLLM") and process.cwd() == str(root)
    except psutil.Error:
        return False
