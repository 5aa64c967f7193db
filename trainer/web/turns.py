"""Whose turn it is: first come, first served, so many at once, and a bound on those who wait."""

import asyncio
from collections.abc import AsyncIterator

_LOOK_SECONDS = 1.0  # between signs of life to those who wait, so that whoever left is noticed


class QueueFull(Exception):
    """Words for whoever came too late."""


class Ticket:
    """A place in the queue."""


class Turns:
    """A queue within one event loop."""

    def __init__(self, at_once: int, most_waiting: int) -> None:
        self._at_once, self._most_waiting = at_once, most_waiting
        self._line: list[Ticket] = []  # the first `at_once` have their turn
        self._moved = asyncio.Event()

    @property
    def waiting(self) -> int:
        return max(0, len(self._line) - self._at_once)

    def take(self) -> Ticket:
        """The last place; `leave` it in any case. QueueFull where there is none."""
        if len(self._line) >= self._at_once + self._most_waiting:
            raise QueueFull(
                f"the queue is full: {self._at_once} being drawn and {self.waiting} waiting; try again in a while"
            )
        ticket = Ticket()
        self._line.append(ticket)
        return ticket

    def leave(self, ticket: Ticket) -> None:
        self._line.remove(ticket)
        self._moved.set()
        self._moved = asyncio.Event()

    async def until(self, ticket: Ticket) -> AsyncIterator[int]:
        """How many will have their turn first, again and again until it is this one's."""
        while ahead := max(0, self._line.index(ticket) + 1 - self._at_once):
            yield ahead
            with_moves = self._moved
            try:
                await asyncio.wait_for(with_moves.wait(), _LOOK_SECONDS)
            except TimeoutError:
                continue
