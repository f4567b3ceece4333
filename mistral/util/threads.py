"""Fewer threads of PyTorch where other programs leave too few cores for all.

Threads wait for each other at every product. Where one has to share its core with another program all wait for it, and
small products take ten times as long as with one thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

from mistral.util.cores import FREE_CORES


@cache
def _one_in_children() -> None:
    """From here on a process that is forked has one thread: OpenMP takes this one's for its own, which are not there,
    and a step would wait for them for ever."""
    import torch

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


class Sharing:
    """As many threads as there are free cores.

    Work that takes long asks again in between: what was busy before it began may have ended.

    Attributes:
        few: whether there are fewer now than without this, so that nothing is left to be tried.
    """

    def __init__(self, free_cores: Callable[[], int] = FREE_CORES) -> None:
        self._free_cores = free_cores
        self._most: int | None = None  # without this; None: not inside
        self.few = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around work, and within it around each part that may have another number."""
        import torch

        before, most, few = torch.get_num_threads(), self._most, self.few
        self._most = before if most is None else most
        now = min(self._most, self._free_cores())
        self.few = now < self._most
        if now != before:
            torch.set_num_threads(now)
        if now > 1:
            _one_in_children()
        try:
            yield
        finally:
            self._most, self.few = most, few
            if now != before:
                torch.set_num_threads(before)
