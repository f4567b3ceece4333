"""A word at a terminal where nothing happens for a while: PyTorch alone may take ten seconds to start."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mistral.cli.terminal import echo_err

PATIENCE = 3.0  # seconds of silence


@contextmanager
def starting(what: str) -> Iterator[None]:
    """While open, say after three seconds what is going on, if somebody looks at stderr."""
    if not sys.stderr.isatty():
        yield
        return
    timer = threading.Timer(PATIENCE, echo_err, [f"{what} .."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
