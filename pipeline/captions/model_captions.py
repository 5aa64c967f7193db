"""A model's captions, shard by shard. Runs in a Ray actor; knows nothing of Ray.

A thread for each shard reads its rows and hands them over, a few threads decode, and one event loop asks the engine.
As more pictures are under way than the engine takes, its batch stays full, also where one shard ends.
"""

import asyncio
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, Final

import pyarrow as pa
from PIL import Image

from captioner.answers import RepeatedCaptions
from captioner.attempts import ENGINE_FAILURES, MODEL_FAILURES, Outcome, caption, from_tags
from captioner.engines import EngineDied, EngineUnusable, Failure
from captioner.engines.tags import TagEngine
from captioner.requests import Answer, Reason, Request
from captioner.turns import EngineTurns
from pipeline.captions.costs import Costs
from pipeline.captions.engine_choice import CaptionSettings, EngineChoice
from pipeline.captions.partial_captions import Unfinished
from pipeline.captions.tag_captions import TAG_COLUMNS, ImageShard, caption_row, request_of
from pipeline.core.errors import JobStopped
from pipeline.core.records import CAPTIONS
from pipeline.pictures.decoder import Refused, decode
from pipeline.storage.scan import read_pictures
from pipeline.storage.shards import Store
from pipeline.tagging.tags import TagReader

Row = dict[str, Any]  # of CAPTIONS

_ROWS_PER_FILE: Final = 256  # of an unfinished shard: what a killed job loses of each
_MOST_DEATHS: Final = 3  # of engines while they were asked about one picture: then the picture kills them
_MOST_IN_VAIN: Final = 6  # engines in a row that died before they answered anything
# More engine failures than this among so many rows: something is wrong that another thousand rows will not mend.
_JUDGED_ROWS: Final = 1000
_MOST_FAILURES: Final = 200
_SHORTEST_SIDE: Final = 16  # pixels: one patch of Pixtral
_LOOK_UP: Final = 1.0  # seconds between looks whether the job has been stopped
_CLOSE_SECONDS: Final = 10.0
_TAG_WRITER: Final = {"engine": TagEngine.name, "model": TagEngine.model, "prompt_version": TagEngine.prompt_version}


@dataclass(frozen=True, kw_only=True)
class CaptionTask:
    """What every actor of a job needs to know."""

    dataset: str
    folder: str  # captions, or captions/<name>
    choice: EngineChoice
    settings: CaptionSettings
    restart_after: int = 0  # pictures; 0: never
    retry_rejected: bool = False
    threads: int = 2  # that decode


@dataclass(frozen=True)
class Waiting:
    """A row that is to be captioned."""

    request: Request
    picture: bytes
    drawn_before: int = 0


