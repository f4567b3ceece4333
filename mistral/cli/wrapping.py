"""Lines that break between words, for text that comes piece by piece to a terminal. Knows nothing about either.

Text is shown as it comes. Where a word turns out not to fit its line, what is there of it is taken back and put on the
next one.
"""

from __future__ import annotations

import unicodedata

TAB = 8
LEAST = 20  # columns of a terminal in which words are moved at all


def columns(text: str) -> int:
    """How many columns of a terminal a text without line ends and tabs takes."""
    return sum(map(_columns, text))


def _columns(c: str) -> int:
    if unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


class Wrapped:
    """What to write to a terminal, so that the lines of a text end between words.

    The last column stays free: a cursor that has passed it can no longer be moved back. Text that takes two columns a
    character has no spaces and may be broken anywhere. A word that is longer than a line is left to the terminal.
    """

    def __init__(self) -> None:
        self._column = 0
        self._word = ""  # the last one, as far as it was written on this line

    def begin(self) -> None:
        """The cursor is at the beginning of a line, whatever was written before."""
        self._begin_line()

    def push(self, text: str, width: int) -> str:
        """What to write for more text.

        Args:
            width: columns of the terminal as it is now.
        """
        return "".join(self._one(c, width) for c in text) if width >= LEAST else text

    def _one(self, c: str, width: int) -> str:
        if c == "\n":
            return self._begin_line()
        if c in " \t":
            size = TAB - self._column % TAB if c == "\t" else 1
            if self._column + size >= width:
                return self._begin_line()
            self._column += size
            self._word = ""
            return c
        size = _columns(c)
        if self._column + size < width:
            out = c
        elif size == 2 or not self._word:
            out = self._begin_line() + c
        elif (taken := columns(self._word)) < self._column and taken + size < width:
            word = self._word
            out = f"\x1b[{taken}D\x1b[K{self._begin_line()}{word}{c}"
            self._word, self._column = word, taken
        else:  # the word is as long as a line: the terminal goes on in the next one
            self._column, out = (0 if self._column + size > width else self._column), c
        self._column += size
        self._word = "" if size == 2 else self._word + c
        return out

    def _begin_line(self) -> str:
        self._column, self._word = 0, ""
        return "\n"
