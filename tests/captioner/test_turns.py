"""One engine at a time: exchanged when it is old or dead, never while a turn is under way; waiting is measured."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from captioner.engines import EngineDied, EngineUnusable
from captioner.turns import EngineTurns


class Engines:
    """Starts engines that count who uses them."""

    name, model = "counted", ""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.log: list[str] = []
        self.under_way = self.most = 0

    async def start(self) -> Any:
        await asyncio.sleep(self.seconds)
        assert not self.under_way
        self.log.append("start")
        return self

    async def close(self) -> None:
        assert not self.under_way
        self.log.append("close")

    async def use(self, turns: EngineTurns, seconds: float = 0.001) -> int:
        async with turns.turn() as (_, number):
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            await asyncio.sleep(seconds)
            self.under_way -= 1
            return number


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), timeout=20))


def test_so_many_turns_at_a_time_and_another_engine_after_so_many_in_all() -> None:
    engines = Engines()
    turns = EngineTurns(engines.start, at_once=3, restart_after=10)

    async def work() -> list[int]:
        return await asyncio.gather(*(engines.use(turns) for _ in range(25)))

    numbers = run(work)
    assert [numbers.count(number) for number in (1, 2, 3)] == [10, 10, 5]
    assert engines.most == 3
    assert engines.log == ["start", "close", "start", "close", "start"]


def test_a_lost_engine_is_exchanged_once_however_many_turns_say_so() -> None:
    engines = Engines()
    turns = EngineTurns(engines.start, at_once=4)

    async def dies() -> int:
        for _ in range(3):
            try:
                async with turns.turn() as (_, number):
                    await asyncio.sleep(0.01)
                    if number == 1:
                        raise EngineDied("gone")
                    return number
            except EngineDied:
                turns.lost(1)
        raise AssertionError("died thrice")

    async def work() -> list[int]:
        return await asyncio.gather(*(dies() for _ in range(8)))

    assert run(work) == [2] * 8
    assert engines.log == ["start", "close", "start"]


def test_an_engine_that_cannot_start_is_not_tried_again() -> None:
    tries = []

    async def start() -> Any:
        tries.append(1)
        raise EngineUnusable("no weights")

    async def work() -> None:
        turns = EngineTurns(start, at_once=2)
        for _ in range(3):
            with pytest.raises(EngineUnusable, match="no weights"):
                async with turns.turn():
                    pass

    run(work)
    assert len(tries) == 1


def test_an_engine_that_loads_is_waited_for_also_when_the_turn_that_wanted_it_is_given_up() -> None:
    """As when the shard that was first fails: another engine would load beside it on the same GPU."""
    engines = Engines(seconds=0.2)
    turns = EngineTurns(engines.start, at_once=2)

    async def work() -> int:
        first, second = (asyncio.create_task(engines.use(turns)) for _ in range(2))
        await asyncio.sleep(0.05)
        first.cancel()
        number = await second
        await turns.close()
        return number

    assert run(work) == 1
    assert engines.log == ["start", "close"]


def test_seconds_are_counted_for_pictures_or_for_the_engine() -> None:
    engines = Engines(seconds=0.2)
    turns = EngineTurns(engines.start, at_once=1)

    async def work() -> tuple[float, float, float]:
        since = time.monotonic()
        turns.feed(1)
        await asyncio.sleep(0.3)  # no picture
        await asyncio.gather(engines.use(turns, 0.2), engines.use(turns, 0.2))  # starts for 0.2 s, then one waits 0.2 s
        await engines.use(turns, 0.2)  # nothing is ready, but nothing more would fit
        turns.feed(-1)
        await asyncio.sleep(0.3)  # nothing is wanted
        waits = turns.waits()
        return waits.pictures, waits.engine, time.monotonic() - since

    pictures, engine, seconds = run(work)
    assert pictures >= 0.29
    assert engine >= 0.39
    assert pictures + engine <= seconds - 0.49
    assert 0.19 <= turns.seconds_starting <= engine
