"""Raw files -> plan -> shards: nothing is done twice, no row is lost, and every rejection has a reason."""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core.errors import UsageError
from pipeline.core.records import IMAGES, OTHER_MD5, SCHEMA_VERSION, TIER
from pipeline.ingestion import commit, raw_rows
from pipeline.ingestion.commit import ingest_shard
from pipeline.ingestion.preflight import IngestPlan, plan_shards
from pipeline.ingestion.raw_files import shard_name
from pipeline.ingestion.rules import IngestRules
from pipeline.ingestion.smaller_tier import downsize_shard
from pipeline.pictures.decoder import DecodeLimits, Picture, decode
from pipeline.storage.shards import Store

RULES = IngestRules()


def png(width: int = 40, height: int = 40, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def posts(ids: Iterator[int] | range, **fields: Any) -> list[dict[str, Any]]:
    return [{"id": i, "image": png(seed=i), "tag_string_general": "a b", "rating": "g", **fields} for i in ids]


def write_raw(path: Path, rows: list[dict[str, Any]], row_group_size: int = 1000) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return str(path)


@pytest.fixture
def dataset(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "dataset"))


def ingest(
    paths: list[str], dataset: Store, rules: IngestRules = RULES, rows_per_shard: int | None = None
) -> IngestPlan:
    """Plan an ingest and run it, without Ray."""
    plan = plan_shards(paths, "auto", rows_per_shard, dataset, rules)
    for name in plan.todo:
        ingest_shard(plan.shards[name], dataset.root, rules)
    for name in plan.tiers:
        downsize_shard(plan.shards[name], dataset.root, rules)
    return plan


def only(dataset: Store) -> str:
    """The name of the dataset's only shard."""
    [shard] = dataset.shards("images")
    return shard


def ids(dataset: Store, folder: str = "images") -> list[str]:
    return [
        row
        for shard in dataset.shards(folder)
        for row in dataset.read_table(f"{folder}/{shard}.parquet", ["id"])["id"].to_pylist()
    ]


# --- Plan -------------------------------------------------------------------------------------------------------------


def test_the_layout_of_each_file_is_detected_and_printed(tmp_path: Path, dataset: Store) -> None:
    struct = {"bytes": png(), "path": "9_p3.png"}
    files = [
        write_raw(tmp_path / "a" / "flat.parquet", posts(range(1))),
        write_raw(tmp_path / "a" / "numbers.parquet", [{"id": 1, "jpg": png(), "tag_string": "a", "rating": 0}]),
        write_raw(
            tmp_path / "a" / "app.parquet", [{"id": 9, "image": struct, "tags": [{"name": "x"}], "x_restrict": 0}]
        ),
        write_raw(tmp_path / "a" / "web.parquet", [{"id": 9, "image": struct, "tags": "x y", "xRestrict": 0}]),
    ]
    plan = plan_shards(files, "auto", None, dataset, RULES)
    assert {raw.shard: raw.layout for raw in plan.shards.values()} == {
        shard_name(files[0], "danbooru"): "danbooru, flat image column, 1 tag categories, text ratings",
        shard_name(files[1], "danbooru"): "danbooru, flat jpg column, uncategorised tags, number ratings",
        shard_name(files[2], "pixiv"): "pixiv, HF image struct, app API, tags as list",
        shard_name(files[3], "pixiv"): "pixiv, HF image struct, web API, tags as text",
    }
    printed = "\n".join(plan.lines(dataset))
    assert "4 raw shards, 4 rows" in printed
    assert "1 x pixiv, HF image struct, web API, tags as text" in printed
    assert "4 x new" in printed


