"""A test finds the same after any others: what is drawn does not depend on what ran or was imported before."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral.util.cores import FREE_CORES


def test_hypothesis_draws_the_same_after_more_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, str]] = []

    @settings(max_examples=200, derandomize=True)
    @given(st.integers(0, 10**6), st.text())
    def draw(number: int, text: str) -> None:
        drawn.append((number, text))

    draw()
    first = drawn.copy()
    drawn.clear()
    (tmp_path / "constants_of_ours.py").write_text(f"found = {list(range(1000, 9000, 7))}, 'a word that stands here'")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("constants_of_ours")
    draw()
    del sys.modules["constants_of_ours"]
    assert len(first) > 100
    assert drawn == first


@pytest.mark.parametrize("turn", [1, 2])
def test_numbers_without_a_seed_and_threads_are_the_same_in_every_test(turn: int) -> None:
    assert torch.get_num_threads() != 7
    torch.set_num_threads(7)
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    assert drawn == pytest.approx((0.8444218515250481, 0.5488135039273248, 0.4962565899), rel=1e-6)


def test_other_programs_take_no_threads_from_a_test() -> None:
    assert FREE_CORES() == FREE_CORES.cores
