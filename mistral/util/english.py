"""English in messages: how many of what, some of many, and which known name a word may have been meant as. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from mistral.util.errors import printable
from mistral.util.other_names import called_here, is_elsewhere


def counted(count: int, one: str, several: str = "") -> str:
    """A number and its noun, as in "1 step" and "2,000 steps".

    Args:
        one, several: the noun; without `several` its plural is `one` with an s.
    """
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def some_names(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, each printable, and how many more there are, as in "a, b, c and 2 more"."""
    shown = ", ".join(map(printable, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def did_you_mean(word: str, known: Iterable[str], before: str = "") -> str:
    """ "; did you mean X?" with the known name that a word is the other name of, or that is most like it; else "".

    Args:
        before: what is written before the name, such as dashes.
    """
    names = list(known)
    other = called_here(word, names)
    close = [other] if other is not None else difflib.get_close_matches(word, names, n=1) * (not is_elsewhere(word))
    return f"; did you mean {before}{close[0]}?" if close else ""
