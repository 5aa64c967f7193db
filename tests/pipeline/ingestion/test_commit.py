"""A commit reads the images from the raw file again: they must be those that were checked."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core.tables import labelled
from pipeline.ingestion.commit import commit_shard, partial_shard, write_rows
from pipeline.ingestion.preflight import plan_shards
from pipeline.ingestion.raw_rows import RawFileChanged, all_rows, read_images, read_raw
from pipeline.ingestion.rules import IngestRules, RawShard
from pipeline.ingestion.validation import check_rows
from pipeline.storage.shards import Store

RULES = IngestRules()


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (60, 60, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_raw(path: Path, pictures: list[bytes | None], image_type: pa.DataType) -> str:
    wrapped = [{"bytes": picture, "path": None} for picture in pictures] if pa.types.is_struct(image_type) else pictures
    columns = {
        "id": pa.array(range(len(pictures)), pa.int64()),
        "image": pa.array(wrapped, image_type),
        "tag_string_general": ["a"] * len(pictures),
        "rating": ["g"] * len(pictures),
    }
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return str(path)


def checked(path: str, dataset: Store) -> RawShard:
    """The only shard of the file, with partial files of all its rows."""
    (raw,) = plan_shards([path], "auto", None, dataset, RULES).shards.values()
    for table in read_raw(raw, all_rows(raw), RULES):
        for rows in check_rows(labelled(table, raw.shard), RULES):
            list(write_rows(rows, dataset.root))
    return raw


@pytest.mark.parametrize(
    "image_type",
    [
        pa.binary(),
        pa.large_binary(),
        pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())]),
        pa.struct([pa.field("path", pa.string()), pa.field("bytes", pa.large_binary())]),
    ],
    ids=str,
)
def test_each_row_keeps_its_own_image_past_rejected_and_repeated_rows(tmp_path: Path, image_type: pa.DataType) -> None:
    pictures = [png(number) for number in range(11)]
    given = [*pictures[:4], b"not an image", None, *pictures[4:]]
    dataset = Store(str(tmp_path / "dataset"))
    raw = checked(write_raw(tmp_path / "raw.parquet", given, image_type), dataset)
    assert not any(
        "image" in pq.read_schema(file).names
        for file in Path(partial_shard(raw, dataset.root, RULES).store.path("images/partial")).rglob("*.parquet")
    )
    commit_shard(raw, dataset.root, RULES)
    rows = dataset.read_table(f"images/{raw.shard}.parquet").to_pylist()
    assert [row["image"] for row in rows] == pictures
    assert all(hashlib.sha256(row["image"]).hexdigest() == row["sha256"] for row in rows)
    assert [row["id"] for row in rows] == [f"danbooru:{number}" for number in (0, 1, 2, 3, *range(6, 13))]


def test_a_raw_file_that_was_written_again_after_its_check_is_not_committed(tmp_path: Path) -> None:
    dataset = Store(str(tmp_path / "dataset"))
    path = write_raw(tmp_path / "raw.parquet", [png(0), png(1)], pa.binary())
    raw = checked(path, dataset)
    os.utime(path, (1, 1))
    with pytest.raises(RawFileChanged, match="run the same command again"):
        commit_shard(raw, dataset.root, RULES)
    assert not dataset.shards("images")
    assert partial_shard(raw, dataset.root, RULES).rows("checked").tolist() == [0, 1], "nothing is lost"


def test_images_are_read_for_the_wanted_rows_only(tmp_path: Path) -> None:
    pictures = [png(number) for number in range(8)]
    path = write_raw(tmp_path / "raw.parquet", pictures, pa.binary())
    (raw,) = plan_shards([path], "auto", None, Store(str(tmp_path / "dataset")), RULES).shards.values()
    wanted = np.array([1, 2, 5, 7], np.int32)
    found = [image for images in read_images(raw, wanted, RULES) for image in images.to_pylist()]
    assert found == [pictures[number] for number in wanted]
