"""posts/ made from metadata: rows are matched, values replaced, and nothing else is touched.

Shards are processed one after the other in this process.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import UsageError
from pipeline.core.records import IMAGES, POSTS, TAG_CATEGORIES
from pipeline.ingestion.command import IngestJob, parse_args
from pipeline.ingestion.refresh import run_refresh
from pipeline.ingestion.rules import IngestRules
from pipeline.storage.posts import read_images
from pipeline.storage.shards import Store

Row = dict[str, Any]


def image(name: str, **changes: Any) -> Row:
    tags = {f"tags_{category}": [f"old_{category}"] for category in TAG_CATEGORIES}
    return {
        "id": name,
        "source": name.partition(":")[0],
        "image": b".",
        "format": "PNG",
        "width": 200,
        "height": 200,
        "sha256": hashlib.sha256(name.encode()).hexdigest(),
        "phash": 1,
        "rating": "general",
        "score": 1,
        "favourites": 5,
        "page": int(name.partition("_p")[2] or 0),
        **tags,
    } | changes


class Folder:
    """A dataset, and metadata beside it."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, Store(str(root / "dataset"))
        self.done: list[str] = []  # of the last refresh

    def images(self, shard: str, *rows: Row) -> None:
        self.store.write_table(f"images/{shard}.parquet", pa.Table.from_pylist(list(rows), IMAGES), IMAGES)

    def metadata(self, name: str, *rows: Row, schema: pa.Schema | None = None, group: int = 2) -> str:
        path = self.root / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(list(rows), schema), path, row_group_size=group)
        return str(path)

    def refresh(self, *paths: str, plan: bool = False, rules: IngestRules | None = None) -> None:
        self.done = []
        job = IngestJob(
            raw=[], refresh=list(paths), source="auto", dataset=self.store.root, rows_per_shard=None, plan=plan,
            check_ids=False, rules=rules or IngestRules(),
        )  # fmt: skip
        run_refresh(job, self._one_by_one)

    def _one_by_one(
        self, parts: dict[str, Any], work: Callable[[Any], Any], rows: object, description: str, memory: int = 0
    ) -> dict[str, str]:
        for name, part in parts.items():
            work(part)
            self.done.append(name if description == "refreshing" else description)
        return {}

    def posts(self, shard: str) -> list[Row]:
        table = self.store.read_table(f"posts/{shard}.parquet")
        assert table.schema.equals(POSTS)
        rows: list[Row] = table.to_pylist()
        return rows


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def post(number: int, **fields: Any) -> Row:
    """A row of Danbooru's metadata."""
    return {"id": number, "fav_count": 70, "score": 30, "rating": "q", "is_deleted": False} | fields


