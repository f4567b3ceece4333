"""Plurals, and names that a word may have been meant as."""

from __future__ import annotations

from mistral.util.english import counted, did_you_mean


def test_one_has_no_s() -> None:
    assert [counted(n, "row") for n in (0, 1, 2, 2000)] == ["0 rows", "1 row", "2 rows", "2,000 rows"]
    assert [counted(n, "matrix", "matrices") for n in (1, 2)] == ["1 matrix", "2 matrices"]


def test_only_what_is_like_a_word_is_suggested() -> None:
    assert did_you_mean("temperatures", ["top_p", "temperature"]) == "; did you mean temperature?"
    assert did_you_mean("sed", ["seed"], "--") == "; did you mean --seed?"
    assert did_you_mean("wolf", ["temperature"]) == ""
