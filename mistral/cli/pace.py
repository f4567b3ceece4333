"""How fast tokens come, without the time for which the process was stopped (Ctrl-Z, until fg)."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_stops = 0


def stops() -> int:
    """How often the process has gone on after it was stopped, as far as `counting_stops` was open then."""
    return _stops


@contextmanager
def counting_stops() -> Iterator[None]:
    """Count stops while this is open. When one began is not known: Ctrl-Z stops at once, whatever is computed."""
    if not hasattr(signal, "SIGCONT") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCONT, _go_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGCONT, before or signal.SIG_DFL)


def _go_on(number: int, frame: FrameType | None) -> None:
    global _stops
    _stops += 1


class Pace:
    """The time between tokens. What it was while the process was stopped is unknown, so such a token does not count."""

    def __init__(self) -> None:
        self._last, self._stops = time.perf_counter(), _stops
        self._waited: float | None = None
        self._tokens, self._seconds, self._count = 0, 0.0, 0

    def token(self) -> None:
        """One has come."""
        now, so_far = time.perf_counter(), _stops
        if so_far == self._stops:
            if self._count == 0:
                self._waited = now - self._last
            else:
                self._tokens += 1
                self._seconds += now - self._last
        self._last, self._stops, self._count = now, so_far, self._count + 1

    def __str__(self) -> str:
        """How many a second, and after how long the first came, to go behind their number."""
        rate = f", {self._tokens / self._seconds:.1f} tokens/s" if self._seconds > 0 else ""
        return rate + (f"; first after {self._waited:.2f} s" if self._waited is not None else "")
