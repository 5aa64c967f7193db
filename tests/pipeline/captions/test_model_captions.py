"""Captions by a model without Ray: engines that die or fail too often, and shards that are continued or retried."""

import asyncio
import io
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from captioner.captioning import Outcome
from captioner.engines import Completion, EngineDied, EngineFailure, EngineUnusable, RequestFailed
from captioner.prompts import PROMPT_VERSION, Prompt
from captioner.requests import CaptionRequest
from captioner.sampling import CompletionParams, Sampling
from pipeline.captions.caption_rows import CaptionRows, CaptionShard, decode_rows, prepare, read_pictures, write_rows
from pipeline.captions.commit import commit_shard, unfinished_rows
from pipeline.captions.engine_config import CaptionSettings, EngineConfig
from pipeline.captions.model_captions import Captioner, CaptionTask, PendingRow
from pipeline.captions.tag_captions import ImageShard
from pipeline.captions.trial import spread
from pipeline.core.errors import JobStopped
from pipeline.core.records import CAPTIONS, IMAGES, TAG_CATEGORIES
from pipeline.core.tables import REPORT, ROW, labelled
from pipeline.storage.partial import PartialShard
from pipeline.storage.shards import Store

SETTINGS = CaptionSettings(
    engine="scripted", model="none", prompt_version=PROMPT_VERSION, sampling=Sampling(), max_side=64
)


@dataclass
class Script:
    """What all engines of a test do, and what they were asked."""

    seconds: float = 0.0
    dies: set[str] = field(default_factory=set)  # on pictures with these hints
    deaths: int = 1000  # at most
    refuses: bool = False  # every request
    unusable: bool = False
    started: int = 0
    in_flight: int = 0
    most: int = 0
    asked: Counter[str] = field(default_factory=Counter)  # by hint


@dataclass(frozen=True, kw_only=True)
class Scripted(EngineConfig):
    script: Script

    async def start(self) -> Any:
        if self.script.unusable:
            raise EngineUnusable("no weights: fetch them")
        self.script.started += 1
        return ScriptedEngine(self.script)


class ScriptedEngine:
    name, model = "scripted", "none"

    def __init__(self, script: Script) -> None:
        self.script, self.dead = script, False

    async def complete(self, prompt: Prompt, image: Image.Image, params: CompletionParams) -> Completion:
        script = self.script
        hint = prompt.hints.rpartition("Seen: ")[2].rstrip(".")
        script.asked[hint] += 1
        script.in_flight += 1
        script.most = max(script.most, script.in_flight)
        try:
            await asyncio.sleep(script.seconds)
        finally:
            script.in_flight -= 1
        if (hint in script.dies and script.deaths) or self.dead:
            script.deaths -= not self.dead
            self.dead = True
            raise EngineDied("gone")
        if script.refuses:
            raise RequestFailed(EngineFailure.REFUSED, "told to")
        return Completion(f"A girl stands in a field at night and points at {hint} above.", "stop", 10, 5)

    async def close(self) -> None:
        pass


def star(number: int) -> str:
    """A hint without digits, because captions that differ only in digits count as repeated."""
    return f"star {'bcdfghjklm'[number // 10]}o{'bcdfghjklm'[number % 10]}o"


def pending(*numbers: int) -> list[PendingRow]:
    image = Image.new("RGB", (40, 40))
    return [PendingRow(CaptionRequest(f"a:{n}", {"general": [star(n)]}), image) for n in numbers]


def new_captioner(script: Script, concurrency: int = 8, restart_after: int = 0) -> Captioner:
    engine = Scripted(engine="scripted", model="none", concurrency=concurrency, script=script)
    task = CaptionTask(
        dataset="unused", folder="captions", engine=engine, settings=SETTINGS, restart_after=restart_after
    )
    return Captioner(task)


def captions(outcomes: list[Outcome]) -> list[tuple[str, str | None, str | None]]:
    return [(outcome.answer.id, outcome.answer.caption, outcome.answer.reason) for outcome in outcomes]


def expected(*numbers: int) -> list[tuple[str, str, None]]:
    return [(f"a:{n}", f"A girl stands in a field at night and points at {star(n)} above.", None) for n in numbers]


