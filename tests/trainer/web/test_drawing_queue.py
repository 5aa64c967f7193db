"""The queue: order, concurrency, its bound, and what a waiting page is told."""

import asyncio

import pytest

from trainer.web.drawing_queue import DrawingQueue, QueueFull


async def _wait(queue: DrawingQueue, entry: object, done: list[object]) -> None:
    async for _ in queue.positions(entry):
        pass
    done.append(entry)


def test_pictures_are_drawn_in_order_and_a_full_queue_refuses_more() -> None:
    async def check() -> None:
        queue, done = DrawingQueue(concurrency=2, max_size=3), []
        entries = [queue.join() for _ in range(5)]
        assert queue.waiting == 3
        with pytest.raises(QueueFull, match="2 being drawn and 3 waiting"):
            queue.join()
        waits = [asyncio.create_task(_wait(queue, entry, done)) for entry in entries]
        await asyncio.sleep(0.01)
        assert done == entries[:2]
        queue.leave(entries[3])  # while it waits
        waits[3].cancel()
        await asyncio.sleep(0.01)
        assert done == entries[:2]
        queue.leave(entries[1])
        await asyncio.sleep(0.01)
        assert done == entries[:3]
        queue.leave(entries[0])
        await asyncio.sleep(0.01)
        assert done == [*entries[:3], entries[4]]
        assert queue.waiting == 0

    asyncio.run(check())


def test_a_waiting_page_is_told_how_many_are_before_it() -> None:
    async def check() -> None:
        queue = DrawingQueue(concurrency=1, max_size=2)
        first, second, third = (queue.join() for _ in range(3))
        positions = []
        async for ahead in queue.positions(third):
            positions.append(ahead)
            queue.leave({2: first, 1: second}[ahead])
        assert positions == [2, 1]

    asyncio.run(check())