def test_ids_repeated_in_another_file_are_reported_before_any_work(tmp_path: Path, dataset: Store) -> None:
    files = [
        write_raw(tmp_path / "r" / "one.parquet", posts(range(10))),
        write_raw(tmp_path / "r" / "two.parquet", posts(range(7, 12))),
    ]
    assert plan_shards(files, "auto", None, dataset, RULES).repeated is None, "not asked for"
    plan = plan_shards(files, "auto", None, dataset, RULES, check_ids=True)
    assert plan.repeated == 3
    assert plan.example.endswith(f"of {files[0]} and {files[1]}")
    assert plan.example.split(" ")[0] in {"danbooru:7", "danbooru:8", "danbooru:9"}
    assert plan_shards(files[:1], "auto", None, dataset, RULES, check_ids=True).repeated == 0


def test_a_pixiv_page_without_a_column_is_read_from_the_file_name(tmp_path: Path, dataset: Store) -> None:
    names = ["9_p0.png", "9_p1_master1200.jpg", "img/9_p12_square1200.jpg"]
    rows = [
        {"id": 9, "image": {"bytes": png(seed=number), "path": name}, "tags": "x", "x_restrict": 0}
        for number, name in enumerate(names)
    ]
    file = write_raw(tmp_path / "r" / "one.parquet", rows)
    assert plan_shards([file], "auto", None, dataset, RULES, check_ids=True).repeated == 0
    ingest([file], dataset)
    assert ids(dataset) == ["pixiv:9_p0", "pixiv:9_p1", "pixiv:9_p12"]


def test_a_column_of_paths_is_refused_as_a_layout_without_images(tmp_path: Path, dataset: Store) -> None:
    file = write_raw(tmp_path / "r" / "one.parquet", [{"id": 1, "image": "1.png", "tag_string": "a"}])
    with pytest.raises(UsageError, match="without images: image holds string"):
        plan_shards([file], "auto", None, dataset, RULES)


def test_mapped_columns_are_read_as_the_given_fields(tmp_path: Path, dataset: Store) -> None:
    rows = [{"nr": 1, "picture": png(), "labels": "a b", "likes": 7, "image": "unused"}]
    file = write_raw(tmp_path / "r" / "one.parquet", rows)
    with pytest.raises(UsageError, match=r"found the columns .*'labels', 'likes', 'nr', 'picture'.*--map column=field"):
        plan_shards([file], "auto", None, dataset, RULES)
    names = {"nr": "id", "picture": "image", "labels": "tag_string", "likes": "fav_count"}
    ingest([file], dataset, replace(RULES, renamed=tuple(names.items())))
    [row] = dataset.read_table(f"images/{only(dataset)}.parquet").to_pylist()
    assert (row["id"], row["image"], row["tags_general"], row["favourites"]) == ("danbooru:1", png(), ["a", "b"], 7)


# --- Reruns -----------------------------------------------------------------------------------------------------------


def test_finished_shards_are_skipped_and_changed_ones_are_redone(tmp_path: Path, dataset: Store) -> None:
    path = tmp_path / "r" / "one.parquet"
    file, other = write_raw(path, posts(range(4))), write_raw(tmp_path / "r" / "two.parquet", posts(range(4, 8)))
    one, two = shard_name(file, "danbooru"), shard_name(other, "danbooru")
    assert ingest([file, other], dataset).todo == {one: "new", two: "new"}
    assert ingest([file, other], dataset).todo == {}
    write_raw(path, posts(range(5)))
    assert ingest([file, other], dataset).todo == {one: "the raw file has changed"}
    assert len(ids(dataset)) == 9
    write_raw(path, [row | {"rating": "q"} for row in posts(range(5))])
    assert ingest([file, other], dataset).todo == {one: "the raw file has changed"}
    assert dataset.tally(f"images/{one}.parquet", "rating") == {"questionable": 5}
    untouched = replace(RULES, admit=("placeholder picture",))
    assert ingest([file, other], dataset, untouched).todo == {}, "a reason of Pixiv does not affect Danbooru"
    strict = replace(RULES, limits=DecodeLimits(min_side=41))
    [why] = set(ingest([file, other], dataset, strict).todo.values())
    assert "other settings: limits was {" in why
    assert ids(dataset) == []