def test_rows_survive_two_deaths_of_their_engine_on_one_picture() -> None:
    script = Script(seconds=0.002, dies={star(9)}, deaths=2)
    captioner = new_captioner(script)
    assert captions(captioner.caption(pending(*range(30)))) == expected(*range(30))
    assert (script.started, captioner.times().engines_started) == (3, 3)
    captioner.close()


@pytest.mark.parametrize("concurrency", [1, 30])
def test_a_picture_that_always_kills_its_engine_costs_only_its_own_row(concurrency: int) -> None:
    script = Script(seconds=0.002, dies={star(number) for number in (9, 20, 27)})
    captioner = new_captioner(script, concurrency)
    with ThreadPoolExecutor(3) as calls:
        found = calls.map(captioner.caption, [pending(*range(first, first + 10)) for first in (0, 10, 20)])
        rows = captions([outcome for outcomes in found for outcome in outcomes])
    good = expected(*range(30))
    for number in (9, 20, 27):
        assert rows[number] == (f"a:{number}", star(number), "engine died on the picture")
        rows[number] = good[number]
    assert rows == good
    assert script.started <= 10  # three deaths each: more than may follow each other without an answer
    captioner.close()


def test_engines_that_die_without_an_answer_stop_the_job() -> None:
    script = Script(seconds=0.002, dies={star(number) for number in range(20, 60)})
    captioner = new_captioner(script, concurrency=2)
    assert len(captioner.caption(pending(*range(20)))) == 20
    with pytest.raises(
        JobStopped, match=r"^7 engines in a row died before they answered anything \(gone\); .*--at-once"
    ):
        captioner.caption(pending(*range(20, 60)))
    captioner.close()


def test_an_engine_that_cannot_start_stops_the_job_with_its_message() -> None:
    captioner = new_captioner(Script(unusable=True))
    for _ in range(2):
        with pytest.raises(JobStopped, match=r"^no weights: fetch them$"):
            captioner.caption(pending(0, 1))
    captioner.close()


def test_an_engine_that_fails_on_too_many_rows_stops_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.captions.model_captions._MAX_FAILURES", 20)
    captioner = new_captioner(Script(refuses=True))
    assert {reason for *_, reason in captions(captioner.caption(pending(*range(20))))} == {EngineFailure.REFUSED}
    stopped = r"^the engine failed on 21 of the last 21 rows, mostly: engine refused the request \(told to\); fix it"
    for first in (20, 30):  # also rows that were never asked
        with pytest.raises(JobStopped, match=stopped):
            captioner.caption(pending(*range(first, first + 10)))
    captioner.close()


def test_calls_share_the_engine_and_fill_its_slots() -> None:
    script = Script(seconds=0.3)
    captioner = new_captioner(script, concurrency=8)
    with ThreadPoolExecutor(2) as calls:
        found = [captions(o) for o in calls.map(captioner.caption, [pending(*range(5)), pending(*range(5, 10))])]
    assert found == [expected(*range(5)), expected(*range(5, 10))]
    assert script.most == 8
    captioner.close()


def test_an_old_engine_is_replaced() -> None:
    script = Script()
    captioner = new_captioner(script, restart_after=10)
    for first in (0, 20):
        assert captions(captioner.caption(pending(*range(first, first + 20)))) == expected(*range(first, first + 20))
    assert 2 <= script.started <= 4
    assert sum(script.asked.values()) == 40
    captioner.close()


def test_a_row_without_a_picture_starts_no_engine() -> None:
    script = Script()
    captioner = new_captioner(script)
    row = PendingRow(CaptionRequest("a:1", {"general": ["long hair"]}), "decoder died")
    assert captions(captioner.caption([row])) == [("a:1", "long hair", "decoder died")]
    assert not script.started
    captioner.close()


# --- Shards ---------------------------------------------------------------------------------------------------------

PART = ImageShard("a", 30, "digest of a")
PROVENANCE = SETTINGS.provenance(PART.digest)


@pytest.fixture
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    """With a shard of images."""
    if getattr(request, "param", "local") == "s3":
        return write_images(Store(f"{request.getfixturevalue('bucket')}/{tmp_path.name}"))
    return write_images(Store(str(tmp_path)))


