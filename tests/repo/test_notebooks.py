"""The notebooks run from the first cell to the last, and show what is in them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
from tools.notebooks import NOTEBOOKS, ROOT, as_text, execute


def shown(notebook: dict[str, Any]) -> list[list[str]]:
    """The kinds of output of each code cell, and what it printed but for its numbers."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [
        [
            output["output_type"]
            + "".join(c for c in "".join(output.get("text", [])) if not (c.isdigit() or c in ".-+e% "))
            for output in cell["outputs"]
        ]
        for cell in cells
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_holds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    again = copy.deepcopy(notebook)
    for cell in again["cells"]:
        cell.get("outputs", []).clear()
    execute(again)
    assert shown(again) == shown(notebook), "python -m tools.notebooks runs them and keeps what they show"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_written_in_one_way(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert text == as_text(notebook)
    assert len(text) < 200_000
    assert notebook["nbformat"] == 4
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} >= {"start", "embeddings"}
    with pytest.raises(ZeroDivisionError) as caught:
        execute({"cells": [{"cell_type": "code", "source": ["1 / 0"]}]})
    assert "in cell 1" in caught.value.__notes__[0]
