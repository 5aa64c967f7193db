"""Selections of a few rows: scores, texts, copies, what a rerun makes again, --plan, --explain and --diff.

Shards are processed one after the other in this process; test_jobs.py runs the job with Ray.
"""

import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import curate as job
from pipeline.core.errors import ShardsFailed, UsageError
from pipeline.core.records import CAPTIONS, IMAGES, POSTS, REJECTED, TAG_CATEGORIES
from pipeline.curation.command import curate_command
from pipeline.curation.compare import compare
from pipeline.curation.explain import explain
from pipeline.curation.plan import CurationInputs, plan_lines, read_inputs, rule_work
from pipeline.curation.selection import Curation, ShardWork
from pipeline.curation.stage_rules import Rules, ScoreRange, tag_rules, with_lists
from pipeline.curation.survey import quality_table
from pipeline.storage import lease as leases
from pipeline.storage import run_record
from pipeline.storage.content import content_digest
from pipeline.storage.manifest import Catalog
from pipeline.storage.shards import Store

RULES = Rules(min_side=100)
Row = dict[str, Any]


def image(name: str, **changes: Any) -> Row:
    """A row of IMAGES whose picture is unlike all others, with some columns changed."""
    content = hashlib.sha256(name.encode())
    tags = {f"tags_{category}": [] for category in TAG_CATEGORIES} | {"tags_general": ["sky"]}
    return {
        "id": name,
        "source": name.partition(":")[0],
        "image": b".",
        "format": "PNG",
        "width": 200,
        "height": 200,
        "sha256": content.hexdigest(),
        "phash": int.from_bytes(content.digest()[:8]),
        "rating": "general",
        "score": 1,
        "favourites": 5,
        "created_at": datetime(2015, 1, 1, tzinfo=UTC),
        **tags,
        "page": int(name.partition("_p")[2] or 0),
        "parent": None,
        "pixiv_id": None,
    } | changes


class Dataset:
    """A dataset in a folder, with captions for every row."""

    def __init__(self, root: Path) -> None:
        self.store = Store(str(root))
        self.done: list[str] = []  # "judging a", "writing a" ..., of the last curation
        self.tasks: list[str] = []  # work on all rows, of the last curation

    def add(self, shard: str, *rows: Row) -> None:
        name = f"{shard}.parquet"
        self.store.write_table(f"images/{name}", pa.Table.from_pylist(list(rows), IMAGES), IMAGES)
        captions = [
            {
                "id": row["id"],
                "caption": f"A %% picture of {row['id']}.",
                "engine": "",
                "model": "",
                "prompt_version": "",
            }
            for row in rows
        ]
        self.store.write_table(f"captions/{name}", pa.Table.from_pylist(captions, CAPTIONS), CAPTIONS)
        self.store.write_table(f"rejected/{name}", pa.Table.from_pylist([], REJECTED), REJECTED)

    def curation(self, rules: Rules = RULES, name: str = "test", renew: bool = False) -> Curation:
        return self._resolved(rules, name, renew)[0]

    def _resolved(self, rules: Rules, name: str, renew: bool) -> tuple[Curation, CurationInputs]:
        rules = with_lists(rules)
        inputs = read_inputs(self.store, rules)
        quality, borders = quality_table(self.store, f"selections/{name}", inputs, rules.preset, renew)
        self.store.write(f"selections/{name}/quality.json", borders.encode())
        return Curation(self.store.root, name, rules, tag_rules(rules), quality), inputs

    def curate(self, rules: Rules = RULES, name: str = "test", renew: bool = False) -> None:
        curation, inputs = self._resolved(rules, name, renew)
        self.done, self.tasks = [], []
        job.curate(curation, inputs, self, {"stage": "512"})

    def shards(
        self, work: Callable[[ShardWork], None], parts: dict[str, ShardWork], description: str
    ) -> dict[str, str]:
        failures = {}
        for shard, part in parts.items():
            try:
                work(part)
            except ValueError as error:
                failures[shard] = str(error)
            self.done.append(f"{description} {shard}")
        return failures

    def task(self, work: Callable[[], Any], memory: int, description: str) -> Any:
        self.tasks.append(description)
        return work()

    def rows(self, folder: str) -> dict[str, Row]:
        """The rows of all shards of a folder by id."""
        tables = (self.store.read_table(f"{folder}/{shard}.parquet") for shard in self.store.shards(folder))
        return {row.get("id") or row["key"]: row for table in tables for row in table.to_pylist()}

    def selected(self, name: str = "test") -> dict[str, Row]:
        return self.rows(f"selections/{name}")

    def reasons(self, name: str = "test") -> dict[str, str]:
        return {key: row["reason"] for key, row in self.rows(f"selections/{name}/rejected").items()}

    def record(self, name: str = "test") -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.store.read(f"selections/{name}/selection.json"))
        return found


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Neither flushes files to disk nor reads the versions of packages again for every selection."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        patch.setattr(run_record, "versions", cache(run_record.versions))
        yield


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "dataset")


# --- Scores -----------------------------------------------------------------------------------------------------------


def score(
    dataset: Dataset, scorer: str, shard: str, ids: list[str], model: str = "m", **labels: list[float | None]
) -> None:
    table = pa.table({"id": ids} | {label: pa.array(values, pa.float32()) for label, values in labels.items()})
    made_from = json.dumps({"model": model})
    dataset.store.write_table(f"scores/{scorer}/{shard}.parquet", table, table.schema, made_from=made_from)


