"""Lines at a terminal end between words, whatever pieces the text comes in, and nothing is held back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral.cli.wrapping import LEAST, Wrapped, columns
from tests.support.folders import ROOT


def screen(written: str, width: int) -> list[str]:
    """The lines that a terminal shows."""
    lines: list[list[str]] = [[]]
    column = 0
    for part in re.findall(r"\x1b\[\d*[A-Z]|.|\n", written):
        line = lines[-1]
        if part == "\n":
            lines.append([])
            column = 0
        elif part == "\x1b[K":
            del line[column:]
        elif part.startswith("\x1b"):
            assert column < width, "a cursor behind the last column cannot be moved back"
            column -= int(part[2:-1])
        elif columns(part) == 0:
            line[column - 1] += part
        else:
            if column + columns(part) > width:
                lines.append(line := [])
                column = 0
            line += [part, *[""] * (columns(part) - 1)]
            column += columns(part)
    return ["".join(line) for line in lines]


def shown(text: str, width: int, cuts: list[int]) -> list[str]:
    lines, out, begin = Wrapped(), "", 0
    for end in [*sorted(cuts), len(text)]:
        out += lines.push(text[begin:end], width)
        begin = max(begin, end)
    return screen(out, width)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("the wolf came to the house of the pigs", ["the wolf came to the ", "house of the pigs"]),
        ("a  b\n\n    code here", ["a  b", "", "    code here"]),
        ("so an-unbreakable-word-in-it is long", ["so ", "an-unbreakable-word-in", "-it is long"]),
        ("永和九年歲在癸丑暮春之初會", ["永和九年歲在癸丑暮春", "之初會"]),
        ("it was called 永和九年歲在癸丑", ["it was called 永和九", "年歲在癸丑"]),
        (
            "cafe\u0301 cafe\u0301 cafe\u0301 cafe\u0301 cafe\u0301",
            ["cafe\u0301 cafe\u0301 cafe\u0301 cafe\u0301 ", "cafe\u0301"],
        ),
        ("", [""]),
    ],
)
def test_lines(text: str, want: list[str]) -> None:
    assert shown(text, 22, []) == want
    assert shown(text, 22, list(range(len(text)))) == want


@given(
    text=st.lists(st.sampled_from([*"abcd \n年", "e\u0301"]), max_size=120).map("".join),
    width=st.integers(LEAST, 30),
    cuts=st.lists(st.integers(0, 120), max_size=6),
)
def test_nothing_is_lost_and_words_stay_whole(text: str, width: int, cuts: list[int]) -> None:
    lines = shown(text, width, cuts)
    assert lines == shown(text, width, [])
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)
    assert len(lines) > text.count("\n")
    assert all(columns(line) <= width for line in lines)
    words = [word for word in re.split(r"[ \n]|年", text) if 0 < columns(word) < width - 1]
    for word in words:
        assert any(word in line for line in lines)


def test_text_is_shown_as_it_comes() -> None:
    lines = Wrapped()
    assert lines.push("a wo", 40) == "a wo"
    assert lines.push("lf", 40) == "lf"


def test_a_terminal_without_room_is_left_alone() -> None:
    assert Wrapped().push("a wolf came to the house", LEAST - 1) == "a wolf came to the house"
    assert f"fewer than {LEAST} columns" in (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")


def test_a_terminal_may_change_its_width() -> None:
    lines = Wrapped()
    assert (
        screen(lines.push("the wolf came to the house", 40) + lines.push("s of the pigs", 30), 30)[-1] == "of the pigs"
    )
