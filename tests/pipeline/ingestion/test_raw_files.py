"""Which files are raw files, and which shards they become: nothing is ingested twice, and nothing collides."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import UsageError
from pipeline.core.records import IMAGES
from pipeline.ingestion import raw_files, repeated_ids
from pipeline.ingestion.preflight import IngestPlan, plan_shards
from pipeline.ingestion.raw_files import shard_name
from pipeline.ingestion.rules import IngestRules
from pipeline.storage.shards import Store

RULES = IngestRules()


def write_raw(path: Path, ids: range) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": number, "image": b"", "tag_string_general": "a", "rating": "g"} for number in ids]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def dataset(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "dataset"))


def plan(dataset: Store, *paths: object, rows_per_shard: int | None = None, check_ids: bool = False) -> IngestPlan:
    return plan_shards(list(map(str, paths)), "auto", rows_per_shard, dataset, RULES, check_ids)


def ingest(dataset: Store, *paths: object, rows_per_shard: int | None = None, old_names: bool = False) -> IngestPlan:
    """Writes empty shards with the provenance of an ingest."""
    made = plan(dataset, *paths, rows_per_shard=rows_per_shard)
    dataset.write("dataset.json", b'{"schema_version": 1}')
    for name in made.todo:
        raw = made.shards[name]
        provenance = {"raw": raw.path, "footer": raw.digest, "stamp": raw.stamp, "settings": RULES.settings(raw)}
        name = name.replace(shard_name(raw.path, raw.source), old_name(raw.path)) if old_names else name
        dataset.write_table(
            f"images/{name}.parquet", pa.Table.from_pylist([], IMAGES), IMAGES, **provenance,
            fingerprint=RULES.fingerprint(raw),
        )  # fmt: skip
    made.save()
    return made


def old_name(path: str) -> str:
    return f"danbooru-{Path(path).parent.name}-{Path(path).stem}"


# --- Names ------------------------------------------------------------------------------------------------------------


def test_equal_file_names_in_different_folders_become_different_shards(tmp_path: Path, dataset: Store) -> None:
    files = [
        write_raw(tmp_path / "raw" / dump / "default" / "train" / "0000.parquet", range(number, number + 2))
        for number, dump in enumerate(("danbooru2023", "danbooru2025"))
    ]
    made = ingest(dataset, tmp_path / "raw")
    assert set(made.shards) == {shard_name(file, "danbooru") for file in files}
    assert all(name.startswith("danbooru-train-0000-") for name in made.shards)
    assert plan(dataset, tmp_path / "raw").todo == {}
    assert plan(dataset, files[1]).todo == {}, "however it is named in the command"


def test_a_name_depends_only_on_the_last_three_folders_and_the_file_name() -> None:
    assert shard_name("/mnt/a/b/c/d.parquet", "danbooru") == shard_name("s3://bucket/a/b/c/d.parquet", "danbooru")
    names = {
        shard_name(f"/{place}/d.parquet", "danbooru") for place in ("a/b/c", "x/b/c", "a/x/c", "b/c", "a b/c", "a_b/c")
    }
    assert len(names) == 6


def test_files_that_agree_in_all_of_that_become_different_shards_too(tmp_path: Path, dataset: Store) -> None:
    files = [write_raw(tmp_path / disk / "a" / "b" / "c" / "d.parquet", range(n, 9)) for n, disk in enumerate("xy")]
    made = ingest(dataset, tmp_path / "x", tmp_path / "y")
    assert len(made.todo) == 2
    assert {raw.path for raw in made.shards.values()} == set(files)
    assert plan(dataset, tmp_path / "x", tmp_path / "y").todo == {}
    for file in files:
        assert plan(dataset, file).todo == {}
    third = write_raw(tmp_path / "z" / "a" / "b" / "c" / "d.parquet", range(5, 9))
    assert len(ingest(dataset, third).todo) == 1, "in a later run"
    assert len(dataset.shards("images")) == 3


@pytest.mark.parametrize("rows_per_shard", [None, 4])
def test_shards_of_earlier_versions_keep_their_names(
    tmp_path: Path, dataset: Store, rows_per_shard: int | None
) -> None:
    file = write_raw(tmp_path / "data" / "train-00001.parquet", range(9))
    ingest(dataset, tmp_path / "data", rows_per_shard=rows_per_shard, old_names=True)
    before = dataset.shards("images")
    assert all(name.startswith("danbooru-data-train-00001") for name in before)
    made = plan(dataset, file, rows_per_shard=rows_per_shard)
    assert (sorted(made.shards), made.todo) == (before, {})
    with pytest.raises(UsageError, match="split differently"):
        plan(dataset, file, rows_per_shard=4 if rows_per_shard is None else None)
    write_raw(Path(file), range(10))
    made = plan(dataset, file, rows_per_shard=rows_per_shard)
    assert made.todo == dict.fromkeys(before, "the raw file has changed")
    new = write_raw(tmp_path / "other" / "data" / "train-00001.parquet", range(9, 12))
    assert plan(dataset, new).todo == {shard_name(new, "danbooru"): "new"}, "a name that would have collided"


# --- Moved and changed files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old_names", [False, True])
def test_a_moved_raw_folder_is_not_ingested_again(tmp_path: Path, dataset: Store, old_names: bool) -> None:
    for number in range(3):
        write_raw(tmp_path / "disk" / "raw" / f"{number}.parquet", range(number * 5, number * 5 + 5))
    ingest(dataset, tmp_path / "disk", old_names=old_names, rows_per_shard=2)
    shutil.move(tmp_path / "disk" / "raw", tmp_path / "elsewhere")
    made = plan(dataset, tmp_path / "elsewhere", rows_per_shard=2)
    assert (made.todo, made.moved) == ({}, 3)
    assert sorted(made.shards) == dataset.shards("images")
    assert "3 raw files were ingested from other paths before" in "\n".join(made.lines(dataset))


def test_a_copy_beside_the_original_is_a_file_of_its_own(tmp_path: Path, dataset: Store) -> None:
    file = write_raw(tmp_path / "raw" / "a" / "one.parquet", range(3))
    ingest(dataset, tmp_path / "raw")
    copy = tmp_path / "raw" / "b" / "one.parquet"
    copy.parent.mkdir()
    shutil.copy(file, copy)
    made = plan(dataset, tmp_path / "raw")
    assert [made.shards[name].path for name in made.todo] == [str(copy)]


def test_a_changed_copy_of_a_file_that_is_gone_is_refused(tmp_path: Path, dataset: Store) -> None:
    place = Path("raw") / "danbooru" / "train" / "one.parquet"
    gone = Path(write_raw(tmp_path / "disk" / place, range(3)))
    [shard] = ingest(dataset, gone).todo
    other = write_raw(tmp_path / "other" / place, range(4))
    assert len(plan(dataset, other).todo) == 1, "both files exist: another file"
    gone.unlink()
    with pytest.raises(UsageError, match=rf"may be a changed copy of {gone}, which is gone .* has shard {shard}\."):
        plan(dataset, other)
    dataset.remove(f"images/{shard}.parquet")
    assert len(plan(dataset, other).todo) == 1


def test_a_changed_file_and_changed_settings_are_noticed(tmp_path: Path, dataset: Store) -> None:
    file = write_raw(tmp_path / "raw" / "one.parquet", range(3))
    ingest(dataset, file)
    [why] = plan_shards([file], "auto", None, dataset, replace(RULES, admit=("banned",))).todo.values()
    assert "--admit was [], is ['banned']" in why
    write_raw(Path(file), range(4))
    assert set(plan(dataset, file).todo.values()) == {"the raw file has changed"}


# --- Own output -------------------------------------------------------------------------------------------------------


def test_a_dataset_inside_the_raw_folder_is_skipped(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_raw(raw / "one.parquet", range(3))
    dataset = Store(str(raw / "dataset"))
    made = ingest(dataset, raw)
    assert len(made.shards) == 1
    made = plan(dataset, raw)
    assert (len(made.shards), made.todo) == (1, {})
    line = f"skipped {raw}/dataset: a dataset of this program, not raw files (1 parquet files)"
    assert line in list(made.lines(dataset))
    with pytest.raises(UsageError, match=r"no parquet file at .*/dataset; it holds a dataset"):
        plan(dataset, raw / "dataset")
    with pytest.raises(UsageError, match="was written by this program"):
        plan(dataset, raw / "dataset" / "images")
    (raw / "dataset" / "dataset.json").unlink()
    made = plan(dataset, raw)
    assert (len(made.shards), made.todo) == (1, {})
    assert "skipped 1 files written by this program, for example" in next(made.lines(dataset))


def test_raw_files_kept_inside_a_dataset_are_found(tmp_path: Path) -> None:
    dataset = Store(str(tmp_path / "dataset"))
    file = write_raw(tmp_path / "dataset" / "raw" / "one.parquet", range(3))
    ingest(dataset, file)
    assert [raw.path for raw in plan(dataset, tmp_path / "dataset").shards.values()] == [file]


def test_a_json_file_of_another_program_hides_no_raw_file(tmp_path: Path, dataset: Store) -> None:
    write_raw(tmp_path / "raw" / "images" / "one.parquet", range(3))
    for content in ("{}", "[]", "not JSON"):
        (tmp_path / "raw" / "dataset.json").write_text(content)
        assert len(plan(dataset, tmp_path / "raw").shards) == 1


def test_keys_that_end_with_a_slash_are_no_files(bucket: str, tmp_path: Path, dataset: Store) -> None:
    import s3fs

    store = Store(f"{bucket}/{tmp_path.name}")
    file = write_raw(tmp_path / "one.parquet", range(3))
    store.write("raw/one.parquet", Path(file).read_bytes())
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    for key in ("raw/", "raw/two.parquet/"):
        files.call_s3("put_object", Bucket="datasets", Key=f"{tmp_path.name}/{key}", Body=b"")
    made = plan(dataset, store.path("raw"))
    assert (len(made.shards), made.unreadable) == (1, {})
    assert store.shards("raw") == ["one"]
    assert store.folders("") == ["raw"]


# --- Caches -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Paths of the parquet files that are read."""
    found: set[str] = set()

    def recorded(really: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: Store, name: str = "", *rest: Any) -> Any:
            found.update(path for path in [self.path(name)] if path.endswith(".parquet"))
            return really(self, name, *rest)

        return read

    for method in ("open", "tail"):
        monkeypatch.setattr(Store, method, recorded(getattr(Store, method)))
    return found


