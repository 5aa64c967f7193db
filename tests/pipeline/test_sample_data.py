"""The sample dataset has the layouts of the sites, and exactly the announced faults."""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core.errors import UsageError
from pipeline.drawings.illustrations import compose, general_tags, subject
from pipeline.drawings.sample_posts import PLANTED, count_planted, plan, scene_of
from pipeline.drawings.sample_rows import JAPANESE, danbooru_row
from pipeline.sample_data import SampleDataJob, main, write_samples

FEW = 120


def drawn(folder: Path, seed: int = 0, workers: int = 2) -> Path:
    write_samples(SampleDataJob(out=str(folder), images=FEW, seed=seed), plan(seed, FEW), workers)
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(tmp_path_factory.mktemp("samples") / "raw")


def rows(folder: Path, site: str) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / site).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


# --- Files ------------------------------------------------------------------------------------------------------------


def test_files_do_not_depend_on_the_number_of_processes(samples: Path, tmp_path: Path) -> None:
    again = drawn(tmp_path / "with a space", workers=1)
    names = sorted(path.relative_to(samples) for path in samples.rglob("*.parquet"))
    assert [str(name) for name in names] == ["danbooru/0000.parquet", "pixiv/0000.parquet"]
    for name in names:
        assert (samples / name).read_bytes() == (again / name).read_bytes()


def test_columns_are_those_of_the_danbooru_api(samples: Path) -> None:
    found = pq.read_schema(samples / "danbooru" / "0000.parquet")
    text = ["created_at", "rating", "source", "md5", "file_ext", "tag_string"]
    text += [f"tag_string_{category}" for category in ("general", "artist", "character", "copyright", "meta")]
    whole = ["score", "up_score", "down_score", "fav_count", "image_width", "image_height"]
    flags = ["has_children", "is_deleted", "is_banned", "is_flagged", "is_pending"]
    wanted = dict.fromkeys(text, pa.string()) | dict.fromkeys(whole, pa.int32()) | dict.fromkeys(flags, pa.bool_())
    wanted |= dict.fromkeys(["id", "file_size", "parent_id", "pixiv_id"], pa.int64()) | {"image": pa.binary()}
    assert {field.name: field.type for field in found} == wanted


def test_columns_are_those_of_the_pixiv_app_api_with_one_row_per_page(samples: Path) -> None:
    found = {field.name: field.type for field in pq.read_schema(samples / "pixiv" / "0000.parquet")}
    whole = {"page_count", "page", "width", "height", "sanity_level", "x_restrict", "illust_ai_type"}
    text = {"title", "type", "caption", "create_date"}
    large = {"id", "total_view", "total_bookmarks"}
    nested = {"user", "tags", "meta_single_page", "meta_pages", "series", "image"}
    assert found.keys() == whole | text | large | nested
    for names, kind in ((whole, pa.int32()), (text, pa.string()), (large, pa.int64())):
        assert {found[name] for name in names} == {kind}
    assert found["image"] == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert found["user"] == pa.struct([("id", pa.int64()), ("name", pa.string()), ("account", pa.string())])
    assert found["tags"].value_type == pa.struct([("name", pa.string()), ("translated_name", pa.string())])
    works: dict[int, list[dict[str, Any]]] = {}
    for row in rows(samples, "pixiv"):
        works.setdefault(row["id"], []).append(row)
    assert any(pages[0]["page_count"] > 1 for pages in works.values())
    for pages in works.values():
        assert {row["page"] for row in pages} == set(range(pages[0]["page_count"]))
        assert all(row["tags"] == pages[0]["tags"] and row["width"] == pages[0]["width"] for row in pages)


def unreadable(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).load()
    except OSError:
        return True
    return False


def planted_in(found: list[dict[str, Any]], site: str, pixiv_ids: set[int]) -> Counter[str]:
    """Faults of a site's rows by kind, found from the rows alone."""
    kinds: Counter[str] = Counter()
    sums: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    for row in found:
        data = row["image"] if site == "danbooru" else row["image"]["bytes"]
        key = (row["id"], row.get("page", 0))
        tags = set(row["tag_string"].split()) if site == "danbooru" else set()
        if key in seen:
            kinds["duplicate_id"] += 1
        elif row.get("is_deleted") or row.get("is_banned"):
            kinds["deleted" if row["is_deleted"] else "banned"] += 1
        elif row.get("file_ext") in ("mp4", "zip"):
            kinds["video_or_archive"] += 1
        elif unwanted := tags & {"cosplay_photo", "third-party_edit", "text-only_page"}:
            kinds[unwanted.pop()] += 1
        elif row.get("type") == "ugoira":
            kinds["ugoira"] += 1
        elif row.get("illust_ai_type") == 2:
            kinds["ai_work"] += 1
        elif site == "pixiv" and row["image"]["path"].startswith("limit_"):
            kinds["placeholder"] += 1
        elif not data:
            kinds["empty_bytes"] += 1
        elif data.startswith(b"<!DOCTYPE html"):
            kinds["html_page"] += 1
        elif unreadable(data):
            kinds["truncated_bytes"] += 1
        elif Image.open(io.BytesIO(data)).size == (8, 8):
            kinds["tiny_picture"] += 1
        else:
            sums[hashlib.sha256(data).hexdigest()] += 1
            kinds["same_on_both_sites"] += site == "danbooru" and row["pixiv_id"] in pixiv_ids
        seen.add(key)
    kinds["duplicate_bytes"] = sum(count - 1 for count in sums.values())
    return +kinds


