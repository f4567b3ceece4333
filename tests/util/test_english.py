"""Plurals, some of many names, and names that a word may have been meant as."""

from __future__ import annotations

from mistral.util.english import counted, did_you_mean, some_names


def test_one_has_no_s() -> None:
    assert [counted(n, "row") for n in (0, 1, 2, 2000)] == ["0 rows", "1 row", "2 rows", "2,000 rows"]
    assert [counted(n, "matrix", "matrices") for n in (1, 2)] == ["1 matrix", "2 matrices"]


def test_the_first_names_and_how_many_more_there_are() -> None:
    assert [some_names(list("abcde"[:n])) for n in (0, 1, 3, 4)] == ["", "a", "a, b, c", "a, b, c and 1 more"]
    assert some_names(["a", "b\n", "c"], most=2) == "a, 'b\\n' and 1 more"


def test_only_what_is_like_a_word_is_suggested() -> None:
    assert did_you_mean("temperatures", ["top_p", "temperature"]) == "; did you mean temperature?"
    assert did_you_mean("sed", ["seed"], "--") == "; did you mean --seed?"
    assert did_you_mean("wolf", ["temperature"]) == ""
