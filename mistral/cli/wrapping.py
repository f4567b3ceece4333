"""Lines that break between words, for text that comes piece by piece to a terminal. Knows nothing about either."""

from __future__ import annotations

import re
import unicodedata

# Spaces, a character that is as wide as two and may stand at a line's end, or letters that belong together.
_PARTS = re.compile(r"\n| +|[^ \n]")


def columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


class Wrapped:
    """Text in lines of at most `width` columns; a word that is longer is left as it is.

    Only line ends are put in, each in the place of spaces (or between two wide characters, which have none). A word is
    held back until it is known to be whole, or longer than a line.

    Args:
        width: columns of a line, above 0.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._column, self._empty = 0, True  # the line as it was given out
        self._spaces = self._word = ""
        self._long = False  # whether the line ends within a word that was given out already

    def push(self, text: str) -> str:
        """More text; what of it, and of what was held back, is certain."""
        out = []
        for part in _PARTS.findall(text):
            if part[0] in " \n":
                self._long = False
            if part == "\n":
                out.append(self._take() + self._spaces + "\n")
                self._column, self._empty, self._spaces = 0, True, ""
            elif part[0] == " ":
                out.append(self._take())
                self._spaces += part
            else:
                if self._word and (columns(part) == 2 or columns(self._word[-1]) == 2):
                    out.append(self._take())
                self._word += part
                if self._long or columns(self._word) > self._width:
                    out.append(self._take())
                    self._long = True  # what follows belongs to the same word
        return "".join(out)

    def flush(self) -> str:
        """What was held back, at the end."""
        rest = self._take() + self._spaces
        self._spaces = ""
        return rest

    def _take(self) -> str:
        """The word that was held back, behind its spaces or at the beginning of a new line."""
        if not self._word:
            return ""
        size = columns(self._word)
        goes_on = self._empty or self._long or self._column + len(self._spaces) + size <= self._width
        out = (self._spaces if goes_on else "\n") + self._word
        self._column = (self._column + len(self._spaces) if goes_on else 0) + size
        self._empty, self._spaces, self._word = False, "", ""
        return out
