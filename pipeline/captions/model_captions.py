"""Asks an engine about many pictures at a time, whatever happens to the engine. Knows neither shards nor Ray."""

import asyncio
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from PIL import Image

from captioner.captioning import ENGINE_FAILURES, Outcome, caption_image
from captioner.engine_slots import EngineSlots
from captioner.engines import EngineDied, EngineFailure, EngineUnusable
from captioner.engines.tags import caption_from_tags
from captioner.requests import CaptionRequest
from pipeline.captions.engine_config import CaptionSettings, EngineConfig
from pipeline.captions.stats import EngineTimes
from pipeline.core.errors import JobStopped

_MAX_DEATHS: Final = 3  # of engines while they had the same picture: then it gets the caption of its tags
_MOST_TOLD: Final = 20
_MAX_FUTILE_DEATHS: Final = 6  # of engines in a row that answered nothing
# The job stops after more failures of the engine in this many rows: another thousand rows would not fare better.
_FAILURE_WINDOW: Final = 1000
_MAX_FAILURES: Final = 200
_CLOSE_SECONDS: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class CaptionTask:
    """What every process of a job needs to know."""

    dataset: str
    folder: str  # captions, or captions/<name>
    engine: EngineConfig
    settings: CaptionSettings
    restart_after: int = 0  # pictures; 0: never
    retry_rejected: bool = False


@dataclass(frozen=True)
class PendingRow:
    """A row without a caption yet."""

    request: CaptionRequest
    picture: Image.Image | str  # RGB and resized, or the reason why there is none
    previous_attempts: int = 0


class Captioner:
    """An engine and the event loop that asks it. The engine starts with the first picture."""

    def __init__(self, task: CaptionTask) -> None:
        self.task = task
        self._started = time.monotonic()
        self._slots = EngineSlots(task.engine.start, task.engine.max_in_flight, task.restart_after)
        self._failures: deque[str] = deque(maxlen=_FAILURE_WINDOW)  # engine failures, "" for other rows
        self._stopped = ""  # reason
        self._one_suspect = asyncio.Lock()
        self._futile_deaths = 0  # of engines since one last answered
        self._told = set[str]()  # what engines said of requests that failed
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="captioner")
        self._thread.start()
        self._loop.call_soon_threadsafe(self._slots.add, "reading", 1)

    def caption(self, rows: Sequence[PendingRow]) -> list[Outcome]:
        """The outcome of each row. Calls from several threads share the engine, which keeps its batch full.

        Raises JobStopped if the engine is unusable, fails too often, or dies again and again without an answer.
        """
        try:
            return asyncio.run_coroutine_threadsafe(self._caption_all(rows), self._loop).result()
        except EngineUnusable as error:
            self._stopped = self._stopped or str(error)
            raise JobStopped(self._stopped) from error

    def times(self) -> EngineTimes:
        """Times so far."""
        waits = asyncio.run_coroutine_threadsafe(self._slots.wait_times(), self._loop).result()
        return EngineTimes(
            seconds=time.monotonic() - self._started,
            waited_for_pictures=waits.for_pictures,
            waited_for_engine=waits.for_engine,
            starting=self._slots.seconds_starting,
            engines_started=self._slots.engines_started,
        )

    def close(self) -> None:
        """Ends the engine. Calls in progress fail."""
        asyncio.run_coroutine_threadsafe(self._slots.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()

    async def _caption_all(self, rows: Sequence[PendingRow]) -> list[Outcome]:
        """Cancels the other rows if one raises."""
        tasks = [asyncio.create_task(self._caption(row)) for row in rows]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _caption(self, row: PendingRow) -> Outcome:
        if isinstance(row.picture, str):
            return Outcome(caption_from_tags(row.request, row.picture))
        outcome = await self._ask(row, row.picture)
        self._stop_if_failing(outcome)
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

    def _stop_if_failing(self, outcome: Outcome) -> None:
        """Raises EngineUnusable if the engine fails too often, or failed too often before."""
        reason = outcome.answer.reason
        self._failures.append(str(reason) if reason in ENGINE_FAILURES else "")
        if outcome.failure and outcome.failure not in self._told:
            self._told.add(outcome.failure)
            if len(self._told) <= _MOST_TOLD:  # the worker's log
                print(f"caption: {outcome.answer.id}: {reason}: {outcome.failure}", file=sys.stderr, flush=True)
        failures = Counter(filter(None, self._failures))
        if failures.total() > _MAX_FAILURES:
            [(most_frequent, _)] = failures.most_common(1)
            said = f" ({outcome.failure})" if outcome.failure else ""
            self._stopped = self._stopped or (
                f"the engine failed on {failures.total()} of the last {len(self._failures)} rows, mostly: "
                f"{most_frequent}{said}; fix it, run the same command again, and once more with --retry-rejected"
            )
        if self._stopped:
            raise EngineUnusable(self._stopped)