def test_rows_are_refused_by_their_scores_and_a_missing_score_admits_nothing(dataset: Dataset) -> None:
    names = [f"danbooru:{number}" for number in range(3)]
    dataset.add("a", *map(image, names))
    score(dataset, "aesthetic", "a", names, good=[0.25, 0.5, None])
    dataset.curate(replace(RULES, scores={"aesthetic.good": ScoreRange(min=0.5)}))
    assert dataset.selected().keys() == {"danbooru:1"}
    details = {key: row["detail"] for key, row in dataset.rows("selections/test/rejected").items()}
    assert details == {"danbooru:0": "0.25, needs at least 0.5", "danbooru:2": "none, needs at least 0.5"}
    assert set(dataset.reasons().values()) == {"score aesthetic.good"}
    with pytest.raises(UsageError, match=r"no row is left for test: .* loosen its rules with --rules FILE"):
        dataset.curate(replace(RULES, scores={"aesthetic.good": ScoreRange(min=0.75)}))


def test_missing_scores_name_the_job_and_unknown_labels_list_the_known_ones(dataset: Dataset) -> None:
    dataset.add("a", image("danbooru:1"))
    rules = replace(RULES, scores={"aesthetic.good": ScoreRange(min=0.5)})
    with pytest.raises(UsageError, match=r"no scores/aesthetic, first a; run: python pipeline/score\.py --dataset"):
        dataset.curate(rules)
    score(dataset, "aesthetic", "a", ["danbooru:1"], fine=[1.0])
    with pytest.raises(UsageError, match="no label 'good'; its labels are fine"):
        dataset.curate(rules)


def test_scores_of_two_models_under_one_name_are_refused_if_a_rule_needs_them(dataset: Dataset) -> None:
    """A score.py that is stopped while it replaces the scores of another model leaves such a folder."""
    for shard, name, model in (("a", "danbooru:1", "old"), ("b", "danbooru:2", "new"), ("c", "danbooru:3", "new")):
        dataset.add(shard, image(name))
        score(dataset, "aesthetic", shard, [name], model, good=[1.0])
    dataset.curate()
    rules = replace(RULES, scores={"aesthetic.good": ScoreRange(min=0.5)})
    with pytest.raises(
        UsageError, match=r"scores of 2 models, for example in a and b; .*run: python pipeline/score\.py --"
    ):
        dataset.curate(rules)
    score(dataset, "aesthetic", "a", ["danbooru:1"], "new", good=[1.0])
    dataset.curate(rules)
    assert len(dataset.selected()) == 3


def test_scores_or_captions_of_other_rows_fail_their_shard_and_name_the_job_to_run(dataset: Dataset) -> None:
    dataset.add("a", image("danbooru:1"))
    dataset.add("b", image("danbooru:2"))
    for shard, name in (("a", "danbooru:1"), ("b", "danbooru:3")):
        score(dataset, "aesthetic", shard, [name], good=[1.0])
    with pytest.raises(ShardsFailed, match=r"b \(scores/aesthetic/b.parquet has other rows .*score\.py again"):
        dataset.curate(replace(RULES, scores={"aesthetic.good": ScoreRange(min=0.5)}))
    assert dataset.selected().keys() == {"danbooru:1"}
    assert not dataset.store.exists("selections/test/selection.json")
    captions = dataset.store.read_table("captions/a.parquet")
    dataset.store.write_table("captions/b.parquet", captions, CAPTIONS)
    with pytest.raises(ShardsFailed, match=r"captions/b.parquet has other rows .*caption\.py again"):
        dataset.curate()


# --- Texts ------------------------------------------------------------------------------------------------------------


def test_a_selected_row_has_its_texts_and_place(dataset: Dataset) -> None:
    tags = {"tags_general": ["1girl", "gray_hair", "very_long_hair"], "tags_meta": ["tagme", "highres"]}
    dataset.add("a", image("danbooru:1", width=1), image("danbooru:2", **tags, rating="questionable"))
    dataset.add("b", image("danbooru:3", created_at=datetime(2020, 1, 1, tzinfo=UTC)))
    dataset.curate()
    assert dataset.selected()["danbooru:2"] == {
        "id": "danbooru:2", "row": 1, "special": ["1girl"], "character": [], "copyright": [], "artist": [],
        "general": ["grey hair", "very long hair", "long hair"], "meta": ["highres"],
        "caption": "A picture of danbooru:2.", "quality": "worst quality", "era": "mid", "rating": "nsfw",
        "bookmarks": None, "views": None,
    }  # fmt: skip


def test_the_digest_depends_on_rows_and_not_on_their_memory_layout() -> None:
    rows = [{"a": ["x", "yz"], "b": None, "c": 1}, {"a": [], "b": "", "c": None}, {"a": ["x"], "b": "t", "c": 0}]
    table = pa.Table.from_pylist(rows)
    assert content_digest(pa.concat_tables([table.slice(0, 1), table.slice(1)])) == content_digest(table)
    assert content_digest(pa.concat_tables([table, table]).slice(3)) == content_digest(table)
    changed = [
        [rows[1], rows[0], rows[2]],
        [{**rows[0], "a": ["xy", "z"]}, *rows[1:]],
        [{**rows[0], "b": ""}, *rows[1:]],
        [{**rows[0], "c": None}, *rows[1:]],
    ]
    schema = table.schema
    assert len({content_digest(pa.Table.from_pylist(each, schema)) for each in [rows, *changed]}) == 5


