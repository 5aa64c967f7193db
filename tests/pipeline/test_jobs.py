"""The pipeline's job files as users run them: the files, output and exit codes of each.

One drawn dataset goes through all jobs, on local disk and on S3; each test states facts about the result.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from subprocess import CompletedProcess, Popen
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.progress import StallDetector
from pipeline.drawings.sample_posts import plan
from pipeline.ingestion.raw_files import shard_name
from pipeline.storage.shards import Store

Finished = CompletedProcess[str]
RunJob = Callable[..., Finished]
StartJob = Callable[..., "Popen[str]"]

ROOT = Path(__file__).parents[2]
IMAGES = 150
# Planted kind -> the reason of ingest; curation must find the other kinds.
INGEST_REASONS = {
    "truncated_bytes": "truncated",
    "empty_bytes": "empty",
    "html_page": "not an image",
    "tiny_picture": "too small",
    "video_or_archive": "not a still picture",
    "ugoira": "not a still picture",
    "deleted": "deleted",
    "banned": "banned",
    "ai_work": "made by AI",
    "placeholder": "placeholder picture",
    "duplicate_id": "duplicate id",
}
UNUSABLE_TAGS = {
    "cosplay_photo": "tag cosplay photo",
    "third-party_edit": "tag third-party edit",
    "text-only_page": "tag text-only page",
}


@dataclass(frozen=True)
class Chain:
    """A dataset that went through all jobs, and the finished process of each."""

    root: Path
    ingest: Finished
    caption: Finished
    curate: Finished


@pytest.fixture(scope="module")
def raw(run_job_here: RunJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "raw"
    succeeded(run_job_here("pipeline/sample_data.py", "--out", folder, "--images", IMAGES))
    return folder


@pytest.fixture(scope="module")
def local(run_job: RunJob, raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """In a folder with a space in its name; given once by a flag and twice by HDM_DATASET. Curation starts a Ray of its
    own, as on a laptop."""
    elsewhere = tmp_path_factory.mktemp("with a space")
    root, named = elsewhere / "dataset", {"HDM_DATASET": "dataset"}
    return Chain(
        root,
        run_job("pipeline/ingest.py", "--raw", raw, "--dataset", root),
        run_job("pipeline/caption.py", environment=named, cwd=elsewhere),
        run_job("pipeline/curate.py", "--stage", "demo", environment=named | {"RAY_ADDRESS": ""}, cwd=elsewhere),
    )


def wait_until(true: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not true within {seconds} s"
        time.sleep(0.02)


def succeeded(job: Finished) -> None:
    assert job.returncode == 0, job.stderr


def refused(job: Finished, code: int) -> str:
    """The only line on stderr, besides progress bars, of a job that failed."""
    *bars, line = job.stderr.splitlines()
    assert job.returncode == code, job.stderr
    assert all("%|" in bar or not bar for bar in bars), job.stderr
    assert line.startswith({1: "failed: ", 2: "error: "}[code])
    return line


def record(folder: Path) -> dict[str, Any]:
    """A job's run.json without the values that differ from run to run."""
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    assert found.pop("seconds") >= 0
    assert found.pop("versions")["ray"]
    assert found["rows_in"] == found["rows_out"] + sum(found["rejected"].values())
    return found


def rows(folder: Path, *columns: str) -> list[dict[str, Any]]:
    """The rows of all shards of a folder, in the order of their names."""
    tables = (pq.read_table(path, columns=list(columns)) for path in sorted(folder.glob("*.parquet")))
    return list(chain.from_iterable(table.to_pylist() for table in tables))


def ids(folder: Path) -> list[str]:
    return [row["id"] for row in rows(folder, "id")]


def raw_pictures(raw: Path) -> list[tuple[str, bytes]]:
    """Id and bytes of every raw row in the order of the plan, Danbooru first."""
    danbooru = [(f"danbooru:{row['id']}", row["image"]) for row in rows(raw / "danbooru", "id", "image")]
    pixiv = [
        (f"pixiv:{row['id']}_p{row['page']}", row["image"]["bytes"])
        for row in rows(raw / "pixiv", "id", "page", "image")
    ]
    return danbooru + pixiv


