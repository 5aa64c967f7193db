"""The workers of one training as a group: what they agree on, sum up and tell each other, on their hosts.

Small things beside the training, on a channel of their own: nothing here waits for a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """As seen by one worker. All members must make the same calls in the same order."""

    rank: int
    size: int
    channel: Any  # a process group of gloo's; None for a worker alone

    @classmethod
    def assemble(cls) -> "Team":
        """Of torch's process group, if there is one."""
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return cls(0, 1, None)
        return cls(distributed.get_rank(), distributed.get_world_size(), distributed.new_group(backend="gloo"))

    @property
    def leads(self) -> bool:
        """Whether this is the worker that writes what is written once."""
        return self.rank == 0

    def any(self, is_true: bool) -> bool:
        """Whether it is true for any member."""
        return self.sum([float(is_true)])[0] > 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Over the members, one by one, in float64."""
        if self.size == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(summed, group=self.channel)
        total: list[float] = summed.tolist()
        return total

    def gather(self, item: T) -> list[T]:
        """Every member's, by rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        distributed.all_gather_object(items, item, group=self.channel)
        return items

    def of_leader(self, item: T) -> T:
        """The leader's, whatever the others give."""
        if self.size == 1:
            return item
        items = [item]
        distributed.broadcast_object_list(items, src=0, group=self.channel)
        return items[0]
