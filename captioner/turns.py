"""Who may ask the engine: so many requests at a time, and what happens when it dies or has grown old.

Belongs to one event loop; knows neither shards nor Ray.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from captioner.engines import EngineUnusable, VisionEngine


@dataclass
class Waits:
    """Seconds in which more could have been done."""

    pictures: float = 0.0  # the engine had room, and no picture was ready
    engine: float = 0.0  # pictures were ready, and the engine was full, or starting


class EngineTurns:
    """One engine at a time. It is started with the first turn, and again after `restart_after` pictures (0: never),
    because vLLM's memory grows over days, and after it was reported lost: each time when no turn is under way."""

    def __init__(self, start: Callable[[], Awaitable[VisionEngine]], at_once: int, restart_after: int = 0) -> None:
        self.started = 0  # engines
        self.seconds_starting = 0.0
        self._start = start
        self._restart_after = restart_after
        self._engine: VisionEngine | None = None
        self._unusable: EngineUnusable | None = None
        self._is_lost = False
        self._given = 0  # turns of this engine
        self._at_once = at_once
        self._slots = asyncio.Semaphore(at_once)
        self._gate = asyncio.Lock()  # held while an engine is exchanged
        self._exchange: asyncio.Task[None] | None = None
        self._none_under_way = asyncio.Event()
        self._none_under_way.set()
        self._under_way = self._ready = self._feeding = 0
        self._waits, self._since = Waits(), time.monotonic()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[tuple[VisionEngine, int]]:
        """The engine and its number. EngineUnusable where it does not start: then none does."""
        self._change(ready=1)
        try:
            await self._slots.acquire()
        except BaseException:
            self._change(ready=-1)
            raise
        try:
            try:
                async with self._gate:
                    engine = await self._current()
                    self._given += 1
                    self._change(under_way=1)
            finally:
                self._change(ready=-1)
            try:
                yield engine, self.started
            finally:
                self._change(under_way=-1)
        finally:
            self._slots.release()

    def lost(self, number: int) -> bool:
        """This engine died; whether that is news. Said of one that has been exchanged since, it changes nothing."""
        is_news = number == self.started and not self._is_lost
        self._is_lost |= is_news
        return is_news

    def feed(self, shards: int) -> None:
        """So many shards more (or, below 0, less) are being read: the engine may expect pictures."""
        self._change(feeding=shards)

    def waits(self) -> Waits:
        """Until now."""
        self._change()
        return replace(self._waits)

    async def close(self) -> None:
        if self._exchange:
            self._exchange.cancel()
        await self._end_engine()

    async def _end_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine:
            await engine.close()

    async def _current(self) -> VisionEngine:
        if self._unusable:
            raise self._unusable
        if self._exchange is None:
            old = self._restart_after and self._given >= self._restart_after
            if self._engine and not self._is_lost and not old:
                return self._engine
            await self._none_under_way.wait()
            self._exchange = asyncio.create_task(self._exchange_engine())
        try:
            # The turn that began this may be cancelled. What loads cannot be, and would be a second engine beside the
            # next turn's: that one waits for it instead.
            await asyncio.shield(self._exchange)
        finally:
            if self._exchange.done():
                self._exchange = None
        assert self._engine
        return self._engine

    async def _exchange_engine(self) -> None:
        await self._end_engine()
        self._is_lost, self._given = False, 0
        self.started += 1
        since = time.monotonic()
        try:
            self._engine = await self._start()
        except EngineUnusable as error:
            self._unusable = error
            raise
        finally:
            self.seconds_starting += time.monotonic() - since

    def _change(self, under_way: int = 0, ready: int = 0, feeding: int = 0) -> None:
        now = time.monotonic()
        if self._ready:
            self._waits.engine += now - self._since
        elif self._feeding and self._under_way < self._at_once:
            self._waits.pictures += now - self._since
        self._since = now
        self._under_way += under_way
        self._ready += ready
        self._feeding += feeding
        if self._under_way:
            self._none_under_way.clear()
        else:
            self._none_under_way.set()
