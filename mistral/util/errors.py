"""What a file holds, for an error: printable and of bearable length, whatever it is."""

from __future__ import annotations

import reprlib

LONGEST = 80  # characters

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxother = 3, LONGEST


def short_repr(value: object) -> str:
    """A value as Python writes it, in ASCII; what is long is cut, also deep inside of it."""
    if isinstance(value, str):
        text, most = ascii(value if len(value) <= LONGEST else f"{value[:LONGEST]}..."), 2 * LONGEST
    else:
        text, most = _BRIEF.repr(value).encode("ascii", "backslashreplace").decode(), LONGEST
    return text if len(text) <= most else f"{text[:most]}..."


def printable(text: str, longest: int = LONGEST) -> str:
    """A name or a sentence as it is, or quoted if it is long or cannot be printed."""
    return text if text.isprintable() and len(text) <= longest else short_repr(text)


class ConvertError(ValueError):
    """A conversion that cannot be done; the destination is as it was."""


class ArraysError(ValueError):
    """A file that cannot be written, or is not what it should be."""
