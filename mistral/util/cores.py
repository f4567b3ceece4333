"""How many cores other programs leave to this one. Runs without torch.

Threads that wait for each other are as slow as the one that has to share its core. Linux counts what each core was
busy with; where nobody counts, all cores are taken to be free.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import takewhile

LEAST = 0.1  # seconds that are looked at together: the counts go in hundredths
STAT = "/proc/stat"


class FreeCores:
    """The cores that were free of others since it was asked last, a tenth of a second ago or more.

    Programs of lower priority do not count: they stand back.

    Args:
        busy: seconds that the cores of this process were busy until now, with anything; None where nobody counts.
        own: seconds that this process kept them busy.
        clock: seconds.
        cores: how many there are.
    """

    def __init__(
        self,
        busy: Callable[[], float | None] | None = None,
        own: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.perf_counter,
        cores: int | None = None,
    ) -> None:
        self._busy = busy_seconds if busy is None else busy
        self._own, self._clock = own, clock
        self.cores = len(_allowed()) if cores is None else cores
        self._free = self.cores
        self._last = self._counts()

    def __call__(self) -> int:
        """At least 1."""
        if self._clock() - self._last[0] >= LEAST:
            now, last = self._counts(), self._last
            self._last = now
            if now[1] is None or last[1] is None:
                self._free = self.cores
            else:
                others = (now[1] - last[1] - (now[2] - last[2])) / (now[0] - last[0])
                self._free = min(self.cores, max(1, int(self.cores - others + 0.5)))
        return self._free

    def _counts(self) -> tuple[float, float | None, float]:
        return self._clock(), self._busy(), self._own()


def _allowed() -> set[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _is_of_cores(line: str) -> bool:
    return line.startswith("cpu")


def busy_seconds() -> float | None:
    """Seconds that the cores of this process were busy since the machine started; None where nobody counts."""
    names = {f"cpu{number}" for number in _allowed()}
    try:
        with open(STAT, encoding="ascii") as file:
            # The lines of the cores come first; one behind them has a number for every interrupt.
            rows = [words for line in takewhile(_is_of_cores, file) if (words := line.split())[0] in names]
        low = (2,) if os.nice(0) > 0 else ()  # what was niced, as this process is
        ticks = sum(int(words[i]) for words in rows for i in (1, *low, 3, 6, 7))  # user, system, interrupts
        return ticks / os.sysconf("SC_CLK_TCK") if rows else None
    except (OSError, ValueError, IndexError):
        return None


FREE_CORES = FreeCores()  # of the process, from its start on: the first step knows what was busy while it was loaded
