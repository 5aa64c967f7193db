"""What an actor does, without Ray: engines that die, that cannot start, that are asked by two shards at a time."""

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

from captioner.engines import Completion, Draw, EngineDied, EngineUnusable
from captioner.prompts import PROMPT_VERSION, Prompt, Sampling
from pipeline.captions.engine_choice import CaptionSettings, EngineChoice
from pipeline.captions.model_captions import Captioner, CaptionTask, prepare
from pipeline.captions.partial_captions import Unfinished
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
    """What all engines of a test do."""

    seconds: float = 0.0
    dies: set[str] = field(default_factory=set)  # on pictures with these hints
    deaths: int = 1000  # and then no more
    unusable: bool = False
    started: int = 0
    under_way: int = 0
    most: int = 0
    asked: Counter[str] = field(default_factory=Counter)  # by hint


@dataclass(frozen=True, kw_only=True)
class Scripted(EngineChoice):
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

    async def complete(self, prompt: Prompt, image: Image.Image, draw: Draw) -> Completion:
        script = self.script
        hint = prompt.hints.rpartition("Seen: ")[2].rstrip(".")
        script.asked[hint] += 1
        script.under_way += 1
        script.most = max(script.most, script.under_way)
        try:
            await asyncio.sleep(script.seconds)
        finally:
            script.under_way -= 1
        if (hint in script.dies and script.deaths) or self.dead:
            script.deaths -= not self.dead
            self.dead = True
            raise EngineDied("gone")
        return Completion(f"A girl stands in a field at night and points at {hint} above.", "stop", 10, 5)

    async def close(self) -> None:
        pass


def star(shard: str, number: int) -> str:
    """In letters: captions that differ in digits alone are the same."""
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


def captioner(store: Store, script: Script, at_once: int = 8, retry_rejected: bool = False) -> Captioner:
    choice = Scripted(engine="scripted", model="none", at_once=at_once, script=script)
    task = CaptionTask(
        dataset=store.root, folder="captions", choice=choice, settings=SETTINGS, retry_rejected=retry_rejected
    )
    return Captioner(task)


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
    work = captioner(store, script)
    work(part)
    assert finished(store, "a") == expected("a", 30)
    assert (script.started, work.report().engines_started) == (3, 3)
    work.close()


@pytest.mark.parametrize("at_once", [1, 8, 30])
def test_a_picture_that_kills_its_engine_every_time_costs_its_own_row_alone(store: Store, at_once: int) -> None:
    part, script = write_images(store, "a", 30), Script(seconds=0.002, dies={star("a", 9), star("a", 20)})
    work = captioner(store, script, at_once)
    work(part)
    rows, good = finished(store, "a"), expected("a", 30)
    for number in (9, 20):
        assert rows[number] == (f"a:{number}", star("a", number), "engine died on the picture")
        rows[number] = good[number]
    assert rows == good
    assert script.started <= 7  # three deaths each
    work.close()


@pytest.mark.parametrize("store", ["local", "s3"], indirect=True)
def test_engines_that_die_without_an_answer_stop_the_job_which_goes_on_from_there_later(store: Store) -> None:
    part = write_images(store, "a", 60)
    script = Script(seconds=0.002, dies={star("a", number) for number in range(20, 60)})
    with pytest.raises(
        JobStopped, match=r"^7 engines in a row died before they answered anything \(gone\); .*--at-once"
    ):
        captioner(store, script, at_once=2)(part)
    done = set(kept(store, "a"))
    assert len(done) >= 20
    script.dies.clear()
    script.asked.clear()
    work = captioner(store, script)
    work(part)
    after = dict(zip((f"a:{number}" for number in range(60)), finished(store, "a"), strict=True))
    assert {after[id] for id in after.keys() - done} <= set(expected("a", 60))
    assert script.asked == {star("a", number): 1 for number in range(60) if f"a:{number}" not in done}
    work.close()


def test_what_a_job_killed_at_its_very_end_left_does_not_count_as_asked_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.captions.model_captions._ROWS_PER_FILE", 10)
    part, script = write_images(store, "a", 10), Script(dies={star("a", 4)})
    with monkeypatch.context() as killed:
        killed.setattr(Unfinished, "remove", lambda self: None)
        work = captioner(store, script)
        work(part)
        work.close()
    assert finished(store, "a")[4][2] == "engine died on the picture"
    assert len(list(kept(store, "a"))) == 10
    script.dies.clear()
    script.asked.clear()
    work = captioner(store, script, retry_rejected=True)
    work(part)
    assert script.asked == {star("a", 4): 1}
    assert finished(store, "a") == expected("a", 10)
    assert not list(kept(store, "a"))
    work.close()


def test_an_engine_that_cannot_start_stops_the_job_with_its_own_line(store: Store) -> None:
    part = write_images(store, "a", 5)
    with pytest.raises(JobStopped, match=r"^no weights: fetch them$"):
        captioner(store, Script(unusable=True))(part)
    assert not store.exists("captions/a.parquet")


def test_what_is_finished_is_kept_when_the_job_is_stopped(store: Store) -> None:
    part, script = write_images(store, "a", 100), Script(seconds=0.05)
    work = captioner(store, script, at_once=4)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, part)
        until = time.monotonic() + 20
        while work.report().rows < 8 and time.monotonic() < until:
            time.sleep(0.01)
        work.close()
        with pytest.raises(JobStopped, match="stopped"):
            future.result(timeout=20)
    assert 8 <= len(list(kept(store, "a"))) < 100


def test_two_shards_share_the_engine_so_that_its_places_are_full(store: Store) -> None:
    parts, script = [write_images(store, shard, 5) for shard in "ab"], Script(seconds=0.3)
    work = captioner(store, script, at_once=8)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, parts))
    assert script.most == 8
    assert [finished(store, shard) for shard in "ab"] == [expected(shard, 5) for shard in "ab"]
    work.close()


@pytest.mark.parametrize(
    ("size", "prepared"),
    [((1000, 500), (768, 384)), ((500, 1000), (384, 768)), ((640, 768), (640, 768)), ((3000, 301), (768, 77))],
)
def test_the_longer_side_is_at_most_what_the_engine_is_to_see(size: tuple[int, int], prepared: tuple[int, int]) -> None:
    encoded = io.BytesIO()
    Image.new("RGBA", size).save(encoded, "PNG")
    image = prepare(encoded.getvalue(), 768)
    assert not isinstance(image, Refused)
    assert (image.mode, image.size) == ("RGB", prepared)


def test_a_trial_takes_the_middles_of_equal_parts_of_all_rows() -> None:
    assert spread({"a": 60, "empty": 0, "b": 20}, 4) == {"a": [10, 30, 50], "b": [10]}
    assert spread({"a": 2, "b": 1}, 50) == {"a": [0, 1], "b": [0]}
