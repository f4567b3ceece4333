"""Arguments that cannot be meant, refused in one sentence: another type, out of range, no path. Runs without torch."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from numbers import Integral
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from mistral.util.errors import MistralError, UsageError, short_repr


def require_kind(name: str, given: object, kind: Any, advice: str = "", error: type[MistralError] = UsageError) -> None:
    """Refuse what is of another type.

    Args:
        name: of the argument, for the message.
        kind: a type, or several as `isinstance` takes them.
        advice: what to give instead, to end the sentence; by default an object of the type.
    """
    if not isinstance(given, kind):
        raise error(f"{name} is {short_repr(given)}; it must be {advice or f'{kind.__name__}(..)'}")


def require_integer(
    name: str, given: object, least: int, most: int | None = None, error: type[MistralError] = UsageError
) -> int:
    """A whole number as Python's own; NumPy's are accepted too.

    Args:
        name: of the argument, for the message.
        least, most: what it may be; None: there is no most.

    Raises:
        MistralError: `error`, where it is no whole number, or not between the two.
    """
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise error(f"{name} is {short_repr(given)}; it must be a whole number")
    number = operator.index(given)
    if number < least:
        raise error(f"{name} is {short_repr(number)}; it must be at least {least}")
    if most is not None and number > most:
        raise error(f"{name} is {short_repr(number)}; it must be at most {most:,}")
    return number


def whole_numbers(
    name: str, given: object, error: type[MistralError] = UsageError, what: str = "a list of whole numbers"
) -> list[int]:
    """Whole numbers as Python's own, which are not copied where they are; NumPy's and PyTorch's are accepted too."""
    if type(given) is list and set(map(type, given)) <= {int}:
        return given
    try:
        if isinstance(given, str | bytes) or not isinstance(given, Iterable):
            raise TypeError
        numbers = list(given)
        if bool in set(map(type, numbers)):
            raise TypeError
        return list(map(operator.index, numbers))  # not int(): that would take 2.7, or "2"
    except (TypeError, ValueError, RuntimeError):
        raise error(f"{name} is {short_repr(given)}; it must be {what}") from None


def path_of(name: str, given: object, error: type[MistralError] = UsageError) -> Path:
    """A path, given as text or as a path."""
    if not isinstance(given, str | PathLike) or not isinstance(path := fspath(given), str):
        raise error(f"{name} is {short_repr(given)}; it must be a path")
    if "\0" in path:
        raise error(f"{name} is {short_repr(path)}: no name can have the character 0")
    return Path(path)