def planted(raw: Path, kinds: dict[str, str]) -> list[tuple[str, str]]:
    """Sorted id and reason of each row planted with one of these kinds."""
    posts = chain.from_iterable(plan(0, IMAGES).values())
    found = zip(raw_pictures(raw), posts, strict=True)
    return sorted((name, kinds[post.planted]) for (name, _), post in found if post.planted in kinds)


def refusals(folder: Path) -> list[tuple[str, str]]:
    return sorted((row["key"], row["reason"]) for row in rows(folder, "key", "reason"))


def files(folder: Path) -> dict[Path, int]:
    """Every shard below a folder and its modification time."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


# --- Commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_ray(tmp_path: Path) -> dict[str, str]:
    """An environment in which importing Ray, which takes seconds, raises."""
    (tmp_path / "ray.py").write_text("raise ImportError('Ray was imported')")
    return {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}


@pytest.fixture
def call_without_ray(call_job: RunJob, monkeypatch: pytest.MonkeyPatch) -> RunJob:
    """Runs a job in this process, where importing Ray, or a module that imports it, raises."""

    def call(script: str, *arguments: object) -> Finished:
        with monkeypatch.context() as patch:
            for name in ("ray", "pipeline.core.cluster", "pipeline.core.dataflow"):
                patch.setitem(sys.modules, name, None)
            return call_job(script, *arguments)

    return call


@pytest.mark.parametrize("job", ["sample_data", "ingest", "score", "caption", "curate"])
def test_help_works_in_any_folder_without_importing_ray(
    run_job: RunJob, job: str, without_ray: dict[str, str], tmp_path: Path
) -> None:
    helped = run_job(f"pipeline/{job}.py", "--help", environment=without_ray, cwd=tmp_path)
    succeeded(helped)
    assert f"usage: {job}.py" in helped.stdout


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["ingest"], ["--raw", "ingest.py --help"]),
        (["ingest", "--raw", "nowhere", "--dataset", "none"], ["no parquet file at nowhere", "give a .parquet file"]),
        (["caption", "--engine", "magic", "--dataset", "none"], ["magic", "tags"]),
        (["curate", "--preset", "best", "--dataset", "none"], ["best", "kohaku", "animagine31", "noobai"]),
        (["curate", "--rules", "nowhere.toml", "--dataset", "none"], ["nowhere.toml", "give a TOML file such as"]),
        (["curate", "--name", "a/b", "--dataset", "none"], ["--name a/b must be the name of a folder"]),
        (["curate", "--diff", "a", "b", "--dataset", "none"], ["no finished selection 'a'", "--name a"]),
        (["curate", "--dataset", "none"], ["none has no images", "pipeline/ingest.py --raw PATH --dataset"]),
        (["caption", "--dataset", "none"], ["none has no images", "pipeline/ingest.py --raw PATH --dataset"]),
    ],
)
def test_a_wrong_command_is_refused_in_one_line_with_a_fix_and_writes_nothing(
    call_without_ray: RunJob, command: list[str], named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job, *arguments = command
    line = refused(call_without_ray(f"pipeline/{job}.py", *arguments), 2)
    assert all(part in line for part in named), line
    assert not (tmp_path / "none").exists()


def test_an_unreachable_cluster_is_named(run_job: RunJob, raw: Path, tmp_path: Path) -> None:
    nobody = {"RAY_ADDRESS": "127.0.0.1:1"}
    line = refused(run_job("pipeline/ingest.py", "--raw", raw, "--dataset", tmp_path, environment=nobody), 2)
    assert "RAY_ADDRESS=127.0.0.1:1" in line


# --- Ingest -----------------------------------------------------------------------------------------------------------


def test_ingest_refuses_exactly_the_planted_rows_and_keeps_all_other_bytes(local: Chain, raw: Path) -> None:
    succeeded(local.ingest)
    expected = planted(raw, INGEST_REASONS)
    counted = record(local.root / "images")
    assert counted["rows_in"] == IMAGES
    assert counted["rejected"] == Counter(reason for _, reason in expected)
    assert len(set(counted["rejected"])) == len(set(INGEST_REASONS.values()))
    assert refusals(local.root / "rejected") == expected
    kept = Counter((row["id"], row["image"]) for row in rows(local.root / "images", "id", "image"))
    delivered = raw_pictures(raw)
    assert kept <= Counter(delivered)
    assert Counter(name for name, _ in kept) == Counter(name for name, _ in delivered) - Counter(
        name for name, _ in expected
    )


def test_the_terminal_shows_only_the_jobs_own_lines_and_names_the_log(local: Chain) -> None:
    for name, job in (("ingest", local.ingest), ("caption", local.caption), ("curate", local.curate)):
        printed = job.stdout.splitlines()
        assert all(line.startswith(f"{name}: ") for line in printed), printed
        assert all("%|" in line or not line for line in job.stderr.splitlines()), job.stderr
        (log,) = (line.split("log: ")[1] for line in printed if "log: " in line)
        assert "session folder of Ray" in Path(log).read_text()


def test_a_second_ingest_writes_no_shard_and_has_the_same_record(run_job: RunJob, local: Chain, raw: Path) -> None:
    before = files(local.root), record(local.root / "images")
    again = run_job("pipeline/ingest.py", "--raw", raw, "--dataset", local.root)
    succeeded(again)
    assert "2 of them finished before, 0 to do" in again.stdout
    assert (files(local.root), record(local.root / "images")) == before


def test_unknown_columns_are_refused_before_any_work_with_the_missing_and_found_ones(
    run_job: RunJob, raw: Path, tmp_path: Path
) -> None:
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table({"picture": [b""], "label": ["cat"]}), tmp_path / "raw" / "other.parquet")
    shutil.copy(raw / "danbooru" / "0000.parquet", tmp_path / "raw")
    line = refused(run_job("pipeline/ingest.py", "--raw", tmp_path / "raw", "--dataset", tmp_path / "dataset"), 2)
    assert "other.parquet" in line
    assert "found the columns ['label', 'picture']" in line
    assert "missing for danbooru ['id', 'image or " in line
    assert not (tmp_path / "dataset").exists()


def test_broken_parquet_files_are_listed_and_all_others_are_done(
    run_job_here: RunJob, raw: Path, tmp_path: Path
) -> None:
    folder, root = tmp_path / "danbooru", tmp_path / "dataset"
    folder.mkdir()
    whole = pq.read_table(raw / "danbooru" / "0000.parquet")
    for name, first in {"a-cut": 0, "b-spoilt": 10, "c-whole": 20, "d-whole": 30}.items():
        pq.write_table(whole.slice(first, 10), folder / f"{name}.parquet")
    (folder / "e-text.parquet").write_text("<html>404</html>")
    cut, spoilt = folder / "a-cut.parquet", folder / "b-spoilt.parquet"
    cut.write_bytes(cut.read_bytes()[:-100])
    # The footer is good; a page of pictures is broken.
    pictures = pq.read_metadata(spoilt).row_group(0).column(whole.column_names.index("image"))
    data = bytearray(spoilt.read_bytes())
    data[pictures.data_page_offset : pictures.data_page_offset + 64] = b"\xff" * 64
    spoilt.write_bytes(data)

    line = refused(run_job_here("pipeline/ingest.py", "--raw", folder, "--dataset", root), 1)
    counted = record(root / "images")
    assert counted["failed"].keys() == {str(folder / f"{name}.parquet") for name in ("a-cut", "e-text", "b-spoilt")}
    for name, why in counted["failed"].items():
        assert f"{name} ({why})" in line
    assert counted["rows_in"] == 20
    whole_files = (folder / "c-whole.parquet", folder / "d-whole.parquet")
    assert Store(str(root)).shards("images") == [shard_name(str(path), "danbooru") for path in whole_files]


def test_ingest_killed_twice_writes_the_files_of_an_undisturbed_one(
    start_job: StartJob, run_job_here: RunJob, raw: Path, tmp_path: Path
) -> None:
    def command(root: Path) -> list[str | Path]:
        return ["pipeline/ingest.py", "--raw", raw, "--dataset", root, "--rows-per-shard", "8", "--downsize", "64"]

    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    total = sum(-(-pq.read_metadata(path).num_rows // 8) for path in raw.rglob("*.parquet"))
    for shards in (3, 8):
        job = start_job(*command(killed))
        wait_until(lambda shards=shards: len(list((killed / "images").glob("*.parquet"))) >= shards)
        job.kill()
        assert job.wait(timeout=60) == -signal.SIGKILL
    assert len(list((killed / "images").glob("*.parquet"))) < total
    succeeded(run_job_here(*command(killed)))
    succeeded(run_job_here(*command(undisturbed)))
    written = sorted(path.relative_to(undisturbed) for path in undisturbed.rglob("*.parquet"))
    assert len(written) == 3 * total  # images, rejected and the smaller tier
    assert sorted(path.relative_to(killed) for path in killed.rglob("*.parquet*")) == written
    assert all((killed / name).read_bytes() == (undisturbed / name).read_bytes() for name in written)
    assert record(killed / "images") == record(undisturbed / "images")


def test_the_good_copy_of_a_repeated_post_is_kept_and_an_odd_row_fails_alone(
    run_job_here: RunJob, raw: Path, tmp_path: Path
) -> None:
    [sound] = pq.read_table(raw / "pixiv" / "0000.parquet").slice(0, 1).to_pylist()
    broken = sound | {"image": sound["image"] | {"bytes": sound["image"]["bytes"][:200]}}
    odd = sound | {"id": 5, "user": None, "create_date": "10000-13-45"}
    schema = pq.read_schema(raw / "pixiv" / "0000.parquet")
    pq.write_table(pa.Table.from_pylist([broken, sound, sound, odd], schema), tmp_path / "pixiv.parquet")
    succeeded(run_job_here("pipeline/ingest.py", "--raw", tmp_path, "--dataset", tmp_path / "dataset"))
    counted = record(tmp_path / "dataset" / "images")
    assert (counted["rows_out"], counted["rejected"]) == (2, {"duplicate id": 1, "truncated": 1})


def test_a_dataset_of_refused_rows_only_is_refused_by_curation(
    call_job_with_ray: RunJob, raw: Path, tmp_path: Path
) -> None:
    row = pq.read_table(raw / "danbooru" / "0000.parquet").slice(0, 1)
    pq.write_table(row.drop_columns("image").append_column("image", pa.array([b"no image"])), tmp_path / "a.parquet")
    there = ("--dataset", tmp_path / "dataset")
    succeeded(call_job_with_ray("pipeline/ingest.py", "--raw", tmp_path, *there))
    line = refused(call_job_with_ray("pipeline/curate.py", "--stage", "demo", *there), 2)
    assert "no pictures: ingest refused {'not an image': 1}" in line


# --- Captions ---------------------------------------------------------------------------------------------------------


def test_captions_follow_the_order_of_images_which_are_not_rewritten(local: Chain) -> None:
    succeeded(local.caption)
    shards = Store(str(local.root)).shards("images")
    assert Store(str(local.root)).shards("captions") == shards
    for shard in shards:
        pictures, captions = (
            pq.read_table(local.root / folder / f"{shard}.parquet", columns=["id"]) for folder in ("images", "captions")
        )
        assert captions == pictures
    written = max(files(local.root / "images").values())
    assert all(later > written for later in files(local.root / "captions").values())
    counted = record(local.root / "captions")
    assert counted["rows_in"] == counted["rows_out"] == record(local.root / "images")["rows_out"]


# --- Curation ---------------------------------------------------------------------------------------------------------


def test_curation_selects_every_row_or_refuses_it_with_a_reason(local: Chain, raw: Path) -> None:
    succeeded(local.curate)
    folder = local.root / "selections" / "demo"
    out = refusals(folder / "rejected")
    selection, counted = json.loads((folder / "selection.json").read_text()), record(folder)
    assert Counter(ids(folder)) + Counter(name for name, _ in out) == Counter(ids(local.root / "images"))
    assert len(selection["hash"]) == 64
    assert counted["rejected"] == selection["rejected"] == Counter(reason for _, reason in out)
    assert counted["rows_out"] == selection["selected"] == sum(selection["shards"].values()) == len(ids(folder))
    of_the_stage = {"tag multiple objects", "tag blurry", "tag film grain"}
    assert of_the_stage < counted["rejected"].keys()
    # A row may have two such tags; the first one is then the reason.
    wanted = set(planted(raw, UNUSABLE_TAGS))
    assert {entry for entry in out if entry[1] not in {"duplicate", *of_the_stage}} <= wanted
    assert {name for name, _ in wanted} <= {name for name, _ in out}
    for shard in selection["shards"]:
        pictures = pq.read_table(local.root / "images" / f"{shard}.parquet", columns=["id"])["id"].to_pylist()
        chosen = pq.read_table(folder / f"{shard}.parquet", columns=["id", "row"]).to_pylist()
        assert [pictures[row["row"]] for row in chosen] == [row["id"] for row in chosen]


def test_one_of_two_copies_is_selected_under_two_ids_and_across_sites(local: Chain, raw: Path) -> None:
    folder = local.root / "selections" / "demo"
    selected, out = set(ids(folder)), dict(refusals(folder / "rejected"))
    same: dict[bytes, set[str]] = {}
    for picture in rows(local.root / "images", "id", "image"):
        same.setdefault(picture["image"], set()).add(picture["id"])
    pairs = [names for names in same.values() if len(names) > 1]
    links = {row["pixiv_id"]: row for row in rows(raw / "danbooru", "id", "source", "pixiv_id")}
    for name in ids(local.root / "images"):
        work, _, page = name.removeprefix("pixiv:").partition("_p")
        link = links.get(int(work)) if page else None
        if link and link["source"].rsplit("_p", 1)[1].split(".")[0] == page:
            pairs.append({name, f"danbooru:{link['id']}"})
    announced = json.loads((raw / "run.json").read_text())["planted"]
    assert len(pairs) >= announced["danbooru"]["same_on_both_sites"] + announced["danbooru"]["duplicate_bytes"]
    for names in pairs:
        # A row refused for its own tags does not count as a copy.
        admitted = {name for name in names if not out.get(name, "").startswith("tag ")}
        assert len(admitted & selected) == min(1, len(admitted)), names
        assert {out[name] for name in admitted - selected} <= {"duplicate"}


def test_curation_without_changes_needs_no_ray_and_writes_no_shard(call_without_ray: RunJob, local: Chain) -> None:
    folder = local.root / "selections" / "demo"
    before, record_before = files(folder), record(folder)
    for _ in range(2):
        again = call_without_ray("pipeline/curate.py", "--dataset", local.root)
        succeeded(again)
        assert "judging 0 of 2 shards" in again.stdout
        assert (files(folder), record(folder)) == (before, record_before)


def test_a_selection_by_rules_from_a_file_can_be_planned_compared_and_explained(
    call_job_with_ray: RunJob, call_without_ray: RunJob, local: Chain, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text('ratings = ["general"]')
    mine = ("pipeline/curate.py", "--dataset", local.root, "--rules", tmp_path / "mine.toml", "--name", "mine")
    planned = call_without_ray(*mine, "--plan")
    succeeded(planned)
    assert "judging 2 of 2 shards: 2 new" in planned.stdout
    assert not (local.root / "selections" / "mine").exists()
    succeeded(call_job_with_ray(*mine, "--preset", "noobai"))
    made = json.loads((local.root / "selections" / "mine" / "selection.json").read_text())
    assert (made["rules"]["ratings"], made["rules"]["preset"]) == (["general"], "noobai")
    assert {row["rating"] for row in rows(local.root / "selections" / "mine", "rating")} == {"safe"}

    there = ("pipeline/curate.py", "--dataset", local.root)
    compared = call_without_ray(*there, "--diff", "demo", "mine")
    succeeded(compared)
    out = {key for key, reason in refusals(local.root / "selections" / "mine" / "rejected") if reason == "rating"}
    only = out & set(ids(local.root / "selections" / "demo"))
    assert f"{len(only)} rating: " in compared.stdout
    name, broken = min(only), refusals(local.root / "rejected")[0]
    explained = call_without_ray(*mine, "--explain", name, broken[0])
    succeeded(explained)
    assert "refuses ratings: " in explained.stdout
    again = call_without_ray(*there, "--name", "mine", "--explain", name)
    assert "refuses ratings: " in again.stdout, "explained by the rules of the selection"
    assert f"refused by ingest: {broken[1]}" in explained.stdout
    assert "knows no picture x:1" in refused(call_without_ray(*mine, "--explain", "x:1"), 2)


def test_curation_without_captions_is_refused_with_the_command_to_run(
    call_without_ray: RunJob, local: Chain, tmp_path: Path
) -> None:
    for folder in ("images", "rejected"):
        shutil.copytree(local.root / folder, tmp_path / folder)
    name, reason = refusals(tmp_path / "rejected")[0]
    explained = call_without_ray("pipeline/curate.py", "--dataset", tmp_path, "--explain", name)
    assert f"refused by ingest: {reason}" in explained.stdout
    line = refused(call_without_ray("pipeline/curate.py", "--dataset", tmp_path), 2)
    assert "2 of 2 shards have no captions" in line
    assert f"python pipeline/caption.py --dataset {tmp_path}" in line


def test_an_empty_selection_is_refused_with_the_counts(call_job_with_ray: RunJob, local: Chain) -> None:
    line = refused(call_job_with_ray("pipeline/curate.py", "--dataset", local.root, "--stage", "1024"), 2)
    folder = local.root / "selections" / "1024"
    counted = record(folder)
    assert counted["rows_out"] == 0
    assert counted["rejected"]["too small"] > 100
    assert all(f"{count} {reason}" in line for reason, count in counted["rejected"].items())
    assert not (folder / "selection.json").exists()


# --- Elsewhere --------------------------------------------------------------------------------------------------------


def test_an_s3_that_fails_every_ninth_request_ends_with_the_same_dataset(
    run_job_here: RunJob, local: Chain, raw: Path, bucket: str, s3_server: Any, transient_faults: tuple[str, ...]
) -> None:
    import s3fs

    # Names of shards depend on the last three folders.
    there_raw = f"{bucket}/{raw.parent.name}/{raw.name}"
    s3fs.S3FileSystem(skip_instance_cache=True).put(str(raw), there_raw, recursive=True)
    dataset = ["--dataset", f"{bucket}/dataset"]
    with s3_server.failing(*transient_faults, every=9) as failed:
        succeeded(run_job_here("pipeline/ingest.py", "--raw", there_raw, *dataset))
        succeeded(run_job_here("pipeline/caption.py", *dataset))
        succeeded(run_job_here("pipeline/curate.py", *dataset))
    assert len(failed) > len(transient_faults)
    here, there = Store(str(local.root)), Store(f"{bucket}/dataset")
    assert there.read("selections/demo/selection.json") == here.read("selections/demo/selection.json")
    for folder in ("images", "captions", "selections/demo"):
        assert there.shards(folder) == here.shards(folder)
        for shard in here.shards(folder):
            name = f"{folder}/{shard}.parquet"
            assert there.read_table(name).equals(here.read_table(name)), name


def test_every_real_illustration_is_accounted_for(
    call_job_with_ray: RunJob, real_illustrations: Path, tmp_path: Path
) -> None:
    succeeded(call_job_with_ray("pipeline/ingest.py", "--raw", real_illustrations, "--dataset", tmp_path))
    ingested = record(tmp_path / "images")
    assert ingested["rows_in"] == 59
    assert len(ids(tmp_path / "images")) == ingested["rows_out"]
    assert len(refusals(tmp_path / "rejected")) == sum(ingested["rejected"].values())
    succeeded(call_job_with_ray("pipeline/caption.py", "--dataset", tmp_path))
    assert record(tmp_path / "captions")["rows_in"] == ingested["rows_out"]
    succeeded(call_job_with_ray("pipeline/curate.py", "--dataset", tmp_path))
    curated = record(tmp_path / "selections" / "demo")
    assert curated["rows_in"] == ingested["rows_out"]
    assert curated["rows_out"] > 0


def test_the_stall_detector_compares_idle_time_with_the_longest_before() -> None:
    stall = StallDetector(now=100.0)
    # rows finished, time -> idle seconds, longest idle seconds before
    for rows, now, seconds, longest in (
        (0, 130.0, 30.0, 900.0),  # its pace is not known yet
        (5, 160.0, 0.0, 60.0),
        (5, 180.0, 20.0, 60.0),
        (9, 260.0, 0.0, 100.0),
        (9, 900.0, 640.0, 100.0),
    ):
        assert stall.update(rows, now) == {"idle_seconds": seconds, "longest_idle_seconds": longest}
