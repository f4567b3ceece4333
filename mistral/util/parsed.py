"""JSON from a file or a request, whose errors are sentences of ours. Runs without torch."""

from __future__ import annotations

import json
from typing import Any

from mistral.util.errors import short_repr

# How an error of Python's begins, and what is wrong.
WORDS = (
    ("Expecting value", "a value is missing"),
    ("Expecting ',' delimiter", "a comma or a closing bracket is missing"),
    ("Expecting ':' delimiter", "a colon is missing"),
    ("Expecting property name", "a name in double quotes is missing"),
    ("Extra data", "something follows the value"),
    ("Unterminated string", "a text begins that has no closing quote,"),
    ("Invalid control character", "a text has a line end or another control character"),
    ("Invalid \\", "a text has a backslash that begins no escape"),
    ("Unexpected UTF-8 BOM", "there is a byte order mark"),
    ("Illegal trailing comma", "there is a comma too many"),
)


class KeyTwice(ValueError):
    """A key that stands twice in one object: Python would take the last of its values, and say nothing.

    Its text is the end of a sentence that begins with what was read.
    """


def parse_json(text: str | bytes, **options: Any) -> Any:
    """The value of a text in JSON. An object that has a key twice is refused.

    Args:
        options: of json.loads; object_pairs_hook=None takes the last of several values, for what is only shown.

    Raises:
        ValueError: it is none, or one that is not read here; its text says why in one line.
    """
    try:
        return json.loads(text, **{"object_pairs_hook": _object, **options})
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(_in_words(error)) from None
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        if "digits" in str(error):  # Python's text names a function of its own
            raise ValueError("a number in it has thousands of digits") from None
        raise


def not_json(error: ValueError) -> str:
    """What `parse_json` found wrong, as the end of a sentence that begins with what was read."""
    return str(error) if isinstance(error, KeyTwice) else f"is not JSON: {error}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise KeyTwice(f"has the key {short_repr(twice)} twice in one object, where only one value can count")
    return found


def _in_words(error: json.JSONDecodeError) -> str:
    if not error.doc.strip():
        return "it is empty"
    what = next((ours for theirs, ours in WORDS if error.msg.startswith(theirs)), error.msg)
    line = f"line {error.lineno}, " if "\n" in error.doc.strip() else ""
    if error.pos >= len(error.doc.rstrip()) and error.msg.startswith("Expecting"):
        return f"{what} at its end: it is not complete"
    found = error.doc[error.pos : error.pos + 20].split("\n")[0]
    return f"{what} at {line}character {error.colno}" + (f", where there is {short_repr(found)}" if found else "")