def test_the_plan_of_an_unchanged_dataset_opens_no_file(tmp_path: Path, dataset: Store, opened: set[str]) -> None:
    files = [write_raw(tmp_path / "raw" / f"{number}.parquet", range(number, number + 20)) for number in range(3)]
    ingest(dataset, tmp_path / "raw")
    ingest(dataset, tmp_path / "raw")  # reads the new shards
    opened.clear()
    unchanged = plan(dataset, tmp_path / "raw")
    assert opened == set()
    (Path(dataset.root) / raw_files._MANIFEST).unlink()
    assert plan(dataset, tmp_path / "raw").shards == unchanged.shards
    assert opened == set(files)
    assert not (Path(dataset.root) / raw_files._MANIFEST).exists(), "a plan writes nothing"
    ingest(dataset, tmp_path / "raw")
    opened.clear()
    write_raw(Path(files[1]), range(7))
    assert len(plan(dataset, tmp_path / "raw").todo) == 1
    assert opened == {files[1]}


def test_raw_files_of_other_folders_stay_known(tmp_path: Path, dataset: Store, opened: set[str]) -> None:
    for number, folder in enumerate("ab"):
        write_raw(tmp_path / folder / "one.parquet", range(number, 3))
        ingest(dataset, tmp_path / folder)
    ingest(dataset, tmp_path / "a", tmp_path / "b")
    opened.clear()
    assert len(plan(dataset, tmp_path / "a").shards) == 1
    assert opened == set()


