"""How many cores are free, by counts of the test's own; and that this machine counts at all."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from mistral.util import cores
from mistral.util.cores import LEAST, PATIENCE, FreeCores, busy_seconds, waited_seconds


class Machine:
    """Cores that others and this process keep busy, as long as a test says."""

    def __init__(self) -> None:
        self.now = self.others = self.own = self.lower = self.waited = 0.0
        self.counts = True

    def passes(self, seconds: float, others: float, own: float = 0.0, lower: float = 0.0, waited: float = 0.0) -> None:
        self.now += seconds
        self.lower += lower * seconds
        self.waited += waited * seconds
        self.others += others * seconds
        self.own += own * seconds

    def free_cores(self, count: int) -> FreeCores:
        return FreeCores(
            lambda: (self.others + self.own, self.lower) if self.counts else None,
            lambda: self.own,
            lambda: self.now,
            count,
            lambda: self.waited,
        )


@pytest.mark.parametrize(
    ("others", "own", "free"),
    [
        (0, 0, 4),
        (0, 4, 4),
        (1, 3, 3),
        (1, 0, 3),
        (0.4, 3, 4),
        (0.6, 3, 3),
        (3, 1, 1),
        (4, 0, 1),
        (6, 0, 1),
        (-0.2, 4, 4),
    ],
)
def test_what_others_leave(others: float, own: float, free: int) -> None:
    machine = Machine()
    found = machine.free_cores(4)
    machine.passes(1.0, others, own)
    assert found() == free
    machine.passes(2.0, 0)
    assert found() == 4


@pytest.mark.parametrize(
    ("own", "lower", "waited", "free"),
    [(1.9, 0.1, 0.1, 2), (1.0, 1.0, 1.0, 1), (1.3, 0.7, 0.6, 1), (0.6, 1.4, 1.2, 1), (1.0, 0.9, 0.0, 2), (2, 0, 1, 2)],
)
def test_programs_of_lower_priority_count_where_they_do_not_stand_back(
    own: float, lower: float, waited: float, free: int
) -> None:
    """As those of another terminal: Linux shares a core between groups of programs, whatever their priorities are."""
    machine = Machine()
    found = machine.free_cores(2)
    machine.passes(1.0, 0, own, lower, waited)
    assert found() == free
    machine.passes(PATIENCE / 2, 0, 1.0, lower=1.0)  # this process has one thread now, and need not wait
    assert found() == free
    machine.passes(PATIENCE, 0, 1.0, lower=1.0)  # tried again
    assert found() == 2


def test_a_short_time_says_nothing() -> None:
    machine = Machine()
    found = machine.free_cores(2)
    for _ in range(5):
        machine.passes(LEAST / 6, 1)
        assert found() == 2
    machine.passes(LEAST / 3, 1)
    assert found() == 1
    machine.passes(LEAST / 2, 0)
    assert found() == 1


def test_where_nobody_counts_all_are_free() -> None:
    machine = Machine()
    found = machine.free_cores(2)
    machine.passes(1.0, 1)
    assert found() == 1
    machine.counts = False
    machine.passes(1.0, 1)
    assert found() == 2


LINES = "cpu  9 9 9 9 9 9 9 9\ncpu0 100 7000 20 5 6 3 1 50\ncpu1 200 0 0 0 0 0 0 0\ncpu10 900 0 0 0 0 0 0 0\nintr 1 2\n"


@pytest.mark.parametrize(("nice", "ticks"), [(0, (124, 7000)), (5, (7124, 0))])
def test_what_counts(nice: int, ticks: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """User, system and interrupts of the cores of this process; what is niced only beside a process that is, too."""
    (tmp_path / "stat").write_text(LINES)
    monkeypatch.setattr(cores, "STAT", str(tmp_path / "stat"))
    monkeypatch.setattr(cores, "_allowed", lambda: {0})
    monkeypatch.setattr(cores.os, "nice", lambda more: nice)
    monkeypatch.setattr(cores.os, "sysconf", lambda name: 1)
    assert busy_seconds() == ticks
    for broken in ("", "cpu0 x\n", "cpu0 1 2\n"):
        (tmp_path / "stat").write_text(broken)
        assert busy_seconds() is None


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts")
def test_this_machine_counts() -> None:
    first = busy_seconds()
    assert first is not None
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    after = busy_seconds()
    assert after is not None
    assert sum(after) >= sum(first)
    assert waited_seconds() >= 0
    assert 1 <= FreeCores()() <= FreeCores().cores