def write_images(store: Store) -> Store:
    encoded = io.BytesIO()
    Image.new("RGB", (40, 40)).save(encoded, "PNG")
    rows = [
        {
            "id": f"a:{number}", "source": "danbooru", "image": encoded.getvalue(), "format": "PNG", "width": 40,
            "height": 40, "sha256": "", "phash": 0, "page": 0,
            **{f"tags_{category}": [] for category in TAG_CATEGORIES},
            "tags_general": [star(number)],
        }
        for number in range(PART.rows)
    ]  # fmt: skip
    store.write_table("images/a.parquet", pa.Table.from_pylist(rows, IMAGES), IMAGES)
    return store


def unfinished(store: Store, retry: bool = False) -> tuple[CaptionShard, list[int]]:
    shard, rows = unfinished_rows(PART, store, "captions", PROVENANCE, retry=retry, started=True)
    return shard, rows.tolist()


def caption(store: Store, script: Script, shard: CaptionShard, rows: list[int], died: bool = False) -> list[Any]:
    """All steps but the commit. Returns the reports."""
    engine = Scripted(engine="scripted", model="none", concurrency=8, script=script)
    work = CaptionRows(CaptionTask(dataset=store.root, folder="captions", engine=engine, settings=SETTINGS))
    reports = []
    for images in read_pictures(shard, np.array(rows, np.int32), store.root):
        for decoded in decode_rows(labelled(images, "a", died), SETTINGS.max_side):
            for captioned in work(decoded):
                (written,) = write_rows(captioned, store.root, "captions")
                reports += [json.loads(report) for report in written[REPORT].drop_null().to_pylist()]
                assert written[ROW].to_pylist() == decoded[ROW].to_pylist()
    return reports


def commit(store: Store, shard: CaptionShard) -> Counter[str]:
    return commit_shard(shard, store.root, "captions")


def finished(store: Store) -> list[tuple[str, str, str | None]]:
    table = store.read_table("captions/a.parquet")
    return [(row["id"], row["caption"], row["reason"]) for row in table.to_pylist()]


def kept(store: Store) -> Iterator[str]:
    for file in store.shards("captions/partial/a"):
        yield from store.read_table(f"captions/partial/a/{file}.parquet")["id"].to_pylist()


@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
def test_a_shard_is_continued_row_by_row_and_has_its_images_order(store: Store) -> None:
    script = Script()
    shard, rows = unfinished(store)
    assert rows == list(range(30))
    for some in ([25, 3, 9], [0, 26]):
        [report] = caption(store, script, shard, sorted(some))
        assert report["rows"] == {"rows": len(some), "attempts": len(some), "tokens_in": 10 * len(some),
                                  "tokens_out": 5 * len(some), "rejected": {}}  # fmt: skip
    shard, rows = unfinished(store)
    assert rows == sorted(set(range(30)) - {0, 3, 9, 25, 26})
    with pytest.raises(ValueError, match="25 of 30 rows have no caption"):
        commit(store, shard)
    caption(store, script, shard, rows)
    assert commit(store, shard) == {}
    assert finished(store) == expected(*range(30))
    assert script.asked == {star(number): 1 for number in range(30)}
    assert not list(kept(store))
    assert json.loads(store.metadata("captions/a.parquet")["made_from"]) == PROVENANCE


def test_rows_of_the_former_layout_are_kept(store: Store) -> None:
    """Their files are named by random digits and have no row numbers."""
    script = Script()
    shard, _ = unfinished(store)
    caption(store, script, shard, [4, 7, 12])
    [file] = store.shards("captions/partial/a")
    table = store.read_table(f"captions/partial/a/{file}.parquet").select(CAPTIONS.names).take([2, 0, 1])
    store.remove(f"captions/partial/a/{file}.parquet")
    name = f"captions/partial/a/{'0123456789abcdef' * 2}.parquet"
    store.write_table(name, table, CAPTIONS, made_from=json.dumps(PROVENANCE))
    other = f"captions/partial/a/{'f' * 32}.parquet"
    store.write_table(other, table, CAPTIONS, made_from=json.dumps(PROVENANCE | {"images": "of long ago"}))

    shard, rows = unfinished(store)
    assert rows == sorted(set(range(30)) - {4, 7, 12})
    assert not store.exists(name)
    assert not store.exists(other)
    caption(store, script, shard, rows)
    commit(store, shard)
    assert finished(store) == expected(*range(30))
    assert script.asked[star(7)] == 1


