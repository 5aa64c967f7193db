"""The ingest pipeline on Ray: a picture that kills its process costs one row, and nobody tries it again."""

import ctypes
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle

from pipeline.core.tables import DIED
from pipeline.ingestion import steps
from pipeline.ingestion.commit import ingest_shard
from pipeline.ingestion.preflight import plan_shards
from pipeline.ingestion.rules import IngestRules
from pipeline.ingestion.validation import check_rows
from pipeline.storage.shards import Store

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import a test module

RULES = IngestRules(downsize=48)


def png(seed: int) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 60, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_raw(path: Path, first: int) -> str:
    path.parent.mkdir(exist_ok=True)
    posts = [{"id": id, "image": png(id), "tag_string_general": "a", "rating": "g"} for id in range(first, first + 20)]
    posts[7] = posts[3]  # a repeated post
    pq.write_table(pa.Table.from_pylist(posts), path, row_group_size=6)
    return str(path)


def faulty_decoder(table: pa.Table, poison: bytes, **options: Any) -> Iterator[pa.Table]:
    """check_rows with a decoder that reads from address 0 when it meets one picture: a real segmentation fault."""
    for row in table.select(["image", DIED]).to_pylist():
        if row["image"] == poison and not row[DIED]:
            ctypes.string_at(0)
    yield from check_rows(table, **options)


def test_a_picture_that_kills_its_process_is_rejected_alone_and_not_tried_again(
    ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write_raw(tmp_path / "raw" / f"{name}.parquet", first) for name, first in (("a", 0), ("b", 100))]
    there, expected = Store(str(tmp_path / "there")), Store(str(tmp_path / "expected"))
    plan = plan_shards(files, "auto", None, there, RULES)
    monkeypatch.setattr(steps, "check_rows", partial(faulty_decoder, poison=png(112)))
    assert steps.ingest_shards({name: plan.shards[name] for name in plan.todo}, there, RULES) == {}
    for raw in plan.shards.values():
        ingest_shard(raw, expected.root, RULES)
    first, second = sorted(plan.shards)
    for folder in ("images", "rejected", "images-48"):
        assert there.read_table(f"{folder}/{first}.parquet") == expected.read_table(f"{folder}/{first}.parquet")
        undisturbed = expected.read_table(f"{folder}/{second}.parquet")
        key = "key" if folder == "rejected" else "id"
        rows = {row[key]: row for row in there.read_table(f"{folder}/{second}.parquet").to_pylist()}
        died = rows.pop("danbooru:112", {})
        assert rows == {row[key]: row for row in undisturbed.to_pylist() if row[key] != "danbooru:112"}
        assert died.get("reason") == ("decoder died" if folder == "rejected" else None)
    assert there.folders("images/partial") == [], "partial files are removed"
    again = plan_shards(files, "auto", None, there, RULES)
    assert (again.todo, again.tiers) == ({}, {})
