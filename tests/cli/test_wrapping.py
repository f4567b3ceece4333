"""Lines at a terminal break between words, whatever pieces the text comes in."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral.cli.wrapping import Wrapped, columns


def wrapped(text: str, width: int, cuts: list[int]) -> str:
    lines, out, begin = Wrapped(width), "", 0
    for end in [*sorted(cuts), len(text)]:
        out += lines.push(text[begin:end])
        begin = max(begin, end)
    return out + lines.flush()


@pytest.mark.parametrize(
    ("text", "width", "want"),
    [
        ("the wolf came to the house", 12, "the wolf\ncame to the\nhouse"),
        ("a  b\n\n    code here", 80, "a  b\n\n    code here"),
        ("unbreakableword is long", 5, "unbreakableword\nis\nlong"),
        ("once upon ", 80, "once upon "),
        ("\u6c38\u548c\u4e5d\u5e74", 6, "\u6c38\u548c\u4e5d\n\u5e74"),
        ("", 10, ""),
    ],
)
def test_lines(text: str, width: int, want: str) -> None:
    assert wrapped(text, width, []) == want
    assert wrapped(text, width, list(range(len(text)))) == want


@given(
    text=st.text(st.sampled_from("ab \n\u5e74e\u0301"), max_size=60),
    width=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 60), max_size=6),
)
def test_nothing_is_lost_and_pieces_do_not_matter(text: str, width: int, cuts: list[int]) -> None:
    out = wrapped(text, width, cuts)
    assert out == wrapped(text, width, [])
    assert re.sub(r"[ \n]", "", out) == re.sub(r"[ \n]", "", text)
    assert out.count("\n") >= text.count("\n")
    for line in out.split("\n"):
        assert columns(line.rstrip(" ")) <= width or not re.search(r"\S +\S", line)


def test_a_word_without_end_is_not_held_back() -> None:
    lines = Wrapped(10)
    assert lines.push("so ") == "so"
    out = "".join(lines.push("x") for _ in range(30))
    assert out == "\n" + "x" * 30
    assert lines.push("xx y") + lines.flush() == "xx\ny"
