"""Captions of whole shards by a model, in a Ray actor. Knows nothing of Ray.

One thread per shard reads rows, a few threads decode, and one event loop asks the engine. More pictures are in flight
than the engine takes at a time, so its batch stays full, also where one shard ends.
"""

import asyncio
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, Final

from PIL import Image

from captioner.answers import repeated_captions
from captioner.captioning import ENGINE_FAILURES, MODEL_FAILURES, Outcome, caption_image
from captioner.engine_slots import EngineSlots
from captioner.engines import EngineDied, EngineFailure, EngineUnusable
from captioner.engines.tags import TAG_ENGINE, caption_from_tags
from captioner.requests import CaptionReason, CaptionRequest
from pipeline.captions.engine_config import CaptionSettings, EngineConfig
from pipeline.captions.partial_captions import PartialShard
from pipeline.captions.stats import CaptionStats
from pipeline.captions.tag_captions import ImageShard, caption_row, read_requests, write_captions
from pipeline.core.errors import JobStopped
from pipeline.pictures.decoder import Refused, decode
from pipeline.storage.scan import read_pictures
from pipeline.storage.shards import Store

Row = dict[str, Any]  # of CAPTIONS

_ROWS_PER_FILE: Final = 256  # of a partial shard: what a killed job loses at most of each
_MAX_DEATHS: Final = 3  # of engines while they had the same picture: then it gets the caption of its tags
_MAX_FUTILE_DEATHS: Final = 6  # of engines in a row that answered nothing
# The job stops after more failures of the engine in this many rows: another thousand rows would not fare better.
_FAILURE_WINDOW: Final = 1000
_MAX_FAILURES: Final = 200
_MIN_SIDE: Final = 16  # pixels: one patch of Pixtral
_POLL_SECONDS: Final = 1.0  # between checks whether the job was stopped
_CLOSE_SECONDS: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class CaptionTask:
    """What every worker of a job needs to know."""

    dataset: str
    folder: str  # captions, or captions/<name>
    engine: EngineConfig
    settings: CaptionSettings
    restart_after: int = 0  # pictures; 0: never
    retry_rejected: bool = False
    threads: int = 2  # for decoding


@dataclass(frozen=True)
class PendingRow:
    """A row without a caption yet."""

    request: CaptionRequest
    picture: bytes
    previous_attempts: int = 0


