"""Files appear whole or not at all, on local disk and on S3."""

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import S3Refused
from pipeline.storage.shards import Store, list_files

SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("image", pa.binary())])
ROWS = pa.Table.from_pylist([{"id": "a", "image": b"1"}, {"id": "b", "image": b"2"}], SCHEMA)


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "with a space") if request.param == "local" else f"{request.getfixturevalue('bucket')}/one"


def test_a_table_is_read_back_unchanged(root: str) -> None:
    store = Store(root)
    store.write_table("images/one.parquet", ROWS, SCHEMA, raw="where from")
    assert store.read_table("images/one.parquet").equals(ROWS)
    assert store.rows("images/one.parquet") == 2
    assert store.metadata("images/one.parquet") == {"raw": "where from"}
    assert store.shards("images") == ["one"]
    assert store.folders("") == ["images"]
    assert store.folders("images") == store.folders("nowhere") == []
    assert store.tally("images/one.parquet", "id") == {"a": 1, "b": 1}
    assert list(list_files(root)) == [store.path("images/one.parquet")]


def test_a_listing_has_the_files_below_a_folder_but_not_of_a_folder_with_the_same_prefix(root: str) -> None:
    store = Store(f"{root}/sizes")
    for name, size in (("run/a/one.bin", 3), ("run/empty", 0), ("run-2/other", 5)):
        store.write(name, bytes(size))
    assert store.sizes("run") == {"a/one.bin": 3, "empty": 0}
    assert store.sizes() == {"run/a/one.bin": 3, "run/empty": 0, "run-2/other": 5}
    assert store.sizes("nowhere") == {}
    listed = store.listing("run")["a/one.bin"]
    assert listed.stamp == store.stamp("run/a/one.bin")
    assert abs(listed.modified - time.time()) < 60


def test_a_local_copy_has_the_content_of_the_file(root: str) -> None:
    store = Store(f"{root}/copied")
    store.write("one.bin", b"0123456789")
    with store.local_copy("one.bin") as path:
        assert Path(path).read_bytes() == b"0123456789"
    assert Path(path).exists() is not store.is_remote


def test_only_unfinished_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / ".one.parquet.0123abcd").touch()
    (tmp_path / "images" / ".other.parquet.0123abcd").touch()
    with store.writing_table("images/one.parquet", SCHEMA) as write:
        store.remove_partial("images", ["one"])
        write(ROWS)
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"one.parquet", ".other.parquet.0123abcd"}


def test_parquet_is_found_in_a_folder_named_like_a_file(tmp_path: Path) -> None:
    Store(str(tmp_path)).write_table("all.parquet/part-0.parquet", ROWS, SCHEMA)
    assert list(list_files(str(tmp_path / "all.parquet"))) == [str(tmp_path / "all.parquet" / "part-0.parquet")]


def test_other_url_schemes_are_refused() -> None:
    with pytest.raises(S3Refused, match="gs://bucket/x is neither a local path nor s3://"):
        Store("gs://bucket/x")


def test_an_interrupted_write_leaves_no_file(root: str) -> None:
    store = Store(root)

    def interrupted() -> None:
        with store.writing_table("broken/two.parquet", SCHEMA) as write:
            write(ROWS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert store.shards("broken") == []
    assert not store.exists("broken/two.parquet")


def test_an_interrupted_rewrite_keeps_the_old_file(root: str) -> None:
    store = Store(root)
    store.write("record.json", b"old")

    def interrupted() -> None:
        with store.committed("record.json") as path:
            Path(path).write_bytes(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert store.read("record.json") == b"old"


def test_removing_a_file_twice_is_no_error(root: str) -> None:
    store = Store(root)
    store.write("gone.json", b"{}")
    store.remove("gone.json")
    store.remove("gone.json")
    assert not store.exists("gone.json")


def test_images_are_not_compressed_again(tmp_path: Path) -> None:
    Store(str(tmp_path)).write_table("one.parquet", ROWS, SCHEMA)
    group = pq.read_metadata(tmp_path / "one.parquet").row_group(0)
    assert group.column(0).compression == "ZSTD"
    assert group.column(1).compression == "UNCOMPRESSED"


def test_a_missing_folder_has_no_shards(tmp_path: Path) -> None:
    assert Store(str(tmp_path)).shards("images") == []
    assert list_files(str(tmp_path / "nowhere")) == {}