def test_required_tags_admit_only_pictures_that_have_them(dataset: Dataset) -> None:
    tags = {1: ["sky", "blue_eyes"], 2: ["sky"], 3: ["blue_eyes"], 4: ["night"]}
    rows = [image(f"danbooru:{number}", tags_general=names) for number, names in tags.items()]
    dataset.add("a", *rows, image("danbooru:5", tags_character=["night"], tags_general=["sky"]))
    dataset.curate(replace(RULES, required_any=("blue eyes", "night")))
    assert dataset.selected().keys() == {"danbooru:1", "danbooru:3", "danbooru:4", "danbooru:5"}
    assert dataset.reasons() == {"danbooru:2": "lacks a required tag"}
    dataset.curate(replace(RULES, required_all=("sky", "blue_eyes")))
    assert dataset.selected().keys() == {"danbooru:1"}
    assert dataset.rows("selections/test/rejected")["danbooru:5"]["detail"] == "has sky"


def test_ids_works_artists_and_files_can_be_left_out(dataset: Dataset) -> None:
    file = image("danbooru:2")
    dataset.add(
        "a", image("danbooru:1"), file, image("danbooru:3", tags_artist=["some_body"]), image("danbooru:11"),
        image("pixiv:7_p0"), image("pixiv:7_p1"), image("pixiv:8_p0"), image("pixiv:8_p1"), image("pixiv:88_p0"),
    )  # fmt: skip
    left_out = ("danbooru:1", "pixiv:7", "pixiv:8_p1", "artist:some body", file["sha256"].upper())
    dataset.curate(replace(RULES, leave_out=left_out))
    assert dataset.selected().keys() == {"danbooru:11", "pixiv:8_p0", "pixiv:88_p0"}
    assert set(dataset.reasons().values()) == {"left out"}


@pytest.mark.parametrize("entry", ["7", "danbooru:x", "artist:", "pixiv:7_1", "abc"])
def test_an_entry_to_leave_out_that_is_not_understood_is_refused(entry: str) -> None:
    with pytest.raises(UsageError, match="is no danbooru:ID"):
        with_lists(replace(RULES, leave_out=(entry,)))


# --- Copies -----------------------------------------------------------------------------------------------------------


def test_a_refused_picture_does_not_displace_its_admitted_copy(dataset: Dataset) -> None:
    big = image("danbooru:1", width=400, height=400, rating="explicit")
    dataset.add("a", big, image("danbooru:2", phash=big["phash"]), image("danbooru:3", sha256=big["sha256"], width=90))
    dataset.curate(replace(RULES, ratings=("general",)))
    assert dataset.selected().keys() == {"danbooru:2"}
    assert dataset.reasons() == {"danbooru:1": "rating", "danbooru:3": "too small"}
    dataset.curate()
    assert dataset.selected().keys() == {"danbooru:1"}
    assert dataset.reasons() == {"danbooru:2": "duplicate", "danbooru:3": "too small"}


def test_the_first_admitted_row_of_an_id_in_several_shards_is_kept(dataset: Dataset) -> None:
    dataset.add("a", image("danbooru:1", width=5))
    dataset.add("b", image("danbooru:1"), image("danbooru:2"))
    dataset.add("c", image("danbooru:1", width=400))
    dataset.curate()
    tables = {
        shard: pq.read_table(dataset.store.path(f"selections/test/rejected/{shard}.parquet")).to_pylist()
        for shard in "abc"
    }
    assert [[row["reason"] for row in table] for table in tables.values()] == [["too small"], [], ["duplicate id"]]


def test_a_picture_on_both_sites_keeps_danboorus_tags_and_gets_pixivs_numbers(dataset: Dataset) -> None:
    """The post links to work 7, whose page 1 it is. Six bits differ, which is too many without the link."""
    page = image("pixiv:7_p1", favourites=900, score=8000, tags_general=["空"])
    post = image("danbooru:1", pixiv_id=7, phash=page["phash"] ^ 0b111111, tags_general=["blue_sky"])
    other = image("pixiv:7_p0", favourites=900, score=8000)
    dataset.add("danbooru", post)
    dataset.add("pixiv", other, page)
    dataset.curate()
    selected = dataset.selected()
    assert selected.keys() == {"danbooru:1", "pixiv:7_p0"}
    assert dataset.rows("selections/test/rejected")["pixiv:7_p1"]["detail"] == "of danbooru:1"
    assert selected["danbooru:1"]["general"] == ["blue sky", "sky"]
    assert [(row["bookmarks"], row["views"]) for row in selected.values()] == [(900, 8000), (900, 8000)]


