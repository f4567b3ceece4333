"""How many cores other programs leave to this one. Runs without torch.

Threads that wait for each other are as slow as the one that has to share its core. Linux counts what each core was
busy with; where nobody counts, all cores are taken to be free.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import takewhile

LEAST = 0.1  # seconds that are looked at together: the counts go in hundredths
WAITING = 0.2  # share of the time that this process wants to run: waits for longer than that are no standing back
PATIENCE = 5.0  # seconds until it is tried again whether programs of lower priority stand back
STAT = "/proc/stat"
TASKS = "/proc/self/task"


class FreeCores:
    """The cores that were free of others since it was asked last, a tenth of a second ago or more.

    Programs of lower priority do not count where they stand back. Those of another terminal or container may not:
    there Linux shares a core between groups of programs, and priorities hold within a group. So where threads of this
    process wait for a core beside them, they count like all others.

    Args:
        busy: seconds that the cores of this process were busy until now, with anything but programs of lower priority,
            and with those; None where nobody counts.
        own: seconds that this process kept them busy.
        clock: seconds.
        cores: how many there are.
        waited: seconds that threads of this process waited for a core.
    """

    def __init__(
        self,
        busy: Callable[[], tuple[float, float] | None] | None = None,
        own: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.perf_counter,
        cores: int | None = None,
        waited: Callable[[], float] | None = None,
    ) -> None:
        self._busy = busy_seconds if busy is None else busy
        self._waited = waited_seconds if waited is None else waited
        self._own, self._clock = own, clock
        self._before: tuple[float, float] | None = (0.0, 0.0)  # own and waited, since the process began
        self._all_count_until = -math.inf
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
                seconds = now[0] - last[0]
                others = (now[1][0] - last[1][0] - (now[2] - last[2])) / seconds
                lower = (now[1][1] - last[1][1]) / seconds
                others += 0 if self._stand_back(lower) else lower
                self._free = min(self.cores, max(1, int(self.cores - others + 0.5)))
        return self._free

    def _counts(self) -> tuple[float, tuple[float, float] | None, float]:
        return self._clock(), self._busy(), self._own()

    def _stand_back(self, lower: float) -> bool:
        """Whether programs of lower priority do, which keep so many cores busy."""
        if lower < 0.5 * LEAST:  # hardly any: to look at every thread is not worth its time
            self._before = None
            return True
        own, waited = self._own(), self._waited()
        if self._before is not None:
            ran, stood = own - self._before[0], waited - self._before[1]
            if stood > max(WAITING * (ran + stood), 0.1 * LEAST):
                self._all_count_until = self._clock() + PATIENCE
        self._before = own, waited
        return self._clock() >= self._all_count_until


def _allowed() -> set[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _is_of_cores(line: str) -> bool:
    return line.startswith("cpu")


def busy_seconds() -> tuple[float, float] | None:
    """Seconds that the cores of this process were busy since the machine started; None where nobody counts.

    Those with programs of lower priority than this process stand second; of programs that are niced Linux counts one
    sum, so beside a process that is niced itself there are none.
    """
    names = {f"cpu{number}" for number in _allowed()}
    try:
        with open(STAT, encoding="ascii") as file:
            # The lines of the cores come first; one behind them has a number for every interrupt.
            rows = [words for line in takewhile(_is_of_cores, file) if (words := line.split())[0] in names]
        ticks = sum(int(words[i]) for words in rows for i in (1, 3, 6, 7))  # user, system, interrupts
        niced = sum(int(words[2]) for words in rows)
        if not rows:
            return None
        high, low = (ticks + niced, 0) if os.nice(0) > 0 else (ticks, niced)
        return high / os.sysconf("SC_CLK_TCK"), low / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def waited_seconds() -> float:
    """Seconds that the threads of this process that there are waited for a core; 0 where nobody counts."""
    found = 0
    try:
        for task in os.listdir(TASKS):
            with suppress(OSError), open(f"{TASKS}/{task}/schedstat", encoding="ascii") as file:  # one may have ended
                found += int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return found / 1e9


FREE_CORES = FreeCores()  # of the process, from its start on: the first step knows what was busy while it was loaded