def test_a_file_split_into_shards_gives_the_same_rows_and_never_twice(tmp_path: Path, dataset: Store) -> None:
    rows = posts(range(23))
    rows[4]["image"] = rows[17]["image"] = b"broken"
    file = write_raw(tmp_path / "r" / "one.parquet", rows, row_group_size=6)
    whole = Store(str(tmp_path / "whole"))
    ingest([file], whole)
    plan = ingest([file], dataset, rows_per_shard=5)
    assert [raw.rows for raw in plan.shards.values()] == [5, 5, 5, 5, 3]
    assert ids(dataset) == ids(whole)
    assert len(ids(dataset)) == 21
    refused = [
        row for name in dataset.shards("rejected") for row in dataset.read_table(f"rejected/{name}.parquet").to_pylist()
    ]
    assert refused == whole.read_table(f"rejected/{only(whole)}.parquet").to_pylist()
    for other, cut in ((dataset, None), (dataset, 10), (whole, 5)):
        with pytest.raises(UsageError, match="split differently"):
            plan_shards([file], "auto", cut, other, RULES)


# --- Output -----------------------------------------------------------------------------------------------------------


def test_row_groups_are_bounded_in_bytes_independently_of_the_raw_file(
    tmp_path: Path, dataset: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit, "_GROUP_BYTES", 10_000)
    monkeypatch.setattr(raw_rows, "_READ_BYTES", 10_000)
    ingest([write_raw(tmp_path / "r" / "one.parquet", posts(range(30)))], dataset)
    with dataset.open(f"images/{only(dataset)}.parquet") as file:
        groups = pq.ParquetFile(file)
        sizes = [
            sum(map(len, groups.read_row_group(group, ["image"])["image"].to_pylist()))
            for group in range(groups.num_row_groups)
        ]
    assert len(sizes) > 3
    assert max(sizes) <= 10_000
    assert ids(dataset) == [f"danbooru:{i}" for i in range(30)]


def test_the_smaller_tier_is_the_same_whether_written_with_the_images_or_later(tmp_path: Path, dataset: Store) -> None:
    rows = posts(range(3))
    rows[1]["image"], rows[2]["image"] = png(90, 60), b"broken"
    file, rules = write_raw(tmp_path / "r" / "one.parquet", rows), replace(RULES, downsize=48)
    ingest([file], dataset, rules)
    tier = dataset.read_table(f"images-48/{only(dataset)}.parquet").to_pylist()
    assert [row["id"] for row in tier] == ids(dataset) == ["danbooru:0", "danbooru:1"]
    assert tier[0] | {"image": None} == {"id": "danbooru:0", "image": None, "format": "PNG", "width": 40, "height": 40}
    assert tier[0]["image"] == png(seed=0), "small images are kept as delivered"
    assert (tier[1]["format"], tier[1]["width"], tier[1]["height"]) == ("JPEG", 72, 48)
    picture = decode(tier[1]["image"])
    assert isinstance(picture, Picture)
    assert picture.image.size == (72, 48)

    later = Store(str(tmp_path / "later"))
    ingest([file], later)
    plan = ingest([file], later, rules)
    assert (plan.todo, plan.tiers) == ({}, {only(later): "images-48 from images"})
    assert later.read(f"images-48/{only(later)}.parquet") == dataset.read(f"images-48/{only(dataset)}.parquet")
    assert ingest([file], later, rules).tiers == {}
    assert ingest([file], later, replace(rules, downsize_format="WEBP")).tiers != {}
    ingest([file], later, replace(RULES, limits=DecodeLimits(min_side=50)))
    assert later.shards("images-48") == [], "a tier with other rows is removed"


