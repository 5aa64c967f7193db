"""Limits the requests that an engine has in flight, and replaces an engine that has died or has served many pictures.

Belongs to one event loop; knows neither shards nor Ray.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal

from captioner.engines import EngineUnusable, VisionEngine


@dataclass
class WaitTimes:
    """Seconds in which more could have been done."""

    for_pictures: float = 0.0  # the engine had a free slot, but no picture was ready
    for_engine: float = 0.0  # a picture was ready, but the engine was full or starting


class EngineSlots:
    """`slots` places for requests, all to one engine at a time.

    The engine is started by the first request. It is replaced after `restart_after` pictures (0: never), because vLLM's
    memory grows over days, and after it was marked dead; always while no request is in flight.
    """

    def __init__(self, start: Callable[[], Awaitable[VisionEngine]], slots: int, restart_after: int = 0) -> None:
        self.engines_started = 0
        self.seconds_starting = 0.0
        self._start = start
        self._restart_after = restart_after
        self._engine: VisionEngine | None = None
        self._unusable: EngineUnusable | None = None
        self._is_dead = False
        self._served = 0  # pictures, by this engine
        self._count = slots
        self._slots = asyncio.Semaphore(slots)
        self._replacing = asyncio.Lock()  # held while the engine is replaced
        self._replacement: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()  # set while no request is in flight
        self._idle.set()
        self._counts = Counter[str]()
        self._waits, self._since = WaitTimes(), time.monotonic()

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[tuple[VisionEngine, int]]:
        """A slot: yields the engine and its number, counted from 1. Raises EngineUnusable if no engine can start."""
        with ExitStack() as waiting:
            self.add("ready", 1)
            waiting.callback(self.add, "ready", -1)
            async with self._slots:
                async with self._replacing:
                    engine = await self._current_engine()
                    self._served += 1
                    self.add("in flight", 1)
                try:
                    waiting.close()
                    yield engine, self.engines_started
                finally:
                    self.add("in flight", -1)

    def mark_dead(self, number: int) -> bool:
        """Marks engine `number` for replacement. Returns False if it was replaced or marked before."""
        is_news = number == self.engines_started and not self._is_dead
        self._is_dead |= is_news
        return is_news

    async def wait_times(self) -> WaitTimes:
        """Times waited so far."""
        self.add("ready", 0)
        return replace(self._waits)

    async def close(self) -> None:
        if self._replacement:
            self._replacement.cancel()
        await self._close_engine()

    async def _close_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine:
            await engine.close()

    async def _current_engine(self) -> VisionEngine:
        if self._unusable:
            raise self._unusable
        if self._replacement is None:
            is_old = self._restart_after and self._served >= self._restart_after
            if self._engine and not self._is_dead and not is_old:
                return self._engine
            await self._idle.wait()
            self._replacement = asyncio.create_task(self._replace_engine())
        try:
            # The request that began this may be cancelled, but loading cannot be: the next request waits for it instead
            # of loading a second engine beside it.
            await asyncio.shield(self._replacement)
        finally:
            if self._replacement.done():
                self._replacement = None
        assert self._engine
        return self._engine

    async def _replace_engine(self) -> None:
        await self._close_engine()
        self._is_dead, self._served = False, 0
        self.engines_started += 1
        since = time.monotonic()
        try:
            self._engine = await self._start()
        except EngineUnusable as error:
            self._unusable = error
            raise
        finally:
            self.seconds_starting += time.monotonic() - since

    def add(self, kind: Literal["reading", "ready", "in flight"], change: int) -> None:
        """Change the number of shards being read (which may give pictures), of pictures that wait for a slot, or of
        requests in flight; and count the time since the last change."""
        now = time.monotonic()
        if self._counts["ready"]:
            self._waits.for_engine += now - self._since
        elif self._counts["reading"] and self._counts["in flight"] < self._count:
            self._waits.for_pictures += now - self._since
        self._since = now
        self._counts[kind] += change
        if self._counts["in flight"]:
            self._idle.clear()
        else:
            self._idle.set()
