"""Raw files are sampled once, read as was decided, and refused before any work where they would be misread."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core.errors import UsageError
from pipeline.ingestion import raw_profiles
from pipeline.ingestion.commit import ingest_shard
from pipeline.ingestion.preflight import IngestPlan, plan_shards
from pipeline.ingestion.rules import IngestRules
from pipeline.sources.reading import ReadingFlags
from pipeline.storage.shards import Store

RULES = IngestRules()


@pytest.fixture
def dataset(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "dataset"))


def picture(number: int) -> bytes:
    file = io.BytesIO()
    noise_HW3 = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise_HW3).resize((80, 80)).save(file, "PNG")
    return file.getvalue()


def write_raw(path: Path, rows: int, features: dict[str, Any] | None = None, first: int = 0, **columns: Any) -> None:
    """Danbooru's columns; `columns` replaces, adds or, with None, leaves out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + rows)
    given = {"id": list(numbers), "rating": ["g"] * rows, "tag_string": ["1girl solo"] * rows}
    given |= {"image": [picture(number) for number in numbers]} | columns
    table = pa.table({name: values for name, values in given.items() if values is not None})
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)


def plan(dataset: Store, raw: Path, rules: IngestRules = RULES) -> IngestPlan:
    return plan_shards([str(raw)], "auto", None, dataset, rules)


def ingest(dataset: Store, raw: Path, rules: IngestRules = RULES) -> list[dict[str, Any]]:
    """The rows of IMAGES, without pictures."""
    made = plan(dataset, raw, rules)
    made.save()
    rows: list[dict[str, Any]] = []
    for shard in made.shards.values():
        ingest_shard(shard, dataset.root, rules)
        columns = ["id", "rating", "tags_general"]
        rows += dataset.read_table(f"images/{shard.shard}.parquet", columns).to_pylist()
    return sorted(rows, key=lambda row: str(row["id"]))


def test_what_was_decided_is_what_is_ingested(dataset: Store, tmp_path: Path) -> None:
    labels = {"rating": {"names": ["explicit", "general"], "_type": "ClassLabel"}}
    write_raw(
        tmp_path / "raw" / "0.parquet", 2, labels, rating=[1, 0], tag_string=["1girl, long hair", "no humans, sky"]
    )
    assert ingest(dataset, tmp_path / "raw") == [
        {"id": "danbooru:0", "rating": "general", "tags_general": ["1girl", "long_hair"]},
        {"id": "danbooru:1", "rating": "explicit", "tags_general": ["no_humans", "sky"]},
    ]


def test_folders_named_like_columns_give_their_values(dataset: Store, tmp_path: Path) -> None:
    for number, rating in enumerate("gse"):
        folder = tmp_path / "raw" / f"rating={rating}" / "year=2020"
        write_raw(folder / "0.parquet", 1, first=number, rating=None)
    assert [row["rating"] for row in ingest(dataset, tmp_path / "raw")] == ["general", "sensitive", "explicit"]


