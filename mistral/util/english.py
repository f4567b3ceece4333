"""English in messages: how many of what, and which known name a word may have been meant as. Runs without torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def counted(count: int, one: str, several: str = "") -> str:
    """A number and its noun, as in "1 step" and "2,000 steps".

    Args:
        one, several: the noun; without `several` its plural is `one` with an s.
    """
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def did_you_mean(word: str, known: Iterable[str], before: str = "") -> str:
    """ "; did you mean X?" with the known name that is most like a word; "" if none is like it.

    Args:
        before: what is written before the name, such as dashes.
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {before}{close[0]}?" if close else ""
