"""The report counts what is there, shows the same examples in every run, and never executes a text of the dataset."""

import base64
import hashlib
import io
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import report
from pipeline.core.errors import JobFailed, UsageError
from pipeline.core.records import CAPTIONS, IMAGES, POSTS, REJECTED, SELECTION, TAG_CATEGORIES, TEXT_CATEGORIES, TIER
from pipeline.reporting import counts, report_page
from pipeline.reporting.census import SOURCES, take_census
from pipeline.reporting.findings import Findings, duplicate_pairs, survey
from pipeline.reporting.measures import CAPTION_WORDS, IMAGE_MEASURES, Measure
from pipeline.reporting.report_page import funnel, render
from pipeline.storage.shards import Store

ATTACK = "</script><img src=x onerror=alert(1)>\"'&{{7*7}}\u202e"


def picture(seed: int, side: int = 24) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def post(number: int, **fields: Any) -> dict[str, Any]:
    """A row of images/. Its number determines every field that is not given."""
    draw = random.Random(number)
    tags = {
        f"tags_{category}": sorted({f"{category}_{draw.randrange(9)}" for _ in range(4)}) for category in TAG_CATEGORIES
    }
    return {
        "id": f"danbooru:{number}",
        "source": draw.choice(["danbooru", "pixiv", "elsewhere"]),
        "image": picture(number),
        "format": draw.choice(["PNG", "JPEG"]),
        "width": draw.randrange(30, 5000),
        "height": draw.randrange(30, 5000),
        "sha256": f"{number:064}",
        "phash": number,
        "rating": draw.choice(["general", "sensitive", "questionable", "explicit", None]),
        "score": draw.choice([None, -3, 0, 1, 700]),
        "favourites": draw.randrange(2000),
        "created_at": draw.choice([None, datetime(draw.randrange(1990, 2055), 7, 1, tzinfo=UTC)]),
        **tags,
        "page": 0,
        "parent": None,
        "pixiv_id": None,
    } | fields  # fmt: skip


def caption(row: dict[str, Any], text: str | None = "a red house", reason: str | None = None) -> dict[str, Any]:
    return {"id": row["id"], "caption": text, "reason": reason, "engine": "tags", "model": "", "prompt_version": "1"}


def selected(row: dict[str, Any], number: int, quality: str | None = "masterpiece") -> dict[str, Any]:
    texts: dict[str, list[str]] = {category: [] for category in TEXT_CATEGORIES}
    return {"id": row["id"], "row": number, **texts, "caption": "", "quality": quality, "era": None, "rating": "safe"}


def refused(key: str, reason: str, detail: str = "") -> dict[str, Any]:
    return {"key": key, "reason": reason, "detail": detail, "sha256": None}


def write(store: Store, name: str, rows: Sequence[dict[str, Any]], schema: pa.Schema, group: int = 7) -> None:
    table = pa.Table.from_pylist(list(rows), schema)
    with store.writing_table(f"{name}.parquet", schema) as append:
        for start in range(0, len(rows), group):
            append(table.slice(start, group))


def write_dataset(store: Store, shards: int = 3, rows: int = 40) -> dict[str, list[dict[str, Any]]]:
    """A dataset with two selections. The first row of each shard is a duplicate of the last row of the last shard."""
    images = {f"part-{shard}": [post(shard * rows + row) for row in range(rows)] for shard in range(shards)}
    last = f"danbooru:{shards * rows - 1}"
    for shard, posts in images.items():
        write(store, f"images/{shard}", posts, IMAGES)
        write(store, f"rejected/{shard}", [refused(f"raw#{n}", "truncated", "at byte 9") for n in range(5)], REJECTED)
        captions = [caption(row) if n % 4 else caption(row, None, "no tags") for n, row in enumerate(posts)]
        write(store, f"captions/{shard}", captions, CAPTIONS)
        for name, every in (("demo", 2), ("1024", 5)):
            kept = [selected(row, n) for n, row in enumerate(posts) if n % every == 1]
            out = [refused(row["id"], "too small", "9 x 9") for n, row in enumerate(posts) if n and n % every != 1]
            out.append(refused(posts[0]["id"], "duplicate", f"of {last}"))
            write(store, f"selections/{name}/{shard}", kept, SELECTION)
            write(store, f"selections/{name}/rejected/{shard}", out, REJECTED)
    for name in ("demo", "1024"):
        store.write(f"selections/{name}/selection.json", b"{}")
    return images


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "dataset"))