def test_an_admitted_reason_rejects_no_row(tmp_path: Path, dataset: Store) -> None:
    rows = posts(range(1), is_deleted=True, is_banned=False) + posts(range(1, 2), is_deleted=False, is_banned=True)
    file = write_raw(tmp_path / "r" / "one.parquet", rows)
    ingest([file], dataset)
    assert ids(dataset) == []
    ingest([file], dataset, replace(RULES, admit=("banned",)))
    assert ids(dataset) == ["danbooru:1"]
    assert dataset.tally(f"rejected/{only(dataset)}.parquet", "reason") == {"deleted": 1}


def test_a_row_with_an_unreadable_value_is_rejected_alone(tmp_path: Path, dataset: Store) -> None:
    table = pa.Table.from_pylist(posts(range(3)))
    beyond = pa.array([0, 2**62, 0]).cast(pa.timestamp("us"))
    text = pa.array([b"a", b"b", b"\xff\xfe"]).view(pa.string())
    table = table.append_column("created_at", beyond).set_column(2, "tag_string_general", text)
    path = tmp_path / "r" / "one.parquet"
    path.parent.mkdir()
    pq.write_table(table, path)
    ingest([str(path)], dataset)
    assert ids(dataset) == ["danbooru:0"]
    refused = dataset.read_table(f"rejected/{only(dataset)}.parquet").to_pylist()
    assert [(row["key"], row["reason"]) for row in refused] == [(f"{path}#{n}", "unreadable row") for n in (1, 2)]


@pytest.mark.parametrize(
    ("rows", "renamed", "said"),
    [
        (posts(range(1)), {"nope": "image"}, "no file has a column 'nope'"),
        ([{"id": 1, "a": b"", "b": b"", "tag_string": ""}], {"a": "image", "b": "image"}, "several of its columns"),
    ],
)
def test_a_mapping_without_effect_or_with_two_columns_for_a_field_is_refused(
    tmp_path: Path, dataset: Store, rows: list[dict[str, Any]], renamed: dict[str, str], said: str
) -> None:
    file = write_raw(tmp_path / "r" / "one.parquet", rows)
    with pytest.raises(UsageError, match=said):
        plan_shards([file], "auto", None, dataset, replace(RULES, renamed=tuple(renamed.items())))


def test_faults_tolerated_by_the_decoder_are_noted_in_the_row(tmp_path: Path, dataset: Store) -> None:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((40, 40)).convert("RGB").save(buffer, "PNG", icc_profile=b"no profile")
    ingest(
        [write_raw(tmp_path / "r" / "one.parquet", [*posts(range(1)), *posts(range(1, 2), image=buffer.getvalue())])],
        dataset,
    )
    notes = dataset.read_table(f"images/{only(dataset)}.parquet", ["notes"])["notes"].to_pylist()
    assert notes[0] is None
    assert "profile" in notes[1]


def test_a_picture_that_is_not_the_posts_original_file_is_noted(tmp_path: Path, dataset: Store) -> None:
    md5s = {1: hashlib.md5(png(seed=1)).hexdigest().upper(), 2: hashlib.md5(b"another").hexdigest(), 3: None}
    rows = [row | {"md5": md5} for number, md5 in md5s.items() for row in posts(range(number, number + 1))]
    rows[0]["image"] = png(seed=1)
    ingest([write_raw(tmp_path / "r" / "one.parquet", rows)], dataset)
    table = dataset.read_table(f"images/{only(dataset)}.parquet", ["id", "notes"])
    assert table["notes"].to_pylist() == [None, OTHER_MD5, None]


def test_files_carry_the_name_of_their_format_and_the_settings(tmp_path: Path, dataset: Store) -> None:
    ingest([write_raw(tmp_path / "r" / "one.parquet", posts(range(1)))], dataset, replace(RULES, downsize=16))
    for folder, schema in (("images", IMAGES), ("images-16", TIER)):
        metadata = dataset.metadata(f"{folder}/{only(dataset)}.parquet")
        assert len(metadata["fingerprint"]) == 64
        assert metadata["hdm.format"] == schema.metadata[b"hdm.format"].decode()
    assert json.loads(metadata["hdm.version"]) == SCHEMA_VERSION