class CaptionWorker:
    """The state of an actor. It may be called for several shards at a time, each in its own thread."""

    def __init__(self, task: CaptionTask) -> None:
        in_flight = task.engine.max_in_flight
        self.task, self.store = task, Store(task.dataset)
        self._slots = EngineSlots(task.engine.start, in_flight, task.restart_after)
        self._room = threading.BoundedSemaphore(in_flight + max(8, in_flight // 4, 2 * task.threads))
        self._decoders = ThreadPoolExecutor(task.threads)
        self._lock = threading.Lock()  # for the four that follow
        self._stats = CaptionStats()
        self._failures: deque[str] = deque(maxlen=_FAILURE_WINDOW)  # engine failures, "" for other rows
        self._stopped = ""  # reason
        self._working = 0  # shards
        self._one_suspect = asyncio.Lock()
        self._futile_deaths = 0  # of engines since one last answered
        self._loop = asyncio.new_event_loop()
        self._loop_thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._loop_thread.start()

    def __call__(self, part: ImageShard) -> None:
        """Write <folder>/<shard>: the rows of images/<shard> in their order. Finished rows are kept whatever happens:
        the next call for the same shard continues from there."""
        with self._lock:
            self._working += 1
        try:
            self._caption_shard(part)
        finally:
            with self._lock:
                self._working -= 1

    def _caption_shard(self, part: ImageShard) -> None:
        task, name = self.task, f"{self.task.folder}/{part.shard}.parquet"
        provenance = task.settings.provenance(part.digest)
        partial = PartialShard(self.store, f"{task.folder}/partial/{part.shard}", provenance)
        requests = read_requests(self.store, part.shard)
        before = self._rows_to_retry(name, provenance)
        attempts = {id: row["attempts"] or 0 for id, row in before.items()}
        # A job killed after it wrote the shard may have left partial rows that have no more attempts than the shard's.
        later = {id: row for id, row in partial.read().items() if row["attempts"] > attempts.get(id, -1)}
        rows = {id: row for id, row in before.items() if row["reason"] not in MODEL_FAILURES} | later
        with self._lock:
            self._stats.rows += len(rows)
            self._stats.kept += len(rows)
        unwritten: list[Row] = []

        def keep(outcome: Outcome) -> None:
            unwritten.append(row := caption_row(outcome, task.settings))
            rows[row["id"]] = row
            if len(unwritten) == _ROWS_PER_FILE:
                partial.write(unwritten)
                unwritten.clear()

        try:
            todo = {number: request for number, request in enumerate(requests) if request.id not in rows}
            self.caption_rows(read_pending(self.store, part.shard, todo, attempts), keep)
        except BaseException:
            partial.write(unwritten)
            raise
        final = replace_repeated([rows[request.id] for request in requests], requests)
        asked = {request.id for request in todo.values()}
        repeated = sum(row["reason"] == CaptionReason.REPEATED for row in final if row["id"] in asked)
        with self._lock:  # repeated captions are known only when all rows have one
            self._stats.rejected += Counter({str(CaptionReason.REPEATED): repeated})
        write_captions(self.store, name, final, provenance)
        partial.remove()

    def _rows_to_retry(self, name: str, provenance: Mapping[str, str]) -> dict[str, Row]:
        """All rows of the finished shard by id, if the job retries its rejected ones."""
        if not self.task.retry_rejected or not self.store.exists(name):
            return {}
        if json.loads(self.store.metadata(name).get("made_from", "{}")) != provenance:
            return {}
        return {row["id"]: row for row in self.store.read_table(name).to_pylist()}

    def caption_rows(self, pending: Iterable[PendingRow], keep: Callable[[Outcome], None]) -> None:
        """Caption these rows. `keep` gets each outcome as it finishes, also those that have finished when this raises.

        Raises JobStopped if the engine is unusable, fails too often, or dies again and again without an answer.
        """
        finished: SimpleQueue[Future[Outcome]] = SimpleQueue()
        in_flight: set[Future[Outcome]] = set()

        def on_done(future: Future[Outcome]) -> None:
            self._room.release()
            finished.put(future)

        def take(future: Future[Outcome]) -> None:
            in_flight.discard(future)
            keep(future.result())

        try:
            with ExitStack() as reading:
                self._loop.call_soon_threadsafe(self._slots.add, "reading", 1)
                reading.callback(self._loop.call_soon_threadsafe, self._slots.add, "reading", -1)
                for row in pending:
                    while not self._room.acquire(timeout=_POLL_SECONDS):
                        self._raise_if_stopped()
                    future = asyncio.run_coroutine_threadsafe(self._caption(row), self._loop)
                    in_flight.add(future)
                    future.add_done_callback(on_done)
                    while not finished.empty():
                        take(finished.get())
                    self._raise_if_stopped()
            while in_flight:
                try:
                    take(finished.get(timeout=_POLL_SECONDS))
                except Empty:
                    self._raise_if_stopped()
        except EngineUnusable as error:
            self._stopped = str(error)
            raise JobStopped(str(error)) from error
        finally:
            for future in in_flight:
                future.cancel()
            for future in list(in_flight):
                if future.done() and not future.cancelled() and not future.exception():
                    take(future)

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            raise JobStopped(self._stopped)

    def report(self) -> CaptionStats:
        """Totals so far."""
        waits = asyncio.run_coroutine_threadsafe(self._slots.wait_times(), self._loop).result()
        with self._lock:
            return replace(
                self._stats,
                rejected=Counter(self._stats.rejected),
                waited_for_pictures=waits.for_pictures,
                waited_for_engine=waits.for_engine,
                engines_started=self._slots.engines_started,
                seconds_starting=self._slots.seconds_starting,
            )

    def close(self) -> None:
        """End the engine. Calls in progress keep their finished rows and raise JobStopped."""
        self._stopped = self._stopped or "the job was stopped"
        until = time.monotonic() + _CLOSE_SECONDS
        while self._working and time.monotonic() < until:
            time.sleep(0.05)
        asyncio.run_coroutine_threadsafe(self._slots.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop_thread.join(timeout=_CLOSE_SECONDS)
        if not self._loop_thread.is_alive():
            self._loop.close()

    async def _caption(self, row: PendingRow) -> Outcome:
        image = await self._loop.run_in_executor(self._decoders, prepare, row.picture, self.task.settings.max_side)
        if isinstance(image, Refused):
            outcome = Outcome(caption_from_tags(row.request, image.reason.value))
        else:
            outcome = await self._ask(row, image)
        self._count(outcome, row.previous_attempts)
        return outcome

    async def _ask(self, row: PendingRow, image: Image.Image) -> Outcome:
        """Rows that were in flight when an engine died are retried one at a time. This finds the row that kills them,
        which gets a caption from its tags."""
        try:
            return await self._ask_once(row, image)
        except EngineDied:
            pass
        for _ in range(_MAX_DEATHS - 1):
            async with self._one_suspect:
                try:
                    return await self._ask_once(row, image)
                except EngineDied:
                    continue
        return Outcome(caption_from_tags(row.request, EngineFailure.DIED), row.previous_attempts + _MAX_DEATHS)

    async def _ask_once(self, row: PendingRow, image: Image.Image) -> Outcome:
        settings = self.task.settings
        async with self._slots.acquire() as (engine, number):
            try:
                outcome = await caption_image(
                    row.request, image, engine, settings.sampling, settings.prompt_version,
                    self.task.engine.attempt_timeout, row.previous_attempts,
                )  # fmt: skip
            except EngineDied as error:
                self._futile_deaths += self._slots.mark_dead(number)
                if self._futile_deaths > _MAX_FUTILE_DEATHS:
                    raise EngineUnusable(
                        f"{self._futile_deaths} engines in a row died before they answered anything ({error}); often "
                        "they lack memory: give a lower --at-once or --max-side, and run the same command again"
                    ) from error
                raise
        self._futile_deaths = 0
        return outcome

    def _count(self, outcome: Outcome, previous_attempts: int) -> None:
        reason = outcome.answer.reason
        with self._lock:
            self._stats.rows += 1
            self._stats.attempts += max(0, outcome.attempts - previous_attempts)
            self._stats.tokens_in += outcome.tokens_in
            self._stats.tokens_out += outcome.tokens_out
            if reason:
                self._stats.rejected[str(reason)] += 1
            self._failures.append(str(reason) if reason in ENGINE_FAILURES else "")
            failures = Counter(filter(None, self._failures))
            if failures.total() > _MAX_FAILURES:
                [(most_frequent, _)] = failures.most_common(1)
                self._stopped = self._stopped or (
                    f"the engine failed on {failures.total()} of the last {len(self._failures)} rows, mostly: "
                    f"{most_frequent}; fix it, run the same command again, and once more with --retry-rejected"
                )


def read_pending(
    store: Store, shard: str, requests: Mapping[int, CaptionRequest], attempts: Mapping[str, int]
) -> Iterator[PendingRow]:
    """Rows of a shard with their pictures. `requests` by row number, in ascending order; previous attempts by id."""
    for number, picture in read_pictures(store, f"images/{shard}.parquet", list(requests)):
        request = requests[number]
        yield PendingRow(request, picture, attempts.get(request.id, 0))


def prepare(data: bytes, max_side: int) -> Image.Image | Refused:
    """The picture for the engine: RGB, the longer side at most `max_side` pixels, each side at least a patch."""
    picture = decode(data)
    if isinstance(picture, Refused):
        return picture
    image = picture.image
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(_MIN_SIDE, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def replace_repeated(rows: list[Row], requests: Sequence[CaptionRequest]) -> list[Row]:
    """The rows of a shard, in which captions that the model gave to many pictures are replaced by those of the tags."""
    repeated = repeated_captions({row["id"]: row["caption"] for row in rows if row["reason"] is None})
    replaced = {"reason": str(CaptionReason.REPEATED), "notes": [], **TAG_ENGINE}
    return [
        row | replaced | {"caption": caption_from_tags(request).caption} if row["id"] in repeated else row
        for row, request in zip(rows, requests, strict=True)
    ]