def test_files_are_sampled_once_and_read_as_before_when_others_join_them(
    dataset: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_raw(tmp_path / "raw" / "0.parquet", 60, rating=["s"] * 60)
    made = plan(dataset, tmp_path / "raw")
    [shard] = made.shards.values()
    assert shard.reading.legacy_ratings
    assert any("s is safe, as before 2022" in line for line in made.lines(dataset))
    made.save()
    monkeypatch.setattr(raw_profiles, "_sample", None)
    write_raw(tmp_path / "raw" / "1.parquet", 1, first=60, rating=["g"])
    again = plan(dataset, tmp_path / "raw")
    assert all(shard.reading.legacy_ratings for shard in again.shards.values())
    assert any("s is safe, as before 2022" in line for line in again.lines(dataset))


def test_flags_decide_and_another_decision_makes_the_shard_anew(dataset: Store, tmp_path: Path) -> None:
    write_raw(tmp_path / "raw" / "0.parquet", 60, rating=["s"] * 60)
    assert {row["rating"] for row in ingest(dataset, tmp_path / "raw")} == {"general"}
    current = replace(RULES, reading=ReadingFlags(ratings="current"))
    [why] = plan(dataset, tmp_path / "raw", current).todo.values()
    assert "columns was" in why
    assert {row["rating"] for row in ingest(dataset, tmp_path / "raw", current)} == {"sensitive"}


def test_pictures_that_are_only_named_are_refused(dataset: Store, tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": "1.png"}] * 2, kind)
    write_raw(tmp_path / "raw" / "0.parquet", 2, image=images)
    with pytest.raises(UsageError, match=r"0\.parquet has no pictures, only their names"):
        plan(dataset, tmp_path / "raw")


def test_ids_that_their_type_rounds_are_refused(dataset: Store, tmp_path: Path) -> None:
    write_raw(tmp_path / "raw" / "0.parquet", 2, id=np.array([112799086, 112799087], np.float32))
    with pytest.raises(UsageError, match="id is float, in which neighbouring ids above 2\\^24 are the same number"):
        plan(dataset, tmp_path / "raw")


def write_labelled(path: Path, number: int, names: list[str] | None) -> None:
    """A picture whose rating is the class label 0."""
    labels = {"rating": {"names": names, "_type": "ClassLabel"}} if names else None
    write_raw(path / f"{number}.parquet", 1, labels, first=number, rating=[0])


def test_each_file_is_read_by_its_own_class_labels_however_many_and_whenever_they_come(
    dataset: Store, tmp_path: Path
) -> None:
    for number in range(12):
        write_labelled(tmp_path / "raw", number, ["e", "g"] if number == 9 else ["g", "e"])
    assert {row["id"]: row["rating"] for row in ingest(dataset, tmp_path / "raw")} == {
        f"danbooru:{number}": "explicit" if number == 9 else "general" for number in range(12)
    }
    write_labelled(tmp_path / "raw", 12, ["q", "g"])
    assert ingest(dataset, tmp_path / "raw")[4]["rating"] == "questionable"


def test_files_with_and_without_names_for_the_same_labels_are_refused(dataset: Store, tmp_path: Path) -> None:
    write_labelled(tmp_path / "raw", 0, ["e", "g"])
    write_labelled(tmp_path / "raw", 1, None)
    with pytest.raises(UsageError, match=r"rating holds class labels that .*0\.parquet names .*1\.parquet does not"):
        plan(dataset, tmp_path / "raw")


def test_what_few_samples_decided_is_decided_again_when_files_join_them(dataset: Store, tmp_path: Path) -> None:
    write_raw(tmp_path / "raw" / "0.parquet", 0)
    assert not ingest(dataset, tmp_path / "raw")
    assert any("skipped 1 files without rows" in line for line in plan(dataset, tmp_path / "raw").lines(dataset))
    write_raw(tmp_path / "raw" / "1.parquet", 1, tag_string=["1girl, long hair"])
    assert ingest(dataset, tmp_path / "raw")[0]["tags_general"] == ["1girl", "long_hair"]


def test_few_samples_are_read_once_for_the_same_files(
    dataset: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_raw(tmp_path / "raw" / "0.parquet", 2)
    plan(dataset, tmp_path / "raw").save()
    monkeypatch.setattr(raw_profiles, "_sample", None)
    assert len(plan(dataset, tmp_path / "raw").shards) == 1


def test_old_ratings_are_known_from_the_names_of_all_folders(dataset: Store, tmp_path: Path) -> None:
    for number, rating in enumerate("sqe"):
        write_raw(tmp_path / "raw" / f"rating={rating}" / "0.parquet", 60, first=60 * number, rating=None)
    made = plan(dataset, tmp_path / "raw")
    assert all(shard.reading.legacy_ratings for shard in made.shards.values())


def test_a_folder_name_counts_where_the_column_is_empty(dataset: Store, tmp_path: Path) -> None:
    write_raw(tmp_path / "raw" / "rating=e" / "0.parquet", 2, rating=[None, "g"])
    assert [row["rating"] for row in ingest(dataset, tmp_path / "raw")] == ["explicit", "general"]


def test_the_plan_shows_what_is_uncertain_in_any_layout_of_a_folder_and_equal_lines_once(
    dataset: Store, tmp_path: Path
) -> None:
    write_raw(tmp_path / "raw" / "0.parquet", 2, rating=["g", "R-18"])
    write_raw(tmp_path / "raw" / "1.parquet", 2, first=2, tag_string=[["solo"], ["solo"]])
    for number in range(30):
        write_raw(tmp_path / "raw" / f"part{number}" / "0.parquet", 1, first=10 + number)
    lines = list(plan(dataset, tmp_path / "raw").lines(dataset))
    assert any("UNCERTAIN: unknown in 50%: rating 'R-18'" in line for line in lines)
    assert sum("spaces between tags" in line for line in lines) == 1
    assert any("raw and 30 other folders: rating: g 100%" in line for line in lines)


def test_pages_in_file_names_are_no_repeated_ids(dataset: Store, tmp_path: Path) -> None:
    images = [{"bytes": picture(page), "path": f"9_p{page}.png"} for page in range(2)]
    pixiv = {"x_restrict": [0, 0], "tags": [["空"], ["空"]], "rating": None, "tag_string": None}
    write_raw(tmp_path / "raw" / "0.parquet", 2, id=[9, 9], image=images, **pixiv)
    assert not any("UNCERTAIN" in line for line in plan(dataset, tmp_path / "raw").lines(dataset))
    assert [row["id"] for row in ingest(dataset, tmp_path / "raw")] == ["pixiv:9_p0", "pixiv:9_p1"]


def test_a_pointer_of_git_lfs_is_named(dataset: Store, tmp_path: Path) -> None:
    write_raw(tmp_path / "raw" / "0.parquet", 1)
    (tmp_path / "raw" / "1.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    [why] = plan(dataset, tmp_path / "raw").unreadable.values()
    assert "git lfs pull" in why
