"""Where the work of a curation runs: on Ray, or in this process."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final, Protocol, TypeVar

from pipeline.curation.selection import ShardWork

T = TypeVar("T")
Work = Callable[[ShardWork], None]

_PROCESS_BYTES: Final = 300 << 20  # of a worker with its libraries


class Execution(Protocol):
    def shards(self, work: Work, parts: dict[str, ShardWork], description: str) -> dict[str, str]:
        """Does the work for each shard. Returns those on which it failed, each with the reason."""

    def task(self, work: Callable[[], T], memory: int, description: str) -> T:
        """Does work that needs all rows. `memory` is the bytes that its data takes."""


class InThisProcess:
    """One shard after the other, for --plan and --explain, which need no Ray."""

    def shards(self, work: Work, parts: dict[str, ShardWork], description: str) -> dict[str, str]:
        for part in parts.values():
            work(part)
        return {}

    def task(self, work: Callable[[], T], memory: int, description: str) -> T:
        return work()


class OnRay:
    """Ray starts with the first work that there is, and stops at the end of the block."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._started = False

    def __enter__(self) -> "OnRay":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _start(self) -> None:
        if not self._started:
            from pipeline.core.cluster import cluster  # imports Ray, which takes seconds

            self._stack.enter_context(cluster("curate"))
            self._started = True

    def shards(self, work: Work, parts: dict[str, ShardWork], description: str) -> dict[str, str]:
        if not parts:
            return {}
        self._start()
        from pipeline.core.dataflow import map_shards

        return map_shards(parts, work, lambda part: part.rows, description)

    def task(self, work: Callable[[], T], memory: int, description: str) -> T:
        self._start()
        from pipeline.core.dataflow import run_task

        return run_task(work, _PROCESS_BYTES + memory, description)
