"""The caption job with real vLLM on a tiny random Pixtral, which says nonsense: every row is accounted for.

.venv-captioner/bin/python -m pytest tests/pipeline/test_caption_vllm.py
"""

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from captioner.attempts import MODEL_FAILURES
from pipeline.records import IMAGES, TAG_CATEGORIES
from pipeline.shards import Store

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM has an environment of its own: make captioner", allow_module_level=True)

import psutil  # which vLLM brings along

ROOT = Path(__file__).parents[2]
ROWS = 20  # of each shard


def write_images(root: Path, shard: str, first: int) -> None:
    rows = []
    for number in range(first, first + ROWS):
        encoded = io.BytesIO()
        Image.new("RGB", (64, 64 + number), (number, 90, 255 - number)).save(encoded, "PNG")
        rows.append(
            {
                "id": f"danbooru:{number}", "source": "danbooru", "format": "PNG", "width": 64, "height": 64 + number,
                "image": b"no picture" if number == 3 else encoded.getvalue(), "sha256": "", "phash": number, "page": 0,
                **{f"tags_{category}": [] for category in TAG_CATEGORIES}, "tags_general": ["1girl", "red_star"],
            }
        )  # fmt: skip
    Store(str(root)).write_table(f"images/{shard}.parquet", pa.Table.from_pylist(rows, IMAGES), IMAGES)


def test_every_row_is_accounted_for(tiny_pixtral: Path, tmp_path: Path) -> None:
    for shard, first in (("a", 0), ("b", ROWS)):
        write_images(tmp_path, shard, first)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    job = subprocess.run(
        [
            *(sys.executable, "pipeline/caption.py", "--dataset", str(tmp_path), "--engine", "vllm"),
            *("--model", str(tiny_pixtral), "--max-side", "64", "--max-tokens", "8"),
        ],
        cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    rows = {}
    for shard in "ab":
        table = Store(str(tmp_path)).read_table(f"captions/{shard}.parquet")
        assert table["id"].to_pylist() == Store(str(tmp_path)).read_table(f"images/{shard}.parquet")["id"].to_pylist()
        rows |= {row["id"]: row for row in table.to_pylist()}
    assert len(rows) == 2 * ROWS
    broken = rows.pop("danbooru:3")
    assert broken["reason"] not in MODEL_FAILURES | {None}
    for row in rows.values():
        assert row["tokens_in"] > 0
        assert row["finish_reason"] in ("stop", "length", "repetition")
        # Eight tokens of nonsense are no caption, but for a wonder.
        assert row["reason"] in MODEL_FAILURES | {None}
        assert row["caption"] == "1girl, red star" or row["reason"] is None
        assert row["attempts"] == 3 or row["reason"] is None
    record = json.loads((tmp_path / "captions" / "run.json").read_text())
    assert record["rows_in"] == record["rows_out"] + sum(record["rejected"].values()) == 2 * ROWS
    assert record["model"].startswith("tiny-pixtral")
    assert record["this_job"]["engines_started"] == 1
    assert not [p for p in psutil.process_iter() if p.name().startswith("VLLM") and _is_ours(p)], "an engine lives on"


def _is_ours(process: psutil.Process) -> bool:
    try:
        return str(ROOT) in process.cwd()
    except psutil.Error:
        return False
