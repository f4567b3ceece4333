"""What can go wrong: one root, few kinds; and values in messages, printable and short whatever they are.

Every message says what is wrong, how much of it, and what to do.
"""

from __future__ import annotations

import reprlib


class MistralError(ValueError):
    """Something that the caller can change. The command line prints it as one line and exits with `exit_code`."""

    exit_code = 2


class UsageError(MistralError):
    """A flag, an argument or an option that cannot be meant; nothing was run."""


class FormatError(MistralError):
    """A file or folder that is missing, broken, or holds something else."""


class Unavailable(MistralError):
    """A library, a compiler, the network or room on a disk is missing."""


class ChecksFailed(MistralError):
    """The checks ran, and some failed; what was printed says which."""

    exit_code = 1


class Fatal(MistralError):
    """What computes is lost, and all that was begun with it; nothing more can be asked of it."""


class ConvertError(UsageError):
    """A conversion that cannot be done; the destination is as it was."""


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
