"""The queue of pictures that wait to be drawn.

gradio's own queue cannot be used: it has a toast of its own for a full queue, no length of 0, and counts a picture that
could be drawn at once as waiting.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

_POLL_SECONDS = 1.0  # a waiting page is told its place this often, so that a closed one is noticed


class QueueFull(Exception):
    """The message is for the visitor."""


class DrawingQueue:
    """First come, first served, in one event loop: `concurrency` pictures are drawn at once and `max_size` may wait."""

    def __init__(self, concurrency: int, max_size: int) -> None:
        self._concurrency, self._max_size = concurrency, max_size
        self._entries: list[object] = []  # the first `concurrency` of them are being drawn
        self._changed = asyncio.Event()

    @property
    def waiting(self) -> int:
        return max(0, len(self._entries) - self._concurrency)

    def join(self) -> object:
        """An entry at the end, which must be given to `leave`. Raises QueueFull."""
        if len(self._entries) >= self._concurrency + self._max_size:
            raise QueueFull(
                f"the queue is full: {self._concurrency} being drawn and {self.waiting} waiting; try again in a while"
            )
        self._entries.append(entry := object())
        return entry

    def leave(self, entry: object) -> None:
        self._entries.remove(entry)
        self._changed.set()
        self._changed = asyncio.Event()

    async def positions(self, entry: object) -> AsyncIterator[int]:
        """Yields how many waiting pictures come before this one's turn, until its turn has come."""
        while ahead := max(0, self._entries.index(entry) + 1 - self._concurrency):
            changed = self._changed
            yield ahead
            with suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), _POLL_SECONDS)
