"""How many threads a step takes: as many as PyTorch has, or fewer where another program holds a core.

Threads wait for each other at every product of a step. Where one of them has to share its core, all wait for it, and
a step takes many times as long as with one thread. What the system counts says how many cores are free
(util/threads.py); whether all threads are faster than one is tried as well, since not all that slows them is counted.
No number depends on the choice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SLOWER = 1.5  # times as long as steps took when the choice was made: another program has come, or one has gone
IN_A_ROW = 3  # slow steps that are no accident
TRIES = (
    3  # steps of each choice that are compared, the fastest of each; one is enough where it is HOPELESS times slower
)
HOPELESS = 2
PATIENCE = 200  # steps until the other choice is tried again; each time that it was hopeless, four times as many
LONGEST = 50_000


class Threads:
    """Chooses between all threads and one, for steps of one kind, by how long they take."""

    def __init__(self) -> None:
        self._most = 0
        self._chosen = 0
        self._tried: dict[int, list[float]] = {}  # seconds of the steps of a comparison, by threads; empty: none runs
        self._usual = 0.0  # seconds of a step when the choice was made
        self._patience = PATIENCE
        self._steps = self._slow = 0
        self._cold = True  # the first step, which finds nothing in memory, says nothing about threads

    def pick(self, most: int) -> int:
        """Threads of the next step, out of `most`: the same until `took` is called."""
        if most == 1:
            return 1
        if most != self._most:  # the first step, or somebody has changed PyTorch's number
            self._most, self._chosen, self._patience = most, most, PATIENCE
            self._compare()
        if not self._tried:
            return self._chosen
        # In turn, the one in use first.
        return min(self._tried, key=lambda threads: len(self._tried[threads]))

    def took(self, threads: int, seconds: float) -> None:
        """Learn how long a step took with so many threads."""
        if threads not in (1, self._most) or self._most <= 1:
            return
        if self._cold:
            self._cold = False
            return
        if self._tried:
            self._tried[threads].append(seconds)
            self._decide()
            return
        self._steps += 1
        self._slow = self._slow + 1 if seconds > SLOWER * self._usual else 0
        if self._slow >= IN_A_ROW:
            self._patience = PATIENCE
            self._compare()
        elif self._steps >= self._patience:
            self._compare()

    @contextmanager
    def step(self) -> Iterator[int]:
        """Around a step: gives its number of threads, and takes its time."""
        threads = self.pick(torch.get_num_threads())
        began = time.perf_counter()
        yield threads
        self.took(threads, time.perf_counter() - began)

    def _compare(self) -> None:
        other = 1 if self._chosen == self._most else self._most
        self._tried = {self._chosen: [], other: []}

    def _decide(self) -> None:
        """End the comparison if it has been seen which is faster."""
        if not all(self._tried.values()):
            return
        fastest = {threads: min(seconds) for threads, seconds in self._tried.items()}
        best, other = sorted(fastest, key=fastest.__getitem__)
        hopeless = fastest[other] > HOPELESS * fastest[best]
        if not hopeless and any(len(seconds) < TRIES for seconds in self._tried.values()):
            return
        self._patience = min(4 * self._patience, LONGEST) if hopeless and best == self._chosen else PATIENCE
        self._chosen, self._usual = best, fastest[best]
        self._tried, self._steps, self._slow = {}, 0, 0
