"""Data parallel: several processes with the whole model each, and a part of every step's forwards.

Gradients are added up before a step, so every rank takes the same one, with equal bits. The first rank alone reads
what is asked on the way, and writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and which of them this is.

    Args:
        rank: of this process, counted from 0.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def joined(cls) -> Ranks:
        """Those of the group that this process is in; one alone where it is in none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def share(self, things: Sequence[T]) -> list[tuple[int, T]]:
        """This rank's part of what all have to do, each with its place."""
        return list(enumerate(things))[self.rank :: self.count]

    def sum(self, value: float) -> float:
        """The sum over all ranks, in float64."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    def add_gradients(self, weights: Iterable[Tensor]) -> None:
        """Make every `.grad` the sum over all ranks; a rank that had nothing to do has none, which is 0."""
        if self.count == 1:
            return
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)

    def any_stop(self, asked: bool) -> bool:
        """Whether the first rank is asked to stop: Ctrl-C reaches each of them at another time."""
        return self.sum(float(asked and self.first)) > 0
