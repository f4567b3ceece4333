"""What a file holds, as errors show it: printable, short, and never itself an error."""

from __future__ import annotations

from typing import Any

import pytest

from mistral.util.errors import printable, short_repr


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (24.0, "24.0"),
        (True, "True"),
        (None, "None"),
        ([24], "[24]"),
        ({"a": [1, "b"]}, "{'a': [1, 'b']}"),
        (10**30, str(10**30)),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        ("24", "'24'"),
        ("é\x1b[31m\ud800\u202e", r"'\xe9\x1b[31m\ud800\u202e'"),
        ({"é": "\U0001f600"}, r"{'\xe9': '\U0001f600'}"),
        ("x" * 81, f"'{'x' * 80}...'"),
    ],
)
def test_values(value: Any, text: str) -> None:
    assert short_repr(value) == text


def test_what_has_no_end() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    wide: Any = "wide"
    for _ in range(4):
        wide = {str(i) * 100: [wide] * 50 for i in range(50)}
    for value in (deep, wide, [0] * 100_000, {"x" * 100_000: 0}, 10**4000, "\0" * 100_000, "\U0001f600" * 80):
        text = short_repr(value)
        assert len(text) < 170
        assert text.isascii()
        assert text.isprintable()


def test_names_stay_as_they_are_where_they_can() -> None:
    for name in ("layers.0.attention.wq.weight", "größe", ""):
        assert printable(name) == name
    assert printable("a\nb") == r"'a\nb'"
    assert printable("x" * 81) == f"'{'x' * 80}...'"
    assert printable("x" * 81, 100) == "x" * 81
