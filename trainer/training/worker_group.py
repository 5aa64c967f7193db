"""Collective operations on small host-side values among the workers of one training. Nothing here waits for a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class WorkerGroup:
    """One worker's view of the group. All workers must make the same calls in the same order."""

    rank: int
    size: int
    channel: Any  # gloo process group; None with a single worker

    @classmethod
    def from_process_group(cls) -> "WorkerGroup":
        """A group over torch's default process group, or of one worker without it."""
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return cls(0, 1, None)
        return cls(distributed.get_rank(), distributed.get_world_size(), distributed.new_group(backend="gloo"))

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def any(self, is_true: bool) -> bool:
        """True if it is true on any worker."""
        return self.sum([float(is_true)])[0] > 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Elementwise sum over the workers, in float64."""
        if self.size == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(summed, group=self.channel)
        total: list[float] = summed.tolist()
        return total

    def gather(self, item: T) -> list[T]:
        """The items of all workers, by rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        distributed.all_gather_object(items, item, group=self.channel)
        return items

    def broadcast(self, item: T) -> T:
        """The item of rank 0."""
        return self.gather(item)[0]
