"""A caption worker without Ray: engines that die or cannot start, resumed shards, two shards at a time."""

import asyncio
import io
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from captioner.engines import Completion, EngineDied, EngineFailure, EngineUnusable, RequestFailed
from captioner.prompts import PROMPT_VERSION, Prompt
from captioner.sampling import CompletionParams, Sampling
from pipeline.captions.engine_config import CaptionSettings, EngineConfig
from pipeline.captions.model_captions import CaptionTask, CaptionWorker, prepare
from pipeline.captions.partial_captions import PartialShard
from pipeline.captions.tag_captions import ImageShard
from pipeline.captions.trial import spread
from pipeline.core.errors import JobStopped
from pipeline.core.records import IMAGES, TAG_CATEGORIES
from pipeline.pictures.decoder import Refused
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


def star(shard: str, number: int) -> str:
    """A hint without digits, because captions that differ only in digits count as repeated."""
    return f"star {shard}{'bcdfghjklm'[number // 10]}o{'bcdfghjklm'[number % 10]}o"


@pytest.fixture
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    if getattr(request, "param", "local") == "s3":
        return Store(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")
    return Store(str(tmp_path))


def write_images(store: Store, shard: str, count: int) -> ImageShard:
    encoded = io.BytesIO()
    Image.new("RGB", (40, 40)).save(encoded, "PNG")
    rows = [
        {
            "id": f"{shard}:{number}", "source": "danbooru", "image": encoded.getvalue(), "format": "PNG", "width": 40,
            "height": 40, "sha256": "", "phash": 0, "page": 0,
            **{f"tags_{category}": [] for category in TAG_CATEGORIES},
            "tags_general": [star(shard, number)],
        }
        for number in range(count)
    ]  # fmt: skip
    store.write_table(f"images/{shard}.parquet", pa.Table.from_pylist(rows, IMAGES), IMAGES)
    return ImageShard(shard, count, f"digest of {shard}")


def worker(store: Store, script: Script, concurrency: int = 8, retry_rejected: bool = False) -> CaptionWorker:
    engine = Scripted(engine="scripted", model="none", concurrency=concurrency, script=script)
    task = CaptionTask(
        dataset=store.root, folder="captions", engine=engine, settings=SETTINGS, retry_rejected=retry_rejected
    )
    return CaptionWorker(task)


def finished(store: Store, shard: str) -> list[tuple[str, str, str | None]]:
    rows = store.read_table(f"captions/{shard}.parquet").to_pylist()
    return [(row["id"], row["caption"], row["reason"]) for row in rows]


def expected(shard: str, count: int) -> list[tuple[str, str, None]]:
    text = "A girl stands in a field at night and points at {} above."
    return [(f"{shard}:{number}", text.format(star(shard, number)), None) for number in range(count)]


def kept(store: Store, shard: str) -> Iterator[str]:
    folder = f"captions/partial/{shard}"
    for file in store.shards(folder):
        yield from store.read_table(f"{folder}/{file}.parquet")["id"].to_pylist()


def test_a_shard_survives_two_deaths_of_its_engine_on_one_picture(store: Store) -> None:
    part, script = write_images(store, "a", 30), Script(seconds=0.002, dies={star("a", 9)}, deaths=2)
    work = worker(store, script)
    work(part)
    assert finished(store, "a") == expected("a", 30)
    assert (script.started, work.report().engines_started) == (3, 3)
    work.close()


@pytest.mark.parametrize("concurrency", [1, 30])
def test_a_picture_that_always_kills_its_engine_costs_only_its_own_row(store: Store, concurrency: int) -> None:
    part, script = (
        write_images(store, "a", 30),
        Script(seconds=0.002, dies={star("a", number) for number in (9, 20, 27)}),
    )
    work = worker(store, script, concurrency)
    work(part)
    rows, good = finished(store, "a"), expected("a", 30)
    for number in (9, 20, 27):
        assert rows[number] == (f"a:{number}", star("a", number), "engine died on the picture")
        rows[number] = good[number]
    assert rows == good
    assert script.started <= 10  # three deaths each: more than may follow each other without an answer
    work.close()


@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
def test_engines_that_die_without_an_answer_stop_the_job_and_a_later_one_continues(store: Store) -> None:
    part = write_images(store, "a", 60)
    script = Script(seconds=0.002, dies={star("a", number) for number in range(20, 60)})
    with pytest.raises(
        JobStopped, match=r"^7 engines in a row died before they answered anything \(gone\); .*--at-once"
    ):
        worker(store, script, concurrency=2)(part)
    done = set(kept(store, "a"))
    assert len(done) >= 20
    script.dies.clear()
    script.asked.clear()
    work = worker(store, script)
    work(part)
    after = dict(zip((f"a:{number}" for number in range(60)), finished(store, "a"), strict=True))
    assert {after[id] for id in after.keys() - done} <= set(expected("a", 60))
    assert script.asked == {star("a", number): 1 for number in range(60) if f"a:{number}" not in done}
    work.close()


def test_partial_rows_left_by_a_job_that_was_killed_at_its_end_are_no_retries(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.captions.model_captions._ROWS_PER_FILE", 10)
    part, script = write_images(store, "a", 10), Script(dies={star("a", 4)})
    with monkeypatch.context() as killed:
        killed.setattr(PartialShard, "remove", lambda self: None)
        work = worker(store, script)
        work(part)
        work.close()
    assert finished(store, "a")[4][2] == "engine died on the picture"
    assert len(list(kept(store, "a"))) == 10
    script.dies.clear()
    script.asked.clear()
    work = worker(store, script, retry_rejected=True)
    work(part)
    assert script.asked == {star("a", 4): 1}
    assert finished(store, "a") == expected("a", 10)
    assert not list(kept(store, "a"))
    work.close()


def test_an_engine_that_cannot_start_stops_the_job_with_its_message(store: Store) -> None:
    part = write_images(store, "a", 5)
    with pytest.raises(JobStopped, match=r"^no weights: fetch them$"):
        worker(store, Script(unusable=True))(part)
    assert not store.exists("captions/a.parquet")


def test_an_engine_that_fails_on_too_many_rows_stops_the_job(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.captions.model_captions._MAX_FAILURES", 20)
    part = write_images(store, "a", 80)
    with pytest.raises(
        JobStopped, match=r"^the engine failed on 21 of the last 21 rows, mostly: engine refused the request; fix it"
    ):
        worker(store, Script(refuses=True))(part)
    assert len(list(kept(store, "a"))) > 10
    assert not store.exists("captions/a.parquet")


def test_finished_rows_are_kept_when_the_job_is_stopped(store: Store) -> None:
    part, script = write_images(store, "a", 100), Script(seconds=0.05)
    work = worker(store, script, concurrency=4)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, part)
        until = time.monotonic() + 20
        while work.report().rows < 8 and time.monotonic() < until:
            time.sleep(0.01)
        work.close()
        with pytest.raises(JobStopped, match="stopped"):
            future.result(timeout=20)
    assert 8 <= len(list(kept(store, "a"))) < 100


def test_two_shards_share_the_engine_and_fill_its_slots(store: Store) -> None:
    parts, script = [write_images(store, shard, 5) for shard in "ab"], Script(seconds=0.3)
    work = worker(store, script, concurrency=8)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, parts))
    assert script.most == 8
    assert [finished(store, shard) for shard in "ab"] == [expected(shard, 5) for shard in "ab"]
    work.close()


@pytest.mark.parametrize(
    ("size", "prepared"),
    [((1000, 500), (768, 384)), ((500, 1000), (384, 768)), ((640, 768), (640, 768)), ((3000, 301), (768, 77))],
)
def test_pictures_are_resized_by_their_longer_side(size: tuple[int, int], prepared: tuple[int, int]) -> None:
    encoded = io.BytesIO()
    Image.new("RGBA", size).save(encoded, "PNG")
    image = prepare(encoded.getvalue(), 768)
    assert not isinstance(image, Refused)
    assert (image.mode, image.size) == ("RGB", prepared)


def test_a_trial_takes_the_middles_of_equal_parts_of_all_rows() -> None:
    assert spread({"a": 60, "empty": 0, "b": 20}, 4) == {"a": [10, 30, 50], "b": [10]}
    assert spread({"a": 2, "b": 1}, 50) == {"a": [0, 1], "b": [0]}
