"""Progress through work: a bar at a terminal after two seconds; elsewhere a line now and then. Runs without torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

from mistral.util.memory import as_text

EVERY = 30.0  # seconds between lines, where stderr is no terminal
tell: Callable[[str], object] | None = None  # takes the lines; the command line sets it


class Bar:
    """Progress through work, on stderr.

    Args:
        what, unit: what is being done, and what it is counted in; "B" for bytes.
        total: how much there is, for `update`.
        lines: whether there are lines where there is no bar.
    """

    def __init__(self, what: str, unit: str, total: int = 0, *, lines: bool = True) -> None:
        self._what, self._unit, self._lines = what, unit, lines
        self._done, self._total, self._told = 0, total, time.monotonic()
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        """So much of all is done; where it is all, the next call begins again."""
        from tqdm import tqdm

        if self._bar is None:
            how = {"unit": self._unit, "unit_scale": self._unit == "B", "desc": self._what}
            self._bar = tqdm(total=total, initial=done, delay=2, disable=None, leave=False, **how)
        self._bar.update(done - self._bar.n)
        self._done, self._total = done, total
        now = time.monotonic()
        if self._lines and tell is not None and done < total and now - self._told >= EVERY and not sys.stderr.isatty():
            self._told = now
            tell(self._describe())
        if done == total:
            self.close()

    def update(self, more: int) -> None:
        """So much more is done."""
        self(self._done + more, self._total)

    def aside(self) -> AbstractContextManager[None]:
        """While open, no bar is on the screen: what is printed has a line of its own."""
        return nullcontext() if self._bar is None else self._bar.external_write_mode()

    def close(self) -> None:
        """Take a bar away that has not come to its end."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _describe(self) -> str:
        if self._unit == "B":
            return f"{self._what}: {as_text(self._done)} of {as_text(self._total)}"
        return f"{self._what}: {self._done:,} of {self._total:,} {self._unit}s"

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
