"""JSON from a file or a request, whose errors are sentences of ours. Runs without torch."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes, **options: Any) -> Any:
    """The value of a text in JSON.

    Args:
        options: of json.loads.

    Raises:
        ValueError: it is none, or one that is not read here; its text says why in one line.
    """
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError as error:
        if "digits" in str(error):  # Python's text names a function of its own
            raise ValueError("a number in it has thousands of digits") from None
        raise
