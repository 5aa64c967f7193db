"""One engine at a time: replaced when it is old or dead, never while a request is in flight; waiting is measured."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from captioner.engine_slots import EngineSlots
from captioner.engines import EngineDied, EngineUnusable


class Engines:
    """Starts engines that count their requests in flight."""

    name, model = "counted", ""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.log: list[str] = []
        self.in_flight = self.most = 0

    async def start(self) -> Any:
        await asyncio.sleep(self.seconds)
        assert not self.in_flight
        self.log.append("start")
        return self

    async def close(self) -> None:
        assert not self.in_flight
        self.log.append("close")

    async def use(self, slots: EngineSlots, seconds: float = 0.001) -> int:
        async with slots.acquire() as (_, number):
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
            await asyncio.sleep(seconds)
            self.in_flight -= 1
            return number


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), timeout=20))


def test_requests_in_flight_are_limited_and_the_engine_is_replaced_after_a_number_of_them() -> None:
    engines = Engines()
    slots = EngineSlots(engines.start, slots=3, restart_after=10)

    async def work() -> list[int]:
        return await asyncio.gather(*(engines.use(slots) for _ in range(25)))

    numbers = run(work)
    assert [numbers.count(number) for number in (1, 2, 3)] == [10, 10, 5]
    assert engines.most == 3
    assert engines.log == ["start", "close", "start", "close", "start"]


def test_a_dead_engine_is_replaced_once_however_often_it_is_marked() -> None:
    engines = Engines()
    slots = EngineSlots(engines.start, slots=4)

    async def dies() -> int:
        for _ in range(3):
            try:
                async with slots.acquire() as (_, number):
                    await asyncio.sleep(0.01)
                    if number == 1:
                        raise EngineDied("gone")
                    return number
            except EngineDied:
                slots.mark_dead(1)
        raise AssertionError("died three times")

    async def work() -> list[int]:
        numbers = await asyncio.gather(*(dies() for _ in range(8)))
        assert not slots.mark_dead(1)  # news of an engine that was replaced
        return [*numbers, await engines.use(slots)]

    assert run(work) == [2] * 9
    assert engines.log == ["start", "close", "start"]


def test_an_engine_that_cannot_start_is_not_started_again() -> None:
    tries = []

    async def start() -> Any:
        tries.append(1)
        raise EngineUnusable("no weights")

    async def work() -> None:
        slots = EngineSlots(start, slots=2)
        for _ in range(3):
            with pytest.raises(EngineUnusable, match="no weights"):
                async with slots.acquire():
                    pass

    run(work)
    assert len(tries) == 1


def test_a_loading_engine_is_kept_when_the_request_that_started_it_is_cancelled() -> None:
    """As when the first shard fails: otherwise a second engine would load on the same GPU."""
    engines = Engines(seconds=0.2)
    slots = EngineSlots(engines.start, slots=2)

    async def work() -> int:
        first, second = (asyncio.create_task(engines.use(slots)) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        number = await second
        await slots.close()
        return number

    assert run(work) == 1
    assert engines.log == ["start", "close"]


def test_waiting_is_counted_for_pictures_or_for_the_engine() -> None:
    engines = Engines(seconds=0.1)
    slots = EngineSlots(engines.start, slots=1)

    async def work() -> tuple[float, float, float]:
        since = time.monotonic()
        slots.add("reading", 1)
        await asyncio.sleep(0.15)  # no picture
        await asyncio.gather(engines.use(slots, 0.1), engines.use(slots, 0.1))  # starts for 0.1 s, then one waits 0.1 s
        await engines.use(slots, 0.1)  # no picture is ready, but no slot is free either
        slots.add("reading", -1)
        await asyncio.sleep(0.15)  # no shard is being read
        waits = await slots.wait_times()
        return waits.for_pictures, waits.for_engine, time.monotonic() - since

    pictures, engine, seconds = run(work)
    assert pictures >= 0.14
    assert engine >= 0.19
    assert pictures + engine <= seconds - 0.24
    assert 0.09 <= slots.seconds_starting <= engine
