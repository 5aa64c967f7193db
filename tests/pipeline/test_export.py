"""A selection exported for other trainers has every picture as delivered, with its text, once."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core.records import IMAGES, SELECTION, TAG_CATEGORIES, TEXT_CATEGORIES
from pipeline.exports.shards import ExportShard, export_shard, text_of
from pipeline.storage.shards import Store
from trainer.samples.data import text_parts
from trainer.samples.training_text import full_text

RunJob = Callable[..., Any]
NUMBERS = {"a": (1, 2, 3, 4, 5), "b": (7, 8)}
SELECTED = {"a": (1, 2, 4), "b": (8,)}


def picture(number: int) -> bytes:
    file = io.BytesIO()
    noise_HW3 = np.random.default_rng(number).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(noise_HW3).save(file, "PNG" if number % 2 else "JPEG")
    return file.getvalue()


def image_row(number: int) -> dict[str, Any]:
    return {
        "id": f"danbooru:{number}", "source": "danbooru", "image": picture(number),
        "format": "PNG" if number % 2 else "JPEG", "width": 50, "height": 40, "sha256": f"{number:064x}",
        "phash": number, "page": 0, **{f"tags_{category}": [] for category in TAG_CATEGORIES},
    }  # fmt: skip


def selected_row(shard: str, number: int) -> dict[str, Any]:
    empty: dict[str, list[str]] = {category: [] for category in TEXT_CATEGORIES}
    return empty | {
        "id": f"danbooru:{number}", "row": NUMBERS[shard].index(number), "special": ["1girl"], "general": ["long hair"],
        "artist": ["some one"], "meta": ["highres"], "caption": f"Number {number} in snow." if number != 2 else None,
        "quality": "best quality", "era": None, "rating": "safe",
    }  # fmt: skip


@pytest.fixture
def dataset(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "dataset"))
    for shard, numbers in NUMBERS.items():
        with store.writing_table(f"images/{shard}.parquet", IMAGES) as write:
            for number in numbers:  # a row group each
                write(pa.Table.from_pylist([image_row(number)], IMAGES))
        rows = [selected_row(shard, number) for number in SELECTED[shard]]
        store.write_table(f"selections/mine/{shard}.parquet", pa.Table.from_pylist(rows, SELECTION), SELECTION)
    record = {"hash": "0", "shards": {shard: len(numbers) for shard, numbers in SELECTED.items()}}
    store.write("selections/mine/selection.json", json.dumps(record).encode())
    return store


def exported(dataset: Store, out: Path, to: Any, text: Any = "full") -> Path:
    for shard, numbers in SELECTED.items():
        export_shard(ExportShard(dataset.root, "mine", shard, len(numbers)), out, to, text)
    assert not list(out.rglob("*.partial"))
    return out


def test_the_full_text_is_the_trainers() -> None:
    for number in (1, 2):
        row = selected_row("a", number)
        assert text_of(row, "full") == full_text(text_parts(row))
    row = selected_row("a", 1)
    assert text_of(row, "tags") == "1girl, some one, long hair, best quality, safe, highres"
    assert text_of(row, "caption") == "Number 1 in snow."
    assert text_of(selected_row("a", 2), "caption") == ""


def test_a_tar_has_picture_text_and_json_of_each_row_in_a_run(dataset: Store, tmp_path: Path) -> None:
    exported(dataset, tmp_path / "out", "webdataset")
    with tarfile.open(tmp_path / "out" / "a.tar") as tar:
        names = tar.getnames()
        content = {name: tar.extractfile(name).read() for name in names}  # type: ignore[union-attr]
    keys = [f"danbooru_{number}" for number in SELECTED["a"]]
    assert [name.partition(".")[0] for name in names] == [key for key in keys for _ in range(3)]
    assert content["danbooru_1.png"] == picture(1)
    assert content["danbooru_2.jpg"] == picture(2)
    assert content["danbooru_1.txt"].decode().endswith("Number 1 in snow, best quality, safe, highres")
    about = json.loads(content["danbooru_4.json"])
    assert (about["id"], about["general"], about["width"], about["height"]) == ("danbooru:4", ["long hair"], 50, 40)


def test_a_folder_has_a_text_file_beside_each_picture(dataset: Store, tmp_path: Path) -> None:
    exported(dataset, tmp_path / "out", "kohya", "tags")
    files = sorted(path.name for path in (tmp_path / "out" / "a").iterdir())
    assert files == [
        "danbooru_1.png",
        "danbooru_1.txt",
        "danbooru_2.jpg",
        "danbooru_2.txt",
        "danbooru_4.jpg",
        "danbooru_4.txt",
    ]
    assert (tmp_path / "out" / "b" / "danbooru_8.jpg").read_bytes() == picture(8)


def test_a_parquet_file_has_pictures_that_other_libraries_recognise(dataset: Store, tmp_path: Path) -> None:
    exported(dataset, tmp_path / "out", "hf")
    table = pq.read_table(tmp_path / "out" / "data" / "a.parquet")
    assert [row["bytes"] for row in table["image"].to_pylist()] == [picture(number) for number in SELECTED["a"]]
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}


def test_a_finished_shard_is_kept_and_a_cut_one_is_made_again(dataset: Store, tmp_path: Path) -> None:
    out = exported(dataset, tmp_path / "out", "kohya")
    (out / "a" / "danbooru_1.txt").write_text("edited")
    cut = out / ".b.partial"
    (out / "b").rename(cut)
    (cut / "danbooru_8.jpg").unlink()
    exported(dataset, out, "kohya")
    assert (out / "a" / "danbooru_1.txt").read_text() == "edited"
    assert (out / "b" / "danbooru_8.jpg").read_bytes() == picture(8)


def test_pictures_ingested_again_since_the_selection_are_refused(dataset: Store, tmp_path: Path) -> None:
    with dataset.writing_table("images/b.parquet", IMAGES) as write:
        write(pa.Table.from_pylist([image_row(9), image_row(7)], IMAGES))
    with pytest.raises(ValueError, match="ingested again since the selection"):
        exported(dataset, tmp_path / "out", "hf")


def test_the_job_exports_all_shards_once_and_refuses_another_selection(
    dataset: Store, tmp_path: Path, call_job_with_ray: RunJob
) -> None:
    out = tmp_path / "out"
    arguments = ["pipeline/export.py", "--dataset", dataset.root, "--name", "mine", "--out", str(out)]
    done = call_job_with_ray(*arguments, "--to", "webdataset")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.glob("*.tar")) == ["a.tar", "b.tar"]
    assert json.loads((out / "run.json").read_bytes())["rows_out"] == 4
    again = call_job_with_ray(*arguments, "--to", "webdataset")
    assert "2 shards, 0 to do" in again.stdout
    other = call_job_with_ray(*arguments, "--to", "hf")
    assert (other.returncode, "give another --out" in other.stderr) == (2, True)
    missing = call_job_with_ray(*arguments[:3], "--name", "none", "--out", str(out), "--to", "hf")
    assert missing.returncode == 2
    assert "run: python pipeline/curate.py --name none" in missing.stderr