def test_a_larger_picture_from_pixiv_is_kept_with_the_tags_of_its_best_copy_on_danbooru(dataset: Dataset) -> None:
    page = image("pixiv:7_p0", width=800, height=800, favourites=900, score=8000, tags_general=["空"])
    own = image("pixiv:8_p0", tags_general=["海"])
    small = image("danbooru:1", pixiv_id=7, phash=page["phash"], tags_general=["wrong"], tags_artist=["wrong"])
    post = small | image("danbooru:2", width=400, height=400, tags_general=["blue_sky", "1girl"], tags_meta=["highres"])
    post |= {"phash": page["phash"], "pixiv_id": 7}
    dataset.add("danbooru", image("danbooru:3"), small, post)
    dataset.add("pixiv", own, page)
    dataset.curate()
    selected = dataset.selected()
    assert selected.keys() == {"danbooru:3", "pixiv:7_p0", "pixiv:8_p0"}
    kept = selected["pixiv:7_p0"]
    assert [kept[part] for part in ("special", "artist", "general", "meta")] == [
        ["1girl"], [], ["blue sky", "sky"], ["highres"],
    ]  # fmt: skip
    assert (kept["bookmarks"], kept["views"]) == (900, 8000)
    assert selected["pixiv:8_p0"]["general"] == ["海"]

    dataset.add("danbooru", image("danbooru:3"), small, post | {"tags_general": ["night"]})
    dataset.curate()
    assert dataset.done == ["judging danbooru", "writing danbooru", "writing pixiv"]
    assert dataset.selected()["pixiv:7_p0"]["general"] == ["night"]


