"""Ctrl-C that ends an answer between two steps, and that no import swallows. Knows nothing about terminals."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Ctrl-C while an answer is generated: the first ends it between two steps, a second one at once.

    One that comes after the last step is raised at the end.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._hit)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._before)
        if kind is None:
            self.check()

    def _hit(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def check(self) -> None:
        """End the answer if Ctrl-C was pressed.

        Raises:
            KeyboardInterrupt: it was.
        """
        if self._asked:
            raise KeyboardInterrupt


@contextmanager
def keeping_interrupts() -> Iterator[None]:
    """Have a Ctrl-C that came while this was open raise at its end at the latest.

    PyTorch's first import runs Python in callbacks, where an exception is printed and lost.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, or somebody else's
        yield
        return
    hits: list[int] = []

    def hit(number: int, frame: FrameType | None) -> None:
        hits.append(number)
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGINT, hit)
    except ValueError:  # not the main thread, which alone gets signals
        yield
        return
    try:
        yield
    except Exception:
        if not hits:
            raise
        # A library that was interrupted while it set itself up failed in its own way later on.
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hits:
        raise KeyboardInterrupt