class Captioner:
    """All that an actor holds. Several shards may be captioned at a time, each in a thread of its own."""

    def __init__(self, task: CaptionTask) -> None:
        under_way = task.choice.under_way
        self.task, self.store = task, Store(task.dataset)
        self._turns = EngineTurns(task.choice.start, under_way, task.restart_after)
        self._room = threading.BoundedSemaphore(under_way + max(8, under_way // 4, 2 * task.threads))
        self._decoders = ThreadPoolExecutor(task.threads)
        self._counting = threading.Lock()
        self._costs = Costs()
        self._failures: deque[str] = deque(maxlen=_JUDGED_ROWS)  # engine failures, "" for other rows
        self._stopped = ""  # why
        self._working = 0  # shards
        self._suspects = asyncio.Lock()
        self._in_vain = 0  # engines that died since one last answered
        self._loop = asyncio.new_event_loop()
        self._looping = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._looping.start()

    def __call__(self, part: ImageShard) -> None:
        """Write <folder>/<shard>: the rows of images/<shard>, in their order. What is finished is kept whatever
        happens: the next call for the same shard goes on from there."""
        with self._counting:
            self._working += 1
        try:
            self._caption_shard(part)
        finally:
            with self._counting:
                self._working -= 1

    def _caption_shard(self, part: ImageShard) -> None:
        task, name = self.task, f"{self.task.folder}/{part.shard}.parquet"
        made_from = task.settings.made_from(part.digest)
        unfinished = Unfinished(self.store, f"{task.folder}/partial/{part.shard}", CAPTIONS, made_from)
        posts = self.store.read_table(f"images/{part.shard}.parquet", TAG_COLUMNS).to_pylist()
        reader = TagReader()
        requests = [request_of(post, reader) for post in posts]
        before = self._finished_before(name, made_from)
        drawn_before = {id: row["attempts"] or 0 for id, row in before.items()}
        # Rows of no more attempts than the finished ones: a job was killed after it wrote these, before it cleared up.
        later = {id: row for id, row in unfinished.read().items() if row["attempts"] > drawn_before.get(id, -1)}
        rows = {id: row for id, row in before.items() if row["reason"] not in MODEL_FAILURES} | later
        with self._counting:
            self._costs.rows += len(rows)
            self._costs.kept += len(rows)
        fresh: list[Row] = []

        def keep(outcome: Outcome) -> None:
            fresh.append(row := caption_row(outcome, task.settings))
            rows[row["id"]] = row
            if len(fresh) == _ROWS_PER_FILE:
                unfinished.write(fresh)
                fresh.clear()

        try:
            todo = {number: request for number, request in enumerate(requests) if request.id not in rows}
            self.answer(with_pictures(self.store, part.shard, todo, drawn_before), keep)
        except BaseException:
            unfinished.write(fresh)
            raise
        final = without_repeated([rows[request.id] for request in requests], requests)
        asked = {request.id for request in todo.values()}
        repeated = sum(row["reason"] == Reason.REPEATED for row in final if row["id"] in asked)
        if repeated:
            with self._counting:  # only now: their captions were good until all were known
                self._costs.rejected[str(Reason.REPEATED)] += repeated
        table = pa.RecordBatch.from_pylist(final, CAPTIONS)
        self.store.write_table(name, table, CAPTIONS, made_from=json.dumps(made_from))
        unfinished.remove()

    def answer(self, waiting: Iterable[Waiting], keep: Callable[[Outcome], None]) -> None:
        """Caption these rows; `keep` gets each, in the order in which they are finished, and also all that are finished
        when this ends in an exception.

        JobStopped where the engine is unusable, fails too often, or dies again and again without an answer.
        """
        finished: SimpleQueue[Future[Outcome]] = SimpleQueue()
        under_way: set[Future[Outcome]] = set()

        def done(future: Future[Outcome]) -> None:
            self._room.release()
            finished.put(future)

        def take(future: Future[Outcome]) -> None:
            under_way.discard(future)
            keep(future.result())

        try:
            with self._reading():
                for row in waiting:
                    while not self._room.acquire(timeout=_LOOK_UP):
                        self._check_going()
                    future = asyncio.run_coroutine_threadsafe(self._answer(row), self._loop)
                    under_way.add(future)
                    future.add_done_callback(done)
                    while not finished.empty():
                        take(finished.get())
                    self._check_going()
            while under_way:
                try:
                    take(finished.get(timeout=_LOOK_UP))
                except Empty:
                    self._check_going()
        except EngineUnusable as error:
            self._stopped = str(error)
            raise JobStopped(str(error)) from error
        finally:
            for future in under_way:
                future.cancel()
            for future in list(under_way):
                if future.done() and not future.cancelled() and not future.exception():
                    take(future)

    @property
    def seconds_starting(self) -> float:
        """What starting the engine has taken."""
        return self._turns.seconds_starting

    def report(self) -> Costs:
        """What was done until now."""
        waits = asyncio.run_coroutine_threadsafe(self._waits(), self._loop).result()
        with self._counting:
            return replace(
                self._costs,
                rejected=Counter(self._costs.rejected),
                waited_for_pictures=waits[0],
                waited_for_engine=waits[1],
                engines_started=self._turns.started,
            )

    def close(self) -> None:
        """End the engine; shards that are under way keep what they have and fail."""
        self._stopped = self._stopped or "the job was stopped"
        until = time.monotonic() + _CLOSE_SECONDS
        while self._working and time.monotonic() < until:
            time.sleep(0.05)
        asyncio.run_coroutine_threadsafe(self._turns.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._looping.join(timeout=_CLOSE_SECONDS)
        if not self._looping.is_alive():
            self._loop.close()

    def _finished_before(self, name: str, made_from: Mapping[str, str]) -> dict[str, Row]:
        """Rows by id of the finished shard, where its rejected ones are to be asked again."""
        if not self.task.retry_rejected or not self.store.exists(name):
            return {}
        if json.loads(self.store.metadata(name).get("made_from", "{}")) != made_from:
            return {}
        return {row["id"]: row for row in self.store.read_table(name).to_pylist()}

    async def _answer(self, row: Waiting) -> Outcome:
        image = await self._loop.run_in_executor(self._decoders, prepare, row.picture, self.task.settings.max_side)
        if isinstance(image, Refused):
            outcome = Outcome(from_tags(row.request, image.reason.value))
        else:
            outcome = await self._ask(row, image)
        self._count(outcome, row.drawn_before)
        return outcome

    async def _ask(self, row: Waiting, image: Image.Image) -> Outcome:
        """Rows that were under way when an engine died are suspects, and asked again one at a time: the one that kills
        engines is then found out, and gets the tags' caption, while the others among them are captioned."""
        try:
            return await self._ask_once(row, image)
        except EngineDied:
            pass
        for _ in range(_MOST_DEATHS - 1):
            async with self._suspects:
                try:
                    return await self._ask_once(row, image)
                except EngineDied:
                    continue
        return Outcome(from_tags(row.request, Failure.DIED), row.drawn_before + _MOST_DEATHS)

    async def _ask_once(self, row: Waiting, image: Image.Image) -> Outcome:
        choice, settings = self.task.choice, self.task.settings
        async with self._turns.turn() as (engine, number):
            try:
                outcome = await caption(
                    row.request, image, engine, settings.sampling, settings.prompt_version, choice.patience,
                    row.drawn_before,
                )  # fmt: skip
            except EngineDied as error:
                self._in_vain += self._turns.lost(number)
                if self._in_vain > _MOST_IN_VAIN:
                    raise EngineUnusable(
                        f"{self._in_vain} engines in a row died before they answered anything ({error}); often memory: "
                        "give a lower --at-once or --max-side, and run the same command again"
                    ) from error
                raise
        self._in_vain = 0
        return outcome

    def _count(self, outcome: Outcome, drawn_before: int) -> None:
        reason = outcome.answer.reason
        with self._counting:
            self._costs.rows += 1
            self._costs.attempts += max(0, outcome.attempts - drawn_before)
            self._costs.tokens_in += outcome.tokens_in
            self._costs.tokens_out += outcome.tokens_out
            if reason:
                self._costs.rejected[str(reason)] += 1
            self._failures.append(str(reason) if reason in ENGINE_FAILURES else "")
            failed = Counter(filter(None, self._failures))
            if failed.total() > _MOST_FAILURES:
                [(most, _)], judged = failed.most_common(1), len(self._failures)
                self._stopped = self._stopped or (
                    f"the engine failed on {failed.total()} of the last {judged} rows, mostly: {most}; see to it and "
                    "run the same command again (and at the end once with --retry-rejected)"
                )

    async def _waits(self) -> tuple[float, float]:
        waits = self._turns.waits()
        return waits.pictures, waits.engine

    @contextmanager
    def _reading(self) -> Iterator[None]:
        self._loop.call_soon_threadsafe(self._turns.feed, 1)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._turns.feed, -1)

    def _check_going(self) -> None:
        if self._stopped:
            raise JobStopped(self._stopped)


def with_pictures(
    store: Store, shard: str, requests: Mapping[int, Request], drawn_before: Mapping[str, int]
) -> Iterator[Waiting]:
    """Some rows of a shard, by their number, which grows."""
    for number, picture in read_pictures(store, f"images/{shard}.parquet", list(requests)):
        request = requests[number]
        yield Waiting(request, picture, drawn_before.get(request.id, 0))


def prepare(data: bytes, max_side: int) -> Image.Image | Refused:
    """As the engine takes it: RGB, the longer side at most max_side pixels, no side shorter than a patch."""
    picture = decode(data)
    if isinstance(picture, Refused):
        return picture
    image = picture.image
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(_SHORTEST_SIDE, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def without_repeated(rows: list[Row], requests: Sequence[Request]) -> list[Row]:
    """The rows of a shard, those whose caption the model gave to many pictures with the tags' caption instead."""
    seen = RepeatedCaptions()
    for row in rows:
        if row["reason"] is None:
            seen.check(Answer(row["id"], row["caption"], None))
    repeated = seen.repeated()
    return [
        row | _TAG_WRITER | {"caption": from_tags(request, "").caption, "reason": str(Reason.REPEATED), "notes": []}
        if row["id"] in repeated
        else row
        for row, request in zip(rows, requests, strict=True)
    ]