def test_the_rows_have_exactly_the_announced_faults(samples: Path) -> None:
    announced = json.loads((samples / "run.json").read_text())["planted"]
    found = {site: rows(samples, site) for site in PLANTED}
    pixiv_ids = {row["id"] for row in found["pixiv"]}
    for site, kinds in announced.items():
        assert kinds.keys() == PLANTED[site].keys()
        assert planted_in(found[site], site, pixiv_ids) == kinds
    assert sum(map(len, found.values())) == FEW


def test_a_few_percent_of_the_rows_are_faulty_and_4000_are_intact() -> None:
    whole = plan(0, 4400)
    planted = sum(sum(kinds.values()) for kinds in count_planted(whole).values())
    assert 0.02 < planted / 4400 < 0.06
    assert 4400 - planted >= 4000


def test_a_linked_post_shows_the_picture_of_its_pixiv_page(samples: Path) -> None:
    pages = {(row["id"], row["page"]): row["image"]["bytes"] for row in rows(samples, "pixiv")}
    linked = [row for row in rows(samples, "danbooru") if row["pixiv_id"] in {work for work, _ in pages}]
    assert linked
    for row in linked:
        page = int(row["source"].rsplit("_p", 1)[1].split(".")[0])
        ours, theirs = (
            np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float64)
            for data in (row["image"], pages[row["pixiv_id"], page])
        )
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).mean() < 4  # of 255: one may be a JPEG of the other


def test_favourites_have_a_long_tail_and_increase_with_the_hidden_quality() -> None:
    posts = [post for post in plan(0, 800)["danbooru"] if not post.planted]
    favourites = np.array([danbooru_row(0, post)["fav_count"] for post in posts])
    quality = np.array([scene_of(0, post).quality for post in posts])
    assert np.median(favourites[quality > 0.7]) > 2.5 * np.median(favourites[quality < 0.3])
    assert favourites.mean() > 1.4 * np.median(favourites)


def test_a_child_post_shows_its_parents_subject_and_the_parent_has_children() -> None:
    posts = plan(0, 800)["danbooru"]
    children = [post for post in posts if post.parent is not None and not post.planted]
    assert children
    for child in children:
        parent = posts[child.parent or 0]
        assert parent.has_children
        assert subject(scene_of(0, child).main) == subject(scene_of(0, parent).main)


def test_exactly_the_drawn_tags_have_a_japanese_name_each_a_different_one() -> None:
    scenes = [compose(0, index) for index in range(4000)]
    assert JAPANESE.keys() == {tag for scene in scenes for tag in (*general_tags(scene), scene.copyright)}
    assert len(set(JAPANESE.values())) == len(JAPANESE)


# --- Command ----------------------------------------------------------------------------------------------------------


def test_a_rerun_draws_only_missing_shards(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--out", str(samples), "--images", str(FEW)]
    lost = samples / "pixiv" / "0000.parquet"
    kept = samples / "danbooru" / "0000.parquet"
    before, data = (lost.stat().st_mtime_ns, kept.stat().st_mtime_ns), lost.read_bytes()
    main(command)
    assert "already" in capsys.readouterr().out
    assert (lost.stat().st_mtime_ns, kept.stat().st_mtime_ns) == before
    lost.unlink()
    main(command)
    assert lost.read_bytes() == data
    assert kept.stat().st_mtime_ns == before[1]


@pytest.mark.parametrize("other", [["--seed", "1"], ["--images", str(FEW + 1)]])
def test_other_arguments_in_the_same_folder_are_refused_with_the_fix(samples: Path, other: list[str]) -> None:
    with pytest.raises(UsageError, match="Give another --out, or delete that folder"):
        main(["--out", str(samples), "--images", str(FEW), *other])


def test_a_folder_with_other_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "danbooru").mkdir()
    pq.write_table(pa.table({"id": [1]}), tmp_path / "danbooru" / "0000.parquet")
    with pytest.raises(UsageError, match="did not draw"):
        main(["--out", str(tmp_path), "--images", str(FEW)])


@pytest.mark.parametrize(
    ("wrong", "named"), [(["--images", "20"], "Use 120 or more"), (["--seed", "-1"], "give 0 or more")]
)
def test_arguments_out_of_range_are_refused(tmp_path: Path, wrong: list[str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        main(["--out", str(tmp_path / "none"), *wrong])
    assert not (tmp_path / "none").exists()