def test_rejected_rows_are_asked_again_with_their_attempts_counted_on(store: Store) -> None:
    shard, rows = unfinished(store)
    caption(store, Script(refuses=True), shard, rows[:3])
    caption(store, Script(), shard, rows[3:])
    commit(store, shard)
    assert unfinished(store, retry=False)[1] == list(range(30))  # the job asks only for shards that are out of date
    shard, rows = unfinished(store, retry=True)
    assert (rows, shard.attempts) == ([0, 1, 2], {0: 3, 1: 3, 2: 3})

    caption(store, Script(refuses=True), shard, [1])
    shard, rows = unfinished(store, retry=True)  # killed, and started again
    assert rows == [0, 2]
    [report] = caption(store, Script(), shard, rows)
    assert report["rows"]["attempts"] == 2
    commit(store, shard)
    after = store.read_table("captions/a.parquet").to_pylist()
    assert [row["attempts"] for row in after[:4]] == [4, 6, 4, 1]
    assert [row["reason"] for row in after[:3]] == [None, "engine refused the request", None]
    assert finished(store)[3:] == expected(*range(3, 30))


def test_partial_rows_left_by_a_job_that_was_killed_at_its_end_are_no_retries(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, rows = unfinished(store)
    caption(store, Script(dies={star(4)}), shard, rows)
    with monkeypatch.context() as killed:
        killed.setattr(PartialShard, "remove", lambda self: None)
        commit(store, shard)
    assert finished(store)[4][2] == "engine died on the picture"
    assert len(list(kept(store))) == 30
    shard, rows = unfinished(store, retry=True)
    assert rows == [4]
    script = Script()
    caption(store, script, shard, rows)
    commit(store, shard)
    assert script.asked == {star(4): 1}
    assert finished(store) == expected(*range(30))
    assert not list(kept(store))


def test_a_row_that_killed_its_process_has_the_caption_of_its_tags_and_is_not_tried_again(store: Store) -> None:
    script = Script()
    shard, _ = unfinished(store)
    [report] = caption(store, script, shard, [5], died=True)
    assert report["rows"]["rejected"] == {"decoder died": 1}
    caption(store, script, shard, [n for n in range(30) if n != 5])
    commit(store, shard)
    assert finished(store)[5] == ("a:5", star(5), "decoder died")
    assert star(5) not in script.asked
    assert unfinished(store, retry=True)[1] == []


def test_a_caption_of_too_many_rows_is_replaced_and_counted(store: Store) -> None:
    shard, rows = unfinished(store)
    caption(store, Script(), shard, rows)
    [file] = store.shards("captions/partial/a")
    table = store.read_table(f"captions/partial/a/{file}.parquet")
    texts = ["The very same words about a girl in a field."] * 5 + table["caption"].to_pylist()[5:]
    table = table.set_column(table.column_names.index("caption"), "caption", [texts])
    store.write_table(f"captions/partial/a/{file}.parquet", table, table.schema, made_from=json.dumps(PROVENANCE))
    assert commit(store, shard) == {"same caption for many images": 5}
    assert [reason for *_, reason in finished(store)[:6]] == ["same caption for many images"] * 5 + [None]


@pytest.mark.parametrize(
    ("size", "prepared"),
    [((1000, 500), (768, 384)), ((500, 1000), (384, 768)), ((640, 768), (640, 768)), ((3000, 301), (768, 77))],
)
def test_pictures_are_resized_by_their_longer_side(size: tuple[int, int], prepared: tuple[int, int]) -> None:
    encoded = io.BytesIO()
    Image.new("RGBA", size).save(encoded, "PNG")
    image = prepare(encoded.getvalue(), 768)
    assert not isinstance(image, str)
    assert (image.mode, image.size) == ("RGB", prepared)


def test_a_trial_takes_the_middles_of_equal_parts_of_all_rows() -> None:
    assert spread({"a": 60, "empty": 0, "b": 20}, 4) == {"a": [10, 30, 50], "b": [10]}
    assert spread({"a": 2, "b": 1}, 50) == {"a": [0, 1], "b": [0]}
