"""Progress where stderr is no terminal: a line now and then, to whoever takes them."""

from __future__ import annotations

import sys
from unittest import mock

import pytest

from mistral.util import progress
from mistral.util.progress import Bar


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(progress, "tell", said.append)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    return said


def test_lines_where_there_is_no_bar(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bar = Bar("comparing", "step")
    for done in (1, 2, 3, 1, 2):  # all of it, and something else
        bar(done, 3)
    assert lines == [f"comparing: {n} of 3 steps" for n in (1, 2, 1, 2)]
    lines.clear()
    with Bar("loading", "B", 3_000_000) as loading:
        loading.update(1_000_000)
    assert lines == ["loading: 1.0 MB of 3.0 MB"]
    Bar("batch", "line", lines=False)(1, 2)
    monkeypatch.setattr(progress, "EVERY", 1000.0)
    Bar("comparing", "step")(1, 3)
    monkeypatch.setattr(progress, "tell", None)  # as for programs that use the library
    Bar("comparing", "step")(1, 3)
    assert len(lines) == 1


def test_a_bar_at_a_terminal_and_no_lines(
    lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = Bar("comparing", "step")
    bar(1, 3)
    assert bar._bar is not None
    assert bar._bar.n == 1
    bar.update(1)
    assert bar._bar.n == 2
    with mock.patch.object(bar._bar, "external_write_mode") as mode, bar.aside():
        mode.return_value.__enter__.assert_called_once()
    bar(3, 3)
    assert bar._bar is None
    with bar.aside():
        pass
    assert lines == []


def test_what_a_bar_is_like() -> None:
    with mock.patch("tqdm.tqdm") as bar:
        bar.return_value.n = 0
        Bar("loading", "B", 10).update(4)
    options = bar.call_args.kwargs
    assert (options["total"], options["unit"], options["unit_scale"], options["delay"]) == (10, "B", True, 2)
    assert options["disable"] is None  # off where stderr is no terminal