def test_ids_are_read_again_only_from_changed_files(
    tmp_path: Path, dataset: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        write_raw(tmp_path / "raw" / f"{number}.parquet", range(number * 2, number * 2 + 3)) for number in range(3)
    ]
    read: list[str] = []
    really = repeated_ids._ids
    monkeypatch.setattr(repeated_ids, "_ids", lambda raw, rules: read.append(raw.path) or really(raw, rules))  # type: ignore[func-returns-value]
    made = plan(dataset, tmp_path / "raw", check_ids=True)
    assert made.repeated == 2
    assert set(files) <= set(read)
    made.save()
    read.clear()
    write_raw(Path(files[2]), range(10, 13))
    made = plan(dataset, tmp_path / "raw", check_ids=True)
    assert (made.repeated, made.example) == (1, f"danbooru:2 of {files[0]} and {files[1]}")
    assert read == [files[2], files[0]], "the changed file, and one for the example"


@pytest.mark.parametrize("content", [b"", b"PAR1 PAR1"])
def test_a_damaged_cache_of_ids_changes_nothing(tmp_path: Path, dataset: Store, content: bytes) -> None:
    for number in range(2):
        write_raw(tmp_path / "raw" / f"{number}.parquet", range(3))
    dataset.write(repeated_ids._CACHE, content)
    assert plan(dataset, tmp_path / "raw", check_ids=True).repeated == 3