def test_the_selection_does_not_depend_on_the_order_in_which_shards_were_added(tmp_path: Path) -> None:
    rows = [
        image(f"danbooru:{number}", phash=1 << 40 | number // 2 << 8, width=200 + number % 7) for number in range(20)
    ]
    digests = set()
    for name, order in (("one", [0, 1, 2, 3]), ("two", [3, 1, 0, 2])):
        dataset = Dataset(tmp_path / name)
        for shard in order:
            dataset.add(f"shard-{shard}", *rows[shard::4])
            if shard == 1:
                dataset.curate()  # of some shards only: the later ones have copies of these
        dataset.curate()
        assert dataset.record()["rejected"].keys() == {"duplicate"}
        digests.add(dataset.record()["hash"])
    assert len(digests) == 1


# --- What a rerun makes again -----------------------------------------------------------------------------------------


def test_a_rerun_makes_again_only_what_depends_on_the_change(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = {shard: [image(f"danbooru:{shard}{number}") for number in range(10)] for shard in "123"}
    for shard, rows in shards.items():
        dataset.add(shard, *rows)
    dataset.curate()
    assert dataset.done == [*(f"judging {s}" for s in "123"), *(f"writing {s}" for s in "123")]
    first = dataset.record()
    dataset.curate()
    assert dataset.done == []
    assert dataset.record() == first

    dataset.add("4", *(image(f"danbooru:4{number}") for number in range(3)))  # a tenth: the borders are kept
    dataset.curate()
    assert dataset.done == ["judging 4", "writing 4"]

    dataset.add("4", image("danbooru:99", phash=shards["2"][0]["phash"], width=5000, height=5000))
    dataset.curate()
    assert dataset.done == ["judging 4", "writing 2", "writing 4"]
    assert dataset.reasons() == {"danbooru:20": "duplicate"}

    captions = dataset.store.read_table("captions/3.parquet").to_pylist()
    changed = pa.Table.from_pylist([row | {"caption": "Another."} for row in captions], CAPTIONS)
    dataset.store.write_table("captions/3.parquet", changed, CAPTIONS)
    dataset.curate()
    assert dataset.done == ["writing 3"]

    dataset.curate(replace(RULES, min_side=101))
    assert len(dataset.done) == 8
    assert "4 changed: rules (1, 2, 3 ...)" in capsys.readouterr().out
    dataset.curate(replace(RULES, min_side=101, blacklist=""))
    assert "4 changed: tag files (1, 2, 3 ...)" in capsys.readouterr().out


def test_captions_of_another_engine_are_chosen_by_name_and_recorded(dataset: Dataset) -> None:
    dataset.add("1", image("danbooru:1"))
    dataset.curate()
    with pytest.raises(UsageError, match=r"no captions/second.* --name second"):
        read_inputs(dataset.store, with_lists(RULES), captions_folder="captions/second")
    row = {"id": "danbooru:1", "caption": "By another.", "engine": "", "model": "", "prompt_version": ""}
    dataset.store.write_table("captions/second/1.parquet", pa.Table.from_pylist([row], CAPTIONS), CAPTIONS)
    curation = replace(dataset.curation(), captions="captions/second")
    inputs = read_inputs(dataset.store, curation.rules, captions_folder="captions/second")
    dataset.done = []
    job.curate(curation, inputs, dataset, {"stage": "512"})
    assert dataset.done == ["writing 1"]
    assert dataset.store.read_table("selections/test/1.parquet")["caption"].to_pylist() == ["By another."]
    assert dataset.record()["captions"] == "captions/second"


def test_a_new_scorer_or_score_remakes_only_selections_that_use_it(dataset: Dataset) -> None:
    names = ["danbooru:1", "danbooru:2"]
    for shard, name in zip("ab", names, strict=True):
        dataset.add(shard, image(name))
        score(dataset, "aesthetic", shard, [name], good=[1.0])
    dataset.curate()
    score(dataset, "aesthetic", "a", names[:1], good=[0.5])
    dataset.curate()
    assert dataset.done == []
    rules = replace(RULES, scores={"aesthetic.good": ScoreRange(min=0.1)})
    dataset.curate(rules)
    assert len(dataset.done) == 4
    score(dataset, "aesthetic", "a", names[:1], good=[0.75])
    dataset.curate(rules)
    assert dataset.done == ["judging a", "writing a"]


def test_a_lost_file_is_made_again_and_one_whose_images_are_gone_is_removed(dataset: Dataset) -> None:
    dataset.add("a", image("danbooru:1"))
    dataset.add("b", image("danbooru:2"))
    dataset.add("c", *(image(f"danbooru:{number}") for number in range(3, 60)))
    dataset.curate()
    dataset.store.remove("selections/test/a.parquet")
    dataset.store.remove("selections/test/judged/c.parquet")
    dataset.curate()
    assert dataset.done == ["judging c", "writing a"]
    dataset.store.remove("images/b.parquet")
    dataset.curate()
    assert dataset.done == []
    assert dataset.record()["shards"] == {"a": 1, "c": 57}
    for folder in ("", "/judged", "/rejected"):
        assert dataset.store.shards(f"selections/test{folder}") == ["a", "c"]


def test_quality_borders_are_kept_until_the_dataset_outgrows_them(dataset: Dataset) -> None:
    dataset.add("a", *(image(f"danbooru:{number}", favourites=number) for number in range(100)))
    dataset.add("z", image("danbooru:1000", created_at=datetime(2020, 1, 1, tzinfo=UTC)))
    borders = dataset.curation().quality.borders["danbooru", "general", 2015]
    assert borders == (89, 74, 59, 44, 29, 9)
    dataset.add("b", *(image(f"danbooru:{number}", favourites=500) for number in range(100, 110)))
    assert dataset.curation().quality.borders["danbooru", "general", 2015] == borders
    assert dataset.curation(renew=True).quality.borders["danbooru", "general", 2015] > borders
    kept = dataset.curation().quality
    dataset.add("c", *(image(f"danbooru:{number}", favourites=900) for number in range(110, 130)))
    grown = dataset.curation().quality
    assert grown.borders["danbooru", "general", 2015] > kept.borders["danbooru", "general", 2015]
    dataset.add("d", image("pixiv:1_p0"))
    assert ("pixiv", None, None) in dataset.curation().quality.borders
    assert dataset.curation(replace(RULES, preset="noobai")).quality.words[2] == "good quality"


DAMAGED = [
    b"", b'{"rows": 1', b"\xff", b"[]", b"{}", b'{"rows": null, "words": [], "settled_before": null, "cells": []}',
    b'{"rows": 1, "words": ["a"], "settled_before": "?", "cells": []}',
    b'{"rows": 1, "words": ["a"], "settled_before": null, "cells": [7]}',
]  # fmt: skip


def test_damaged_quality_borders_are_refused_and_new_quality_repairs_them(dataset: Dataset) -> None:
    dataset.add("a", image("danbooru:1"))
    dataset.curate()
    for damage in DAMAGED:
        dataset.store.write("selections/test/quality.json", damage)
        with pytest.raises(UsageError, match=r"quality\.json is damaged .* --new-quality$"):
            dataset.curation()
    dataset.curate(renew=True)
    dataset.curate()
    assert dataset.done == []


def test_a_plan_lists_what_would_be_done_and_writes_nothing(dataset: Dataset) -> None:
    dataset.add("a", image("danbooru:1"))

    def planned(rules: Rules = RULES) -> str:
        before = {path: path.stat().st_mtime_ns for path in Path(dataset.store.root).rglob("*") if path.is_file()}
        inputs = read_inputs(dataset.store, rules)
        quality, _ = quality_table(dataset.store, "selections/test", inputs, rules.preset, False)
        lines = list(plan_lines(Curation(dataset.store.root, "test", rules, tag_rules(rules), quality), inputs))
        assert before == {p: p.stat().st_mtime_ns for p in Path(dataset.store.root).rglob("*") if p.is_file()}
        return "\n".join([*lines, ""])

    assert "judging 1 of 1 shards: 1 new (a)" in planned()
    dataset.curate()
    assert "judging 0 of 1 shards\n" in planned()
    assert "writing 0 of 1 shards\n" in planned()
    rules = replace(RULES, min_side=50)
    assert "judging 1 of 1 shards: 1 changed: rules (a)" in planned(rules)
    dataset.add("b", image("danbooru:2"))
    dataset.curate(rules)
    dataset.store.remove("images/b.parquet")
    assert "would remove selections/test/judged/b.parquet: its images are gone" in planned(rules)


# --- Questions --------------------------------------------------------------------------------------------------------


def test_inputs_are_listed_once_the_job_has_the_lease(
    call_job: Callable[..., "subprocess.CompletedProcess[str]"], monkeypatch: pytest.MonkeyPatch, dataset: Dataset
) -> None:
    @contextmanager
    def late(store: Store, folder: str, job: str) -> Iterator[None]:
        store.remove("captions/b.parquet")
        yield

    dataset.add("a", image("danbooru:1"))
    dataset.add("b", image("danbooru:2"))
    monkeypatch.setattr(leases, "lease", late)
    refused = call_job("pipeline/curate.py", "--dataset", dataset.store.root)
    assert refused.returncode == 2
    assert "1 of 2 shards have no captions, first b" in refused.stderr


def explained(dataset: Dataset, name: str, rules: Rules = RULES) -> str:
    curation = dataset.curation(rules)
    return "\n".join(explain(curation, dataset.store.shards("images"), [name]))


def test_explain_lists_each_rule_with_its_value_the_borders_and_the_kept_copy(dataset: Dataset) -> None:
    small = image("danbooru:2", width=90, height=95, tags_artist=["some_one"])
    dataset.add("a", image("danbooru:1", width=800, height=800), small)
    late = image("danbooru:4", created_at=datetime(2020, 1, 1, tzinfo=UTC))
    dataset.add("b", image("danbooru:3", sha256=image("danbooru:1")["sha256"]), late)
    text = explained(dataset, "danbooru:2")
    assert "danbooru:2, row 1 of a" in text
    assert "refuses min_side: 90 pixels; at least 100" in text
    assert "admits  artists: some one;" in text
    assert "favourites 5 among danbooru: masterpiece > 5, " in text
    assert text.endswith("out: too small (90 x 95, needs 100)")
    assert "is not made yet" in explained(dataset, "danbooru:3")
    dataset.curate()
    assert explained(dataset, "danbooru:3").endswith("duplicate (of danbooru:1)")
    assert explained(dataset, "danbooru:1").endswith("in: it is in selections/test")


def test_explain_reports_rows_that_the_selection_does_not_know_yet(dataset: Dataset) -> None:
    dataset.add("a", image("danbooru:1"))
    dataset.curate()
    dataset.add("a", image("danbooru:2"), image("danbooru:1"))
    for name in ("danbooru:1", "danbooru:2"):
        line = explained(dataset, name).splitlines()[-1]
        assert "admitted; selections/test does not know it: its a was made from other images; run: python" in line
        assert line.endswith(f"--dataset {dataset.store.root} --stage 512 --name test")
    dataset.curate()
    for name in ("danbooru:1", "danbooru:2"):
        assert explained(dataset, name).endswith("in: it is in selections/test")


@pytest.mark.parametrize(
    ("name", "asked", "options"),
    [
        ("512", None, "--stage 512"),
        ("512", {"stage": "512", "preset": None, "rules": None}, "--stage 512"),
        ("512", {"stage": "demo"}, "--stage demo --name 512"),
        ("mine", {"stage": "512", "preset": "noobai", "rules": "my rules.toml"},
         "--stage 512 --preset noobai --rules 'my rules.toml' --name mine"),
        ("mine", None, "--stage STAGE --name mine"),
    ],
)  # fmt: skip
def test_the_command_that_repeats_a_selection_has_its_recorded_flags(
    tmp_path: Path, name: str, asked: dict[str, str] | None, options: str
) -> None:
    store = Store(str(tmp_path))
    if asked:
        store.write(f"selections/{name}/run.json", json.dumps(asked).encode())
    assert curate_command(store, name) == f"python pipeline/curate.py --dataset {tmp_path} {options}"


def test_explain_finds_rows_that_ingest_refused_and_rejects_unknown_ids(dataset: Dataset) -> None:
    dataset.add("a", image("danbooru:1"))
    broken = {"key": "danbooru:5", "reason": "truncated", "detail": "at byte 7", "sha256": None}
    dataset.store.write_table("rejected/gone.parquet", pa.Table.from_pylist([broken], REJECTED), REJECTED)
    assert explained(dataset, "danbooru:5") == "danbooru:5 of gone: refused by ingest: truncated (at byte 7)"
    with pytest.raises(UsageError, match="knows no picture danbooru:6"):
        explained(dataset, "danbooru:6")


def test_compare_counts_by_reason_and_names_ids(dataset: Dataset) -> None:
    dataset.add("a", image("danbooru:1", rating="explicit"), image("danbooru:2"), image("danbooru:3", width=90))
    dataset.add("b", image("danbooru:4", tags_general=["very_long_hair"]), image("danbooru:5", rating="explicit"))
    dataset.curate(replace(RULES, ratings=("general",), min_side=50), "tame")
    dataset.curate(replace(RULES, implied="keep"), "wild")
    assert list(compare(dataset.store, "tame", "wild")) == [
        "only in tame: 1",
        "  1 too small: danbooru:3",
        "only in wild: 2",
        "  2 rating: danbooru:1, danbooru:5",
        "in both, with another text: 1",
        "  1 general: danbooru:4",
    ]
    assert list(compare(dataset.store, "wild", "wild"))[::2] == ["only in wild: 0", "in both, with another text: 0"]
    with pytest.raises(UsageError, match="no finished selection 'calm'; run: python"):
        list(compare(dataset.store, "tame", "calm"))


def test_compare_names_five_rows_of_a_kind_and_counts_a_row_with_several_changed_texts_once(dataset: Dataset) -> None:
    def image_of(number: int) -> Row:
        return image(f"danbooru:{number}", width=90 + 20 * (number % 2), tags_artist=["x"], tags_general=["x"])

    for shard in range(3):
        dataset.add(str(shard), *map(image_of, range(4 * shard, 4 * shard + 4)))
    dataset.curate(replace(RULES, min_side=50), "all")
    (Path(dataset.store.root) / "x.txt").write_text("x -> y")
    dataset.curate(replace(RULES, aliases=f"{dataset.store.root}/x.txt"), "large")
    assert list(compare(dataset.store, "all", "large")) == [
        "only in all: 6",
        "  6 too small: danbooru:0, danbooru:2, danbooru:4, danbooru:6, danbooru:8 ...",
        "only in large: 0",
        "in both, with another text: 6",
        "  6 artist: danbooru:1, danbooru:3, danbooru:5, danbooru:7, danbooru:9 ...",
        "  6 general: danbooru:1, danbooru:3, danbooru:5, danbooru:7, danbooru:9 ...",
    ]
    dataset.store.remove("images/2.parquet")
    dataset.curate(RULES, "large")
    assert list(compare(dataset.store, "all", "large"))[:3] == [
        "only in all: 8",
        "  4 too small: danbooru:0, danbooru:2, danbooru:4, danbooru:6",
        "  4 its shard is gone: danbooru:8, danbooru:9, danbooru:10, danbooru:11",
    ]


def test_the_provenance_of_a_shard_names_every_input(dataset: Dataset) -> None:
    dataset.add("a", image("danbooru:1"))
    dataset.curate()
    made = json.loads(dataset.store.metadata("selections/test/a.parquet")["made_from"])
    assert made.keys() == {"code", "rules", "tag files", "quality", "images", "captions", "copies"}
    assert dataset.record()["rules"] == json.loads(json.dumps(asdict(RULES)))
    curation = dataset.curation()
    work = rule_work(curation, read_inputs(dataset.store, RULES))
    assert work["a"].provenance.items() <= made.items()


# --- What has changed on the site since -------------------------------------------------------------------------------


def refresh(dataset: Dataset, shard: str, *rows: Row) -> None:
    """Writes posts/<shard>: the rows of its images with some columns changed."""
    columns = [name for name in POSTS.names if name != "deleted"]
    images = dataset.store.read_table(f"images/{shard}.parquet", columns).to_pylist()
    posts = pa.Table.from_pylist([{"deleted": False} | old | new for old, new in zip(images, rows, strict=True)], POSTS)
    about = {"made_from": json.dumps({"images": identity(dataset, shard)}), "digest": content_digest(posts)}
    dataset.store.write_table(f"posts/{shard}.parquet", posts, POSTS, **about)


def identity(dataset: Dataset, shard: str) -> str:
    return Catalog(dataset.store).images()[shard].digest


def test_refreshed_posts_replace_what_ingest_read_and_deleted_ones_are_refused(dataset: Dataset) -> None:
    dataset.add("a", image("danbooru:1"), image("danbooru:2"), image("danbooru:3"))
    dataset.add("b", image("danbooru:4"))
    dataset.curate(replace(RULES, implied="keep"))
    before = dataset.selected()
    refresh(dataset, "a", {"rating": "explicit", "tags_general": ["night"]}, {"deleted": True}, {"tags_meta": ["scan"]})
    dataset.curate(replace(RULES, implied="keep"))
    assert dataset.done == ["judging a", "writing a"]
    assert dataset.reasons() == {"danbooru:2": "deleted"}
    changed = {"danbooru:1": {"rating": "explicit, nsfw", "general": ["night"]}, "danbooru:3": {"meta": ["scan"]}}
    expected = {name: row | changed.get(name, {}) for name, row in before.items() if name != "danbooru:2"}
    assert dataset.selected() == expected
    lines = explained(dataset, "danbooru:2")
    assert "refuses deleted: yes" in lines
    assert "deleted" not in explained(dataset, "danbooru:4")

    refresh(dataset, "a", {"tags_general": ["comic"]}, {}, {})
    dataset.curate(replace(RULES, excluded=("comic",), ratings=("general",), implied="keep"))
    assert dataset.reasons() == {"danbooru:1": "tag comic"}


def test_refreshed_favourites_decide_quality_words_and_pixivs_numbers(dataset: Dataset) -> None:
    page = image("pixiv:7_p0", favourites=1)
    dataset.add("a", *(image(f"danbooru:{number}", favourites=number) for number in range(1, 100)))
    dataset.add("b", page, image("danbooru:100", phash=page["phash"], width=300, height=300))
    dataset.add("c", image("danbooru:101", created_at=datetime(2020, 1, 1, tzinfo=UTC)))  # the others are settled
    dataset.curate(renew=True)
    refresh(dataset, "a", *({"favourites": 1000 - number} for number in range(1, 100)))
    refresh(dataset, "b", {"favourites": 900, "score": 8000}, {})
    dataset.curate(renew=True)
    selected = dataset.selected()
    assert [selected[f"danbooru:{number}"]["quality"] for number in (1, 99)] == ["masterpiece", "worst quality"]
    assert (selected["danbooru:100"]["bookmarks"], selected["danbooru:100"]["views"]) == (900, 8000)


def test_a_refresh_that_changes_nothing_remakes_nothing_but_one_that_does_not_fit_is_refused(dataset: Dataset) -> None:
    dataset.add("a", image("danbooru:1"))
    refresh(dataset, "a", {"favourites": 6})
    dataset.curate()
    refresh(dataset, "a", {"favourites": 6})
    dataset.curate()
    assert dataset.done == []
    dataset.add("a", image("danbooru:2"))
    with pytest.raises(
        UsageError, match=r"ingested again after their posts, first a; run: .*ingest\.py --refresh PATH"
    ):
        dataset.curate()


# --- Work on all rows -------------------------------------------------------------------------------------------------


def test_copies_are_searched_again_only_if_rows_or_rules_have_changed(dataset: Dataset) -> None:
    dataset.add("a", image("danbooru:1"))
    dataset.add("b", image("danbooru:2", phash=image("danbooru:1")["phash"]))
    dataset.curate()
    assert dataset.tasks == ["looking for copies"]
    captions = dataset.store.read_table("captions/b.parquet").to_pylist()
    changed = pa.Table.from_pylist([row | {"caption": "Another."} for row in captions], CAPTIONS)
    dataset.store.write_table("captions/b.parquet", changed, CAPTIONS)
    dataset.curate()
    assert (dataset.done, dataset.tasks) == (["writing b"], [])
    dataset.add("c", image("danbooru:3"))
    dataset.curate()
    assert (dataset.done, dataset.tasks) == (["judging c", "writing c"], ["looking for copies"])
    assert dataset.store.shards("selections/test/copies") == ["b"]
    dataset.store.remove("selections/test/copies/b.parquet")
    dataset.curate()
    assert (dataset.done, dataset.tasks) == ([], ["looking for copies"])
    dataset.store.remove("images/b.parquet")
    dataset.curate()
    assert dataset.store.shards("selections/test/copies") == []


def test_the_original_is_kept_and_not_its_enlarged_copy(dataset: Dataset) -> None:
    small = image("danbooru:2", tags_meta=["highres"])
    big = image("danbooru:1", width=800, height=800, tags_meta=["upscaled"]) | {"phash": small["phash"]}
    dataset.add("a", big, small, image("danbooru:3", tags_meta=["upscaled"]))
    dataset.curate()
    assert dataset.selected().keys() == {"danbooru:2", "danbooru:3"}
    assert dataset.rows("selections/test/rejected")["danbooru:1"]["detail"] == "of danbooru:2"


def test_parents_and_children_are_variants_unless_one_is_tagged_as_a_copy(dataset: Dataset) -> None:
    parent = image("danbooru:1", phash=1 << 40)
    child = image("danbooru:2", phash=1 << 40, parent="danbooru:1")
    resized = image("danbooru:3", phash=1 << 40, parent="danbooru:1", tags_meta=["resized"])
    same_file = image("danbooru:4", sha256=parent["sha256"], parent="danbooru:1")
    dataset.add("a", parent, child, resized, same_file)
    dataset.curate()
    assert dataset.selected().keys() == {"danbooru:1", "danbooru:2"}


def test_near_copies_can_be_switched_off_and_too_many_of_them_are_reported(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [image(f"danbooru:{number}", phash=1 << 40) for number in range(1, 14)]
    dataset.add("a", *rows, image("danbooru:20", sha256=rows[0]["sha256"]))
    dataset.curate()
    assert dataset.selected().keys() == {"danbooru:1"}
    warned = capsys.readouterr().out
    assert "WARNING: 85.7% of the rows (12) are near copies of others" in warned
    assert "WARNING: 12 rows are near copies of danbooru:1. Look at some in the section Duplicates" in warned
    dataset.curate(replace(RULES, near_copies=-1))
    assert len(dataset.selected()) == 13
    assert dataset.reasons() == {"danbooru:20": "duplicate"}
    assert "WARNING" not in capsys.readouterr().out


def test_thumbnails_tell_apart_what_the_hash_does_not(dataset: Dataset) -> None:
    grey = bytes([128]) * 1536
    red = grey[:-1] + b"\xff"
    rows = [
        image(f"danbooru:{number}", phash=1 << 40, thumbnail=each)
        for number, each in enumerate((grey, red, grey, None))
    ]
    dataset.add("a", *rows)
    dataset.curate()
    assert dataset.reasons() == {"danbooru:2": "duplicate", "danbooru:3": "duplicate"}, "the last has no thumbnail"


def test_shards_of_earlier_versions_have_no_thumbnails(dataset: Dataset) -> None:
    dataset.add("a", image("danbooru:1", phash=1 << 40), image("danbooru:2", phash=1 << 40))
    dataset.add("b", image("danbooru:3", phash=1 << 40, thumbnail=bytes([128]) * 1536))
    path = dataset.store.path("images/a.parquet")
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["thumbnail"]).replace_schema_metadata(table.schema.metadata), path)
    dataset.curate()
    assert dataset.reasons() == {"danbooru:2": "duplicate", "danbooru:3": "duplicate"}


def test_variants_of_one_post_are_kept_and_the_end_of_a_chain_as_well(dataset: Dataset) -> None:
    first = image("danbooru:1", phash=1 << 40, tags_meta=["variant_set"])
    variant = image("danbooru:2", phash=1 << 40 | 1, tags_meta=["variant_set"], parent="danbooru:1")
    copy = image("danbooru:3", phash=1 << 40 | 1 << 1)
    chained = image("danbooru:4", phash=1 << 40 | 0b111111 << 1)
    dataset.add("a", first, variant, copy, chained)
    dataset.curate()
    assert dataset.selected().keys() == {"danbooru:1", "danbooru:2", "danbooru:4"}
    assert dataset.rows("selections/test/rejected")["danbooru:3"]["detail"] == "of danbooru:1"