@dataclass(frozen=True)
class Surveyed:
    store: Store
    images: dict[str, list[dict[str, Any]]]  # rows by shard
    findings: Findings
    page: "Page"


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory: pytest.TempPathFactory) -> Surveyed:
    """A dataset that no test changes, and its report."""
    store = Store(str(tmp_path_factory.mktemp("surveyed") / "dataset"))
    images = write_dataset(store)
    findings = survey(store)
    return Surveyed(store, images, findings, Page(render(findings)))


class Page(HTMLParser):
    """The page as a browser parses it: elements with their attributes, texts of scripts, and other texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.in_script = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_script = False

    def handle_data(self, data: str) -> None:
        if self.in_script:
            self.scripts[-1] += data
        else:
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_census_equals_a_count_by_hand(surveyed: Surveyed) -> None:
    images = surveyed.images
    census = take_census(surveyed.store, ["1024", "demo"], [])
    for view, every in enumerate((1, 5, 2)):
        posts = [p for shard in images.values() for n, p in enumerate(shard) if n % every == 1 or every == 1]
        assert census.rows[view] == len(posts)
        for category in TAG_CATEGORIES:
            expected = Counter(tag for p in posts for tag in p[f"tags_{category}"])
            tags, _ = census.tags[category].top(100)
            assert {tag: counts[view] for tag, *counts in tags} == {tag: expected[tag] for tag, *_ in tags}
            assert len(tags) >= len(expected)
        years = Counter(p["created_at"].year for p in posts if p["created_at"])
        [measure] = [measure for measure in IMAGE_MEASURES if measure.name == "year"]
        counted = census.histograms["year"][view].sum(axis=0)
        assert counted.sum() == years.total()
        assert counted[0] == sum(count for year, count in years.items() if year < measure.edges[0])
        assert counted[-1] == sum(count for year, count in years.items() if year >= measure.edges[-1])
        assert counted[measure.edges.index(2020) + 1] == years[2020]
        sides = [(p["width"], p["height"]) for p in posts]
        values = {
            "megapixels": [width * height / 1e6 for width, height in sides],
            "short_side": [min(width, height) for width, height in sides],
            "aspect": [width / height for width, height in sides],
            "score": [np.nan if p["score"] is None else p["score"] for p in posts],
            "favourites": [p["favourites"] for p in posts],
            "year": [p["created_at"].year if p["created_at"] else np.nan for p in posts],
            "tags": [sum(len(p[f"tags_{category}"]) for category in TAG_CATEGORIES) for p in posts],
        }
        for measure in IMAGE_MEASURES:
            bins = measure.bin_of(np.array(values[measure.name], float))
            expected_bins = np.bincount(bins[bins >= 0], minlength=measure.bins)
            assert census.histograms[measure.name][view].sum(axis=0).tolist() == expected_bins.tolist(), measure.name
        by_source = Counter(p["source"] if p["source"] in SOURCES else "other" for p in posts)
        assert census.histograms["megapixels"][view].sum(axis=1).tolist() == [by_source[name] for name in SOURCES]
    rating = Counter("none" if p["rating"] is None else p["rating"] for shard in images.values() for p in shard)
    assert census.words[0, "rating"] == rating
    assert census.words[2, "quality"] == {"masterpiece": 60}
    assert census.captions == {"captioned": 90, "no tags": 30}
    assert census.histograms["words"][0].sum() == 90


def test_rows_in_are_rows_out_and_rejected_at_every_step(surveyed: Surveyed) -> None:
    raw, ingested, captioned, *selections = funnel(surveyed.findings)
    assert raw.rows == 135
    assert [(share.label, share.count) for share in ingested.lost] == [("truncated", 15)]
    assert [(share.label, share.count) for share in captioned.lost] == [("no tags", 30)]
    assert [step.title for step in selections] == ["Selection demo", "Selection 1024"]
    for step in (captioned, *selections):
        assert step.rows + sum(share.count for share in step.lost) == ingested.rows == 120
        assert step.command is None


def test_ratings_tags_and_votes_are_those_of_the_last_refresh_as_in_curate(store: Store) -> None:
    images = write_dataset(store, shards=2, rows=20)
    before = take_census(store, ["demo"], ["danbooru:3"])
    fresh = {"rating": "explicit", "score": 2_000_000, "favourites": None, "tags_general": ["fresh"], "deleted": False}
    posts = [{name: (row | fresh)[name] for name in POSTS.names} for row in images["part-0"]]
    write(store, "posts/part-0", posts, POSTS)
    after = take_census(store, ["demo"], ["danbooru:3"])
    assert ("fresh", 20, 10) in after.tags["general"].top(50)[0]
    assert after.words[0, "rating"]["explicit"] == 20 + sum(row["rating"] == "explicit" for row in images["part-1"])
    [votes] = [measure for measure in IMAGE_MEASURES if measure.name == "score"]
    assert after.histograms["score"][0, :, votes.bin_of(np.array([2e6]))].sum() == 20
    assert after.histograms["favourites"][0].sum() == 20
    assert after.places["danbooru:3"].rating == "explicit"
    assert (after.histograms["megapixels"] == before.histograms["megapixels"]).all()
    write(store, "posts/part-0", posts[1:], POSTS)
    with pytest.raises(UsageError, match=r"posts/part-0\.parquet has other rows .*run ingest\.py --refresh"):
        survey(store)
    store.write("posts/part-0.parquet", b"PAR1")
    with pytest.raises(JobFailed, match=r"cannot read .*images/part-0\.parquet or .*posts/part-0\.parquet: "):
        survey(store)


def test_the_pictures_are_not_read_for_the_census(store: Store) -> None:
    write_dataset(store, shards=1, rows=10)
    before = take_census(store, ["demo"], [])
    path = Path(store.path("images/part-0.parquet"))
    footer = pq.read_metadata(path)
    data = bytearray(path.read_bytes())
    for group in range(footer.num_row_groups):
        column = footer.row_group(group).column(IMAGES.get_field_index("image"))
        start = column.dictionary_page_offset or column.data_page_offset
        data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    after = take_census(store, ["demo"], [])
    assert after.words == before.words
    assert after.tags["general"].top(50) == before.tags["general"].top(50)
    with pytest.raises(JobFailed, match=r"cannot read .*part-0"):
        survey(store)


def test_examples_are_the_same_in_every_run_and_have_the_reasons_they_stand_for(surveyed: Surveyed) -> None:
    store, first, again = surveyed.store, surveyed.findings, survey(surveyed.store)
    assert first.pictures == again.pictures
    assert [s.kept for s in first.selections] == [s.kept for s in again.selections]
    demo = first.selections[0]
    assert demo.name == "demo"
    assert len(set(demo.kept)) == 24
    for reason in ("too small", "duplicate"):
        rows = pa.concat_tables(store.read_table(f"selections/demo/rejected/part-{n}.parquet") for n in range(3))
        keys = {row["key"] for row in rows.to_pylist() if row["reason"] == reason}
        assert {example.key for example in demo.rejections.examples[reason]} <= keys
    assert set(duplicate_pairs(first.selections)) == {(f"danbooru:{n}", "danbooru:119") for n in (0, 40, 80)}
    assert {"danbooru:0", "danbooru:119", *demo.kept} <= set(first.pictures)


@pytest.mark.parametrize("tier", [False, True])
def test_a_thumbnail_belongs_to_its_row(store: Store, tier: bool) -> None:
    colours = ["#ff0000", "#00ff00", "#0000ff", "#ffff00"] * 6
    posts = []
    for number, colour in enumerate(colours):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 40), colour).save(buffer, "PNG")
        posts.append(post(number, image=buffer.getvalue()))
    if tier:
        write(store, "images-64/one", [{name: row[name] for name in TIER.names} for row in posts], TIER, group=9)
        posts = [row | {"image": b"not to be read"} for row in posts]
    write(store, "images/one", posts, IMAGES, group=5)
    found = survey(store).pictures
    assert len(found) == 24
    for number, colour in enumerate(colours):
        data = base64.b64decode(found[f"danbooru:{number}"].removeprefix("data:image/webp;base64,"))
        drawn = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean(axis=(0, 1))
        wanted = np.asarray(Image.new("RGB", (1, 1), colour))[0, 0]
        assert np.abs(drawn - wanted).max() < 40, number


def hostile_findings(store: Store) -> Findings:
    """Findings of a dataset in which every text, and folder names as far as possible, are attacks."""
    name, fields = "a<b>'\"&", {f"tags_{category}": [ATTACK, f"{ATTACK}{category}"] for category in TAG_CATEGORIES}
    posts = [post(n, id=f"{ATTACK}{n}", source=ATTACK, format=ATTACK, rating=ATTACK, **fields) for n in range(3)]
    write(store, "images/one", posts, IMAGES)
    write(store, "rejected/one", [refused(ATTACK, ATTACK, ATTACK)], REJECTED)
    texts = [caption(row, ATTACK) | {"engine": ATTACK, "model": ATTACK} for row in posts[:2]]
    write(store, "captions/one", [*texts, caption(posts[2], None, ATTACK)], CAPTIONS)
    kept = selected(posts[0], 0) | {"quality": ATTACK, "era": ATTACK, "rating": ATTACK, "caption": ATTACK}
    write(store, f"selections/{name}/one", [kept], SELECTION)
    out = [refused(posts[1]["id"], ATTACK, ATTACK), refused(posts[2]["id"], "duplicate", "of <b>bold")]
    write(store, f"selections/{name}/rejected/one", out, REJECTED)
    store.write(f"selections/{name}/run.json", json.dumps({"failed": {ATTACK: ATTACK}}).encode())
    scores = pa.schema([("id", pa.string()), (ATTACK, pa.float32())])
    write(store, f"scores/{name}/one", [{"id": "1", ATTACK: 0.5}], scores)
    return survey(store)


def test_no_text_of_the_dataset_becomes_markup_or_script(store: Store) -> None:
    page = Page(render(hostile_findings(store)))
    assert page.all("b")
    assert all(not attributes for attributes in page.all("b"))
    assert all(attributes["src"].startswith("data:image/webp;base64,") for attributes in page.all("img"))  # type: ignore[union-attr]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    data, ours = page.scripts
    assert ours == (Path(counts.__file__).parent / "report.js").read_text()
    shown = ATTACK.replace("\u202e", "\N{REPLACEMENT CHARACTER}")
    assert json.loads(data)["categories"]["general"]["tags"][0][:2] == [shown, 3]
    texts = " ".join(page.texts)
    assert texts.count(shown) > 15
    assert "\u202e" not in texts
    assert "49" not in texts.replace(shown, "").split()


def test_the_page_fetches_nothing_and_runs_only_its_own_script(surveyed: Surveyed) -> None:
    page = surveyed.page
    for name, attributes in page.elements:
        for attribute in ("src", "href", "srcset", "action", "data"):
            value = attributes.get(attribute) or "#"
            assert value.startswith(("#", "data:image/webp")), (name, value)
    assert page.elements[0][0] == "html"
    assert not page.all("link") + page.all("iframe") + page.all("object")
    [policy] = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_explicit_pictures_are_blurred(store: Store) -> None:
    write(store, "images/one", [post(0, rating="explicit"), post(1, rating="general")], IMAGES)
    page = Page(render(survey(store)))
    classes = [attributes["class"] for attributes in page.all("figure") if "picture" in (attributes.get("class") or "")]
    assert sorted(name or "" for name in classes) == ["picture", "picture covered"]


def test_the_page_stays_small_whatever_the_pictures(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hundredth of the limits."""
    monkeypatch.setattr(report_page, "_MAX_PICTURE_BYTES", report_page._MAX_PICTURE_BYTES // 100)
    monkeypatch.setattr("pipeline.reporting.findings._PICTURES", 20)
    noise = picture(0, side=96)
    posts = [post(number, image=noise) for number in range(60)]
    write(store, "images/one", posts, IMAGES)
    for name in ("256", "512", "768"):
        write(store, f"selections/{name}/one", [selected(row, n) for n, row in enumerate(posts[:20])], SELECTION)
        out = [refused(row["id"], f"reason {n % 35}") for n, row in enumerate(posts[20:])]
        write(store, f"selections/{name}/rejected/one", out, REJECTED)
    found = survey(store)
    assert len(found.pictures) == 20
    assert sum(map(len, found.pictures.values())) > 35_000
    page = render(found)
    assert 20_000 < sum(len(image["src"] or "") for image in Page(page).all("img")) <= 35_000
    assert page.count("picture not included") > 20


@pytest.mark.parametrize(
    ("folders", "command"),
    [((), "caption.py"), (("captions",), "curate.py"), (("captions", "selections/demo"), None)],
)
def test_the_next_command_is_shown_until_everything_is_done(
    store: Store, tmp_path: Path, folders: tuple[str, ...], command: str | None
) -> None:
    write_dataset(store, shards=1, rows=10)
    part = Store(str(tmp_path / "a part"))
    for folder in ("images", "rejected", *folders):
        for file in sorted(Path(store.path(folder)).rglob("*")):
            if file.is_file():
                part.write(f"{folder}/{file.relative_to(store.path(folder))}", file.read_bytes())
    findings = survey(part)
    commands = [step.command for step in funnel(findings) if step.command]
    assert [f"{command}" in found and f"'{part.root}'" in found for found in commands] == ([True] if command else [])
    assert "a part" in render(findings)
    assert len(findings.pictures) >= 5


def test_the_command_for_a_renamed_selection_names_its_stage(store: Store) -> None:
    write_dataset(store, shards=1, rows=10)
    Path(store.path("selections/demo")).rename(store.path("selections/mine"))
    store.remove("selections/mine/selection.json")
    store.write("selections/mine/run.json", b'{"stage": "512"}')
    [command] = [step.command for step in funnel(survey(store)) if step.command]
    assert command.endswith(f"curate.py --dataset {store.root} --stage 512 --name mine")
    write(store, "selections/mine/part-0", [selected(post(0), 10)], SELECTION)
    with pytest.raises(UsageError, match=r"names row 10, .* --stage 512 --name mine$"):
        survey(store)


def test_a_dataset_that_ingest_refused_as_a_whole_has_a_report(store: Store) -> None:
    write(store, "images/one", [], IMAGES)
    write(store, "rejected/one", [refused("raw#0", "empty"), refused("raw#1", "empty")], REJECTED)
    findings = survey(store)
    assert [(step.title, step.rows) for step in funnel(findings)][:2] == [("Raw rows", 2), ("Ingested", 0)]
    assert "raw#1" in render(findings)


def test_scores_have_histograms_and_missing_scores_are_counted(store: Store) -> None:
    write_dataset(store, shards=2, rows=10)
    schema = pa.schema([("id", pa.string()), ("aesthetic", pa.float32()), ("constant", pa.float32())])
    values = [[0.0, 1.0, float("nan"), float("inf"), None], [4.0, 0.1, 0.2, 0.3, -4.0]]
    for shard, part in enumerate(values):
        rows = [{"id": str(number), "aesthetic": value, "constant": 3.0} for number, value in enumerate(part)]
        write(store, f"scores/model/part-{shard}", rows, schema, group=2)
    aesthetic, constant = survey(store).scores
    assert (aesthetic.counts.sum(), aesthetic.unknown) == (7, 3)
    assert (aesthetic.measure.edges[0], aesthetic.measure.edges[-1]) == (-4, 4)
    assert aesthetic.counts[1] == 1
    assert (constant.counts.sum(), constant.counts.max(), constant.unknown) == (10, 10, 0)


def test_a_report_on_s3_equals_the_local_one(store: Store, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(store, shards=2, rows=12)
    remote = Store(f"{bucket}/reported")
    for file in sorted(Path(store.root).rglob("*")):
        if file.is_file():
            remote.write(str(file.relative_to(store.root)), file.read_bytes())
    monkeypatch.setattr("sys.argv", ["report.py", "--dataset", remote.root])
    report.main()
    pages = remote.read("report.html").decode().replace(remote.root, store.root), render(survey(store))
    assert "Selection demo" in pages[0]
    assert len({re.sub(r"Dataset report, [-\d: ]+", "", page) for page in pages}) == 1, "apart from the time"


def test_a_shard_on_s3_is_not_read_whole_for_its_small_columns(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs.core

    store = Store(f"{bucket}/large")
    write(store, "images/one", [post(n, image=bytes(2_000_000)) for n in range(3)], IMAGES, group=1)
    fetch, sizes = s3fs.core._fetch_range, []

    def counting(*arguments: Any, **more: Any) -> bytes:
        data: bytes = fetch(*arguments, **more)
        sizes.append(len(data))
        return data

    monkeypatch.setattr("s3fs.core._fetch_range", counting)
    assert take_census(store, [], []).rows[0] == 3
    assert 0 < sum(sizes) < 1_000_000, "of 6 MB"


def test_the_rarest_tags_are_forgotten_and_the_frequent_ones_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_TAGS_REMEMBERED", 50)
    monkeypatch.setattr(counts, "_TAGS_BUFFERED", 200)
    tally = counts.TagCounts(views=2)
    for part in range(20):
        rows = [["1girl", f"rare {part} {row}", None, "1girl"] for row in range(20)]
        masks = np.ones((2, 20), np.bool_)
        masks[1, ::2] = False
        tally.add(pa.array(rows), masks)
    tags, known = tally.top(1)
    assert tags == [("1girl", 400, 200)]
    assert tally.forgotten
    assert known <= 50


def test_a_value_on_an_edge_belongs_to_the_bin_above() -> None:
    measure = Measure("n", "n", (0, 1, 2, 4, 1024, 16384, 2_000_000))
    assert measure.bin_of(np.array([-1, 0, 1, 3, 4, 99999, np.nan])).tolist() == [0, 1, 2, 3, 4, 6, -1]
    ranges = [measure.range_of(number) for number in range(measure.bins)]
    assert ranges == ["below 0", "0", "1", "2 to 3", "4 to 1023", "1024 to 16.4k", "16.4k to 2M", "2M or more"]
    assert CAPTION_WORDS.bin_of(np.array([0.0, 1.0])).tolist() == [0, 1]


def test_files_that_do_not_fit_together_are_refused_with_the_command_to_run(store: Store) -> None:
    posts = [post(n) for n in range(4)]
    write(store, "images/one", posts, IMAGES)
    write(store, "captions/one", [caption(posts[0])], CAPTIONS)
    with pytest.raises(
        UsageError, match=r"captions/one.* has 1 rows, but its images have 4: .*run: python pipeline/caption.py"
    ):
        survey(store)
    write(store, "captions/one", [caption(row) for row in posts], CAPTIONS)
    write(store, "selections/demo/one", [selected(posts[0], 4)], SELECTION)
    with pytest.raises(UsageError, match=r"names row 4, .*run: python pipeline/curate.py .* --stage demo"):
        survey(store)


@pytest.mark.parametrize("name", ["images/part-1", "captions/part-1", "selections/demo/part-1", "rejected/part-1"])
def test_a_truncated_file_is_named_in_one_line(store: Store, name: str) -> None:
    write_dataset(store, shards=2, rows=10)
    path = Path(store.path(f"{name}.parquet"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(JobFailed, match=rf"cannot read .*{name}\.parquet: .*run the job that wrote it$"):
        survey(store)


def test_captions_of_another_folder_are_shown_on_request(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    posts = [post(n) for n in range(4)]
    write(store, "images/one", posts, IMAGES)
    write(store, "captions/pixtral/one", [caption(row) for row in posts], CAPTIONS)
    assert survey(store).census.captions.total() == 0
    assert survey(store, "captions/pixtral").census.captions.total() == 4
    monkeypatch.setattr("sys.argv", ["report.py", "--dataset", store.root, "--captions", "other"])
    with pytest.raises(UsageError, match=r"has no captions/other/; --captions takes one of: pixtral"):
        report.main()


def test_a_dataset_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["report.py", "--dataset", str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match=r"has no images; run: python pipeline/ingest.py --raw PATH --dataset"):
        report.main()
    assert not (tmp_path / "nowhere").exists()


def test_the_page_is_written_where_out_says(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(store, shards=1, rows=10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["report.py", "--dataset", "dataset", "--out", "pages/one.html"])
    report.main()
    assert (tmp_path / "pages/one.html").read_text().count("<!doctype html>") == 1
    assert not store.exists("report.html")
