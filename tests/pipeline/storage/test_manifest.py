"""Manifests: a job opens only the files that are new or changed, and a bad manifest changes no result."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import JobFailed, UsageError
from pipeline.storage.fingerprints import digest
from pipeline.storage.manifest import NAME, Catalog, read_footer
from pipeline.storage.shards import Store

SCHEMA = pa.schema(
    [pa.field("source", pa.string()), pa.field("reason", pa.string())], metadata={"hdm.format": "rejected"}
)
SHARDS = ("a", "b", "c")


def write(store: Store, shard: str, *reasons: str | None) -> None:
    rows = pa.Table.from_pylist([{"source": "pixiv", "reason": reason} for reason in reasons], SCHEMA)
    store.write_table(f"images/{shard}.parquet", rows, SCHEMA, made_from=json.dumps({"raw": f"of {shard}"}))


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    place = tmp_path if request.param == "local" else f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    store = Store(f"{place}/manifest")
    for number, shard in enumerate(SHARDS):
        write(store, shard, *["video"] * number, None)
    return store


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the parquet files that are read."""
    found: set[str] = set()

    def recorded(really: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: Store, name: str = "", *rest: Any) -> Any:
            path = self.path(name)
            if path.endswith(".parquet"):
                found.add(path.rpartition("/")[2])
            return really(self, name, *rest)

        return read

    for method in ("open", "tail"):
        monkeypatch.setattr(Store, method, recorded(getattr(Store, method)))
    return found


def facts(store: Store) -> dict[str, tuple[int, str, dict[str, str], dict[str, int]]]:
    """What a job learns about each shard. Writes the manifest."""
    catalog = Catalog(store)
    footers, reasons = catalog.images(), catalog.reasons("images", catalog.shards("images"))
    catalog.save()
    return {
        name: (footer.rows, footer.digest, footer.provenance, dict(reasons[name])) for name, footer in footers.items()
    }


def test_a_second_job_opens_no_shard_and_learns_the_same(store: Store, opened: set[str]) -> None:
    first = facts(store)
    assert {name: (rows, made, reasons) for name, (rows, _, made, reasons) in first.items()} == {
        "a": (1, {"raw": "of a"}, {}),
        "b": (2, {"raw": "of b"}, {"video": 1}),
        "c": (3, {"raw": "of c"}, {"video": 2}),
    }
    assert opened == {f"{shard}.parquet" for shard in SHARDS}
    opened.clear()
    assert facts(store) == first
    assert opened == set()
    assert store.shards("images") == list(SHARDS), "the manifest is no shard"


def test_an_unchanged_folder_costs_a_listing_and_the_manifest(bucket: str, s3_server: Any, tmp_path: Path) -> None:
    store = Store(f"{bucket}/{tmp_path.name}")
    for shard in SHARDS:
        write(store, shard, "video")
    with s3_server.counting() as requests:
        facts(store)
    footer = next(request for request in requests if "/images/a.parquet" in request.target)
    assert footer.headers["Range"] == f"bytes=-{64 << 10}"
    assert [request.method for request in requests].count("PUT") == 1
    with s3_server.counting() as requests:
        facts(store)
    assert [request.method for request in requests] == ["GET", "GET"]
    assert "list-type" in requests[0].target
    assert requests[1].target.endswith(f"/images/{NAME}")


def test_changed_new_and_removed_shards_are_noticed(store: Store, opened: set[str]) -> None:
    facts(store)
    write(store, "b", "deleted", "deleted", "deleted")
    write(store, "d")
    store.remove("images/c.parquet")
    opened.clear()
    found = facts(store)
    assert opened == {"b.parquet", "d.parquet"}
    assert {name: (rows, reasons) for name, (rows, _, _, reasons) in found.items()} == {
        "a": (1, {}),
        "b": (3, {"deleted": 3}),
        "d": (0, {}),
    }
    store.remove(f"images/{NAME}")
    assert facts(store) == found


def of_another_version(data: bytes) -> bytes:
    return gzip.compress(json.dumps(json.loads(gzip.decompress(data)) | {"format": 0}).encode())


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-20] + bytes(12) + data[-8:],
        lambda data: b"<html>404</html>",
        lambda data: gzip.compress(b"[1, 2]"),
        lambda data: gzip.compress(b'{"format": 1, "schemas": [], "files": {"a.parquet": [1]}}'),
        of_another_version,
    ],
    ids=["empty", "cut", "zeros", "text", "list", "entry", "version"],
)
def test_a_damaged_manifest_changes_nothing(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    store = Store(str(tmp_path))
    for shard in SHARDS:
        write(store, shard, "video")
    found = facts(store)
    whole = store.read(f"images/{NAME}")
    store.write(f"images/{NAME}", damage(whole))
    assert facts(store) == found
    assert store.read(f"images/{NAME}") == whole, "written again"


def test_the_manifest_of_another_dataset_changes_nothing(tmp_path: Path) -> None:
    store, other = Store(str(tmp_path / "a")), Store(str(tmp_path / "b"))
    write(store, "a", "video")
    write(other, "a", "deleted", "deleted")
    facts(store)
    found = facts(other)
    other.write(f"images/{NAME}", store.read(f"images/{NAME}"))
    assert facts(other) == found


def test_a_footer_longer_than_the_first_read_is_read_whole(store: Store) -> None:
    columns = {f"column {number}": pa.array([str(number)]) for number in range(2000)}
    table = pa.table(columns)
    store.write_table("images/wide.parquet", table, table.schema, made_from='{"raw": "wide"}')
    footer = read_footer(Store(store.path("images/wide.parquet")))
    with store.open("images/wide.parquet") as file:
        content = file.read()
    length = int.from_bytes(content[-8:-4], "little")
    assert length > 64 << 10
    assert footer.digest == digest(content[-8 - length : -8])
    assert (footer.rows, footer.provenance, footer.schema) == (1, {"raw": "wide"}, table.schema)


def test_the_sources_of_a_shard_come_from_its_statistics(store: Store) -> None:
    assert Catalog(store).images()["c"].sources == {"pixiv"}


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<html>404</html>"])
def test_a_damaged_shard_fails_the_job_in_one_line_and_is_read_again_once_repaired(
    store: Store, content: bytes
) -> None:
    store.write("images/b.parquet", content)
    with pytest.raises(JobFailed, match=r"cannot read .*/images/b.parquet: [^\n]+; remove it and run the job"):
        facts(store)
    write(store, "b", "video")
    assert facts(store)["b"][0] == 1


def test_a_missing_file_of_a_finished_shard_is_named(store: Store) -> None:
    with pytest.raises(JobFailed, match=r"has no z\.parquet"):
        Catalog(store).reasons("images", ["a", "z"])


def test_a_manifest_that_cannot_be_written_costs_only_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(str(tmp_path))
    write(store, "a", "video")
    (tmp_path / "images" / NAME).mkdir()
    assert facts(store)["a"][0] == 1
    assert "which saves time later" in capsys.readouterr().err


def test_a_dataset_without_images_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no images; run: python pipeline/ingest.py --raw PATH"):
        Catalog(Store(str(tmp_path))).images()


def test_stamps_tell_files_of_one_size_apart(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write(store, "a", "video")
    facts(store)
    path = tmp_path / "images" / "a.parquet"
    size = path.stat().st_size
    write(store, "a", "other")
    assert path.stat().st_size == size
    os.utime(path, ns=(0, 1))
    assert facts(store)["a"][3] == {"other": 1}
    assert pq.read_metadata(path).num_rows == 1