def test_values_of_matching_rows_are_replaced_and_all_others_stay(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.images("a", image("danbooru:1"), image("danbooru:2"), image("danbooru:3", favourites=None))
    folder.images("b", image("danbooru:9"))
    images = {path: path.read_bytes() for path in (folder.root / "dataset" / "images").iterdir()}
    new = [post(2, tag_string_general="new_tag sky"), post(3, is_deleted=True), post(4), post(5)]
    folder.refresh(folder.metadata("new", *new))
    old = {"rating": "general", "score": 1, "favourites": 5, "deleted": False}
    old |= {f"tags_{category}": [f"old_{category}"] for category in TAG_CATEGORIES}
    fresh = old | {"rating": "questionable", "score": 30, "favourites": 70}
    assert folder.posts("a") == [
        {"id": "danbooru:1"} | old,
        {"id": "danbooru:2"} | fresh | {"tags_general": ["new_tag", "sky"]},
        {"id": "danbooru:3"} | fresh | {"deleted": True},
    ]
    assert folder.store.shards("posts") == ["a"]
    assert images == {path: path.read_bytes() for path in images}
    out = capsys.readouterr().out
    assert "2 pictures matched, 2 of them changed, 1 deleted; 2 rows of the files were not found" in out
    record = json.loads(folder.store.read("posts/run.json"))
    assert (record["rows_in"], record["rows_out"], record["rejected"]) == (4, 2, {"not in the dataset": 2})
    assert not folder.store.shards("posts/partial")


def test_a_rerun_with_the_same_files_does_nothing_and_a_new_file_builds_on_the_old_ones(folder: Folder) -> None:
    folder.images("a", image("danbooru:1"), image("danbooru:2"))
    folder.images("b", image("danbooru:9"))
    first = folder.metadata("first", post(1, fav_count=10), post(2, fav_count=20))
    folder.refresh(first)
    assert folder.done == ["matching", "gathering", "a", "b"]
    written = folder.store.stamp("posts/a.parquet")
    folder.refresh(first)
    assert folder.done == []
    second = folder.metadata("second", {"id": 2, "fav_count": 21})
    folder.refresh(second)
    assert folder.done == ["matching", "gathering", "a", "b"]
    assert [(row["favourites"], row["score"]) for row in folder.posts("a")] == [(10, 30), (21, 30)]
    assert folder.store.stamp("posts/a.parquet") != written
    folder.refresh(first, second)
    assert folder.done == []

    folder.images("b", image("danbooru:9"), image("danbooru:1"))  # ingested again
    folder.refresh(first)
    assert folder.done == ["matching", "gathering", "b"]
    assert [row["favourites"] for row in folder.posts("b")] == [5, 10]


def test_a_file_that_was_applied_to_a_shard_is_not_applied_again_beside_a_new_one(folder: Folder) -> None:
    folder.images("a", image("danbooru:1"), image("danbooru:2"))
    first = folder.metadata("first", post(1, fav_count=10), post(2, fav_count=20))
    folder.refresh(first)
    folder.refresh(folder.metadata("second", {"id": 1, "fav_count": 11}))
    folder.images("b", image("danbooru:2"), image("danbooru:1"))
    folder.refresh(first, folder.metadata("third", {"id": 2, "fav_count": 22}))
    assert [row["favourites"] for row in folder.posts("a")] == [11, 22]
    assert [row["favourites"] for row in folder.posts("b")] == [22, 10]
    assert folder.done == ["matching", "matching", "gathering", "gathering", "a", "b"]
    folder.refresh(first, str(folder.root / "third.parquet"))
    assert folder.done == []


def test_a_shard_opens_one_file_of_updates_however_many_parts_there_are(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.ingestion.refresh._PART_ROWS", 2)
    monkeypatch.setattr("pipeline.ingestion.refresh._RANGE_ROWS", 4)
    monkeypatch.setattr("pipeline.ingestion.post_updates._GROUP_ROWS", 3)
    for number in range(5):
        folder.images(f"s{number}", image(f"danbooru:{number}"), image(f"danbooru:{number + 5}"))
    opened: list[str] = []
    open_file = Store.open

    def counted(store: Store, name: str = "") -> Any:
        opened.append(name)
        return open_file(store, name)

    monkeypatch.setattr(Store, "open", counted)
    one = [post(number, fav_count=number) for number in range(10)]
    two = [post(number, fav_count=100 + number) for number in range(5, 10)]
    folder.refresh(folder.metadata("one", *one), folder.metadata("two", *two))
    assert folder.done == [*["matching"] * 8, *["gathering"] * 3, *(f"s{number}" for number in range(5))]
    partial = [name for name in opened if name.startswith("posts/partial/")]
    assert len(partial) == 8 * 3 + 5 + 8, "each range opens all parts, each shard one range, the report all parts"
    for number in range(5):
        assert [row["favourites"] for row in folder.posts(f"s{number}")] == [number, 105 + number]


def test_a_killed_refresh_goes_on_with_the_files_that_it_wrote(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.images("a", image("danbooru:1"))
    path = folder.metadata("new", post(1))

    def killed(part: Any, dataset: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.ingestion.refresh.update_posts", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.refresh(path)
    assert folder.done == ["matching", "gathering"]
    folder.refresh(path)
    assert folder.done == ["a"]
    assert folder.posts("a")[0]["favourites"] == 70


def test_of_several_rows_about_a_picture_the_last_one_counts(folder: Folder) -> None:
    folder.images("a", image("danbooru:1"))
    folder.images("b", image("danbooru:1"))
    rows = [post(1, fav_count=count, is_deleted=count == 2) for count in (1, 2, 3)]
    folder.refresh(folder.metadata("new", *rows))
    assert [folder.posts(shard)[0]["favourites"] for shard in "ab"] == [3, 3]
    assert folder.posts("a")[0]["deleted"] is False


def test_missing_columns_and_nulls_leave_values_as_they_are(folder: Folder) -> None:
    folder.images("a", image("danbooru:1"), image("danbooru:2"))
    rows = [{"id": 1, "is_deleted": True, "score": None, "tag_string": "one two"}, {"id": 2, "score": 7}]
    folder.refresh(folder.metadata("new", *rows, schema=pa.schema(
        [("id", pa.int64()), ("is_deleted", pa.bool_()), ("score", pa.int64()), ("tag_string", pa.string())]
    )))  # fmt: skip
    first, second = folder.posts("a")
    assert (first["score"], first["favourites"], first["rating"], first["deleted"]) == (1, 5, "general", True)
    assert first["tags_general"] == ["old_general"]  # uncategorised tags would lose the categories
    assert (second["score"], second["deleted"]) == (7, False)


def test_metadata_of_a_pixiv_work_applies_to_all_of_its_pages_unless_it_names_one(folder: Folder) -> None:
    folder.images("a", image("pixiv:5_p0"), image("pixiv:5_p1"), image("pixiv:55_p0"), image("danbooru:5"))
    tags = [{"name": "空", "translated_name": "sky"}]
    work = {"id": 5, "total_bookmarks": 900, "total_view": 8000, "x_restrict": 1, "tags": tags, "visible": True}
    folder.refresh(folder.metadata("works", work))
    assert [(row["favourites"], row["rating"], row["tags_general"]) for row in folder.posts("a")] == [
        (900, "explicit", ["sky"]), (900, "explicit", ["sky"]), (5, "general", ["old_general"]),
        (5, "general", ["old_general"]),
    ]  # fmt: skip
    assert folder.posts("a")[0]["tags_artist"] == ["old_artist"]
    folder.refresh(folder.metadata("pages", work | {"page": 1, "total_bookmarks": 901, "visible": False}))
    assert [(row["favourites"], row["deleted"]) for row in folder.posts("a")][:2] == [(900, False), (901, True)]


def test_deletions_that_are_admitted_do_not_count(folder: Folder) -> None:
    folder.images("a", image("danbooru:1"), image("danbooru:2"))
    rows = [post(1, is_deleted=True, is_banned=False), post(2, is_banned=True)]
    folder.refresh(folder.metadata("new", *rows), rules=replace(IngestRules(), admit=("deleted",)))
    assert [row["deleted"] for row in folder.posts("a")] == [False, True]


def test_rows_that_cannot_be_read_are_counted_and_the_rest_is_kept(folder: Folder) -> None:
    folder.images("a", image("danbooru:1"), image("danbooru:2"))
    good, bad = pa.array([b"general", b"\xff\xfe", b"q"]).view(pa.binary()), [1, 2, None]
    rating = pa.Array.from_buffers(pa.string(), 3, good.buffers())
    pq.write_table(pa.table({"id": bad, "rating": rating, "fav_count": [7, 8, 9]}), folder.root / "new.parquet")
    folder.refresh(str(folder.root / "new.parquet"))
    record = json.loads(folder.store.read("posts/run.json"))
    assert (record["rows_out"], record["rejected"]) == (1, {"no id": 1, "unreadable row": 1})
    assert [row["favourites"] for row in folder.posts("a")] == [7, 5]


def test_a_plan_writes_nothing_and_wrong_files_are_refused(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="has no images"):
        folder.refresh(folder.metadata("new", post(1)))
    folder.images("a", image("danbooru:1"))
    before = sorted(folder.root.rglob("*"))
    folder.refresh(str(folder.root / "new.parquet"), plan=True)
    assert "1 metadata files, 1 rows; 1 of 1 shards to do" in capsys.readouterr().out
    assert sorted(folder.root.rglob("*")) == before
    with pytest.raises(
        UsageError, match=r"other\.parquet is not the metadata of danbooru or pixiv.*--map column=field"
    ):
        folder.refresh(folder.metadata("other", {"number": 1, "likes": 2}))
    (folder.root / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"broken\.parquet is no complete parquet file"):
        folder.refresh(str(folder.root / "broken.parquet"))
    with pytest.raises(UsageError, match="no parquet file at"):
        folder.refresh(str(folder.root / "none"))
    renamed = IngestRules(renamed=(("likes", "fav_count"), ("number", "id")))
    folder.refresh(str(folder.root / "other.parquet"), rules=renamed)
    assert folder.posts("a")[0]["favourites"] == 2


def test_readers_see_refreshed_values_and_refuse_posts_of_other_rows(folder: Folder) -> None:
    folder.images("a", image("danbooru:1"), image("danbooru:2"))
    columns = ["width", "favourites", "id"]
    assert read_images(folder.store, "a", columns).column_names == columns
    folder.refresh(folder.metadata("new", post(2)))
    table = read_images(folder.store, "a", columns)
    assert table.column_names == [*columns, "deleted"]
    assert (table["favourites"].to_pylist(), table["width"].to_pylist()) == ([5, 70], [200, 200])
    assert read_images(folder.store, "a", ["width"]).column_names == ["width"]
    folder.images("a", image("danbooru:2"), image("danbooru:1"))
    with pytest.raises(ValueError, match=r"posts/a\.parquet has other rows than its images.*run ingest\.py --refresh"):
        read_images(folder.store, "a", columns)


@pytest.mark.parametrize("flag", ["--rows-per-shard 5", "--downsize 512", "--max-megapixels 5", "--check-ids"])
def test_flags_about_pictures_are_refused_beside_refresh(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ingest.py", "--refresh", "metadata", *flag.split()])
    with pytest.raises(UsageError, match=f"reads no pictures: leave out {flag.split()[0]}$"):
        parse_args("")
    monkeypatch.setattr("sys.argv", ["ingest.py", "--refresh", "metadata", "--raw", "raw"])
    with pytest.raises(UsageError, match="not allowed with argument"):
        parse_args("")


def test_class_labels_and_commas_are_read_as_in_raw_files_and_shown(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.images("a", image("danbooru:1"), image("danbooru:2"))
    rows = [{"id": 1, "rating": 0, "tag_string_general": "1girl, long hair"}, {"id": 2, "rating": 1}]
    path = folder.metadata("new", *rows)
    features = {"rating": {"names": ["explicit", "general"], "_type": "ClassLabel"}}
    table = pq.read_table(path).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    folder.refresh(path)
    first, second = folder.posts("a")
    assert (first["rating"], first["tags_general"]) == ("explicit", ["1girl", "long_hair"])
    assert (second["rating"], second["tags_general"]) == ("general", ["old_general"])
    assert "commas between tags" in capsys.readouterr().out


def test_metadata_without_tags_is_not_uncertain(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.images("a", image("danbooru:1"))
    folder.refresh(folder.metadata("new", {"id": 1, "fav_count": 3}))
    assert "UNCERTAIN" not in capsys.readouterr().out
