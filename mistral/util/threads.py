"""Fewer threads of PyTorch where other programs leave too few cores for all.

Threads wait for each other at every product. Where one has to share its core with another program all wait for it, and
small products take ten times as long as with one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mistral.util.cores import FREE_CORES


class Sharing:
    """As many threads as there are free cores.

    Attributes:
        few: whether there are fewer now than without this, so that nothing is left to be tried.
    """

    def __init__(self, free_cores: Callable[[], int] = FREE_CORES) -> None:
        self._free_cores = free_cores
        self.few = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around work for which the number is decided once; within itself it changes nothing."""
        import torch

        before = torch.get_num_threads()
        free = before if self.few else self._free_cores()
        if free >= before:
            yield
            return
        torch.set_num_threads(free)
        self.few = True
        try:
            yield
        finally:
            self.few = False
            torch.set_num_threads(before)
