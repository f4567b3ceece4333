"""Ctrl-Z and fg, and Ctrl-D before anybody asks: what was stopped does not count, and what was typed is not lost."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mistral.cli import terminal
from mistral.cli.pace import Pace, counting_stops
from mistral.cli.waiting import end_is_waiting

if sys.platform == "win32":
    pytest.skip("no Ctrl-Z on Windows", allow_module_level=True)

STOPPED = 1000.0  # seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    now = {"seconds": 0.0}
    monkeypatch.setattr(time, "perf_counter", lambda: now["seconds"])
    return now


def go_on(clock: dict[str, float]) -> None:
    """Ctrl-Z, and fg much later."""
    clock["seconds"] += STOPPED
    os.kill(os.getpid(), signal.SIGCONT)


def test_time_in_which_the_process_was_stopped_does_not_count(clock: dict[str, float]) -> None:
    with counting_stops():
        pace = Pace()
        for token in range(6):
            clock["seconds"] += 0.5 if token == 0 else 0.1
            if token == 3:
                go_on(clock)
            pace.token()
        assert str(pace) == ", 10.0 tokens/s; first after 0.50 s"
        late = Pace()
        go_on(clock)
        late.token()
        assert str(late) == "", "when the first would have come is not known"
        clock["seconds"] += 0.25
        late.token()
        assert str(late) == ", 4.0 tokens/s"
    assert str(Pace()) == ""


def test_the_handler_that_was_there_comes_back() -> None:
    before = signal.getsignal(signal.SIGCONT)
    with counting_stops():
        assert signal.getsignal(signal.SIGCONT) != before
    assert signal.getsignal(signal.SIGCONT) == before


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_that_was_stopped_goes_on_at_the_beginning_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell has printed its own lines, and the cursor is at the beginning of a new one."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: os.terminal_size((30, 24)))
    words = "the wolf went to the house "  # 27 columns

    def written(stop: bool) -> str:
        screen = Screen()
        with counting_stops():
            put = terminal.writer(screen)
            put(words)
            if stop:
                os.kill(os.getpid(), signal.SIGCONT)
            put(words)
        return screen.getvalue()

    assert written(stop=True) == words * 2
    assert written(stop=False) != words * 2


def test_the_answer_counts_them(clock: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    def pieces() -> Iterator[Any]:
        for token in range(1, 5):
            clock["seconds"] += 0.1
            if token == 3:
                go_on(clock)
            yield SimpleNamespace(text="a", token=token, thought=False, finish_reason=None)

    assert terminal.print_stream(pieces()) == 4
    assert "[4 tokens, 10.0 tokens/s; first after 0.10 s; ]" in capsys.readouterr().err


@pytest.mark.parametrize(("typed", "waits"), [(b"\x04", True), (b"", False), (b"a\n", False), (b"a", False)])
def test_ctrl_d_that_was_typed_before_anybody_asked(monkeypatch: pytest.MonkeyPatch, typed: bytes, waits: bool) -> None:
    outer, inner = os.openpty()
    try:
        os.write(outer, typed)
        if typed.endswith((b"\x04", b"\n")):
            assert select.select([inner], [], [], 10)[0], "it has arrived"
        with open(inner, closefd=False) as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert end_is_waiting() is waits
            assert not end_is_waiting(), "it is taken once"
    finally:
        os.close(outer)
        os.close(inner)
