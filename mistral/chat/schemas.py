"""Values that fit a JSON schema from somebody else, by the jsonschema library.

Nothing is fetched: references stay within the schema. Patterns have a time limit. Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mistral.util.errors import Unavailable, UsageError, printable

PATIENCE = 0.1  # seconds that a pattern may take


class SchemaError(UsageError):
    """A JSON schema that is none, or that cannot be checked here."""


class Schema:
    """A JSON schema.

    Args:
        schema: of draft 2020-12, unless its `$schema` says another one.

    Raises:
        SchemaError: it is no schema.
        Unavailable: jsonschema is missing.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        try:
            from jsonschema import Draft202012Validator
            from jsonschema.validators import extend, validator_for
            from jsonschema_specifications import REGISTRY
        except ImportError as error:
            raise Unavailable(f"JSON schemas need jsonschema ({error}): pip install jsonschema") from None
        try:
            if _has_key(schema, "patternProperties"):  # the library's own patterns have no time limit
                raise SchemaError("the schema has patternProperties, which is not supported: name the properties")
            kind = validator_for(schema, default=Draft202012Validator)
            kind.check_schema(schema)
            self._validator = extend(kind, {"pattern": _pattern})(schema, registry=REGISTRY)
        except SchemaError:
            raise
        except RecursionError:
            raise SchemaError("the schema is nested too deeply") from None
        except Exception as error:  # whatever the library makes of it
            reason = getattr(error, "message", None) or type(error).__name__
            raise SchemaError(f"not a JSON schema: {printable(str(reason), 200)}") from None

    def problem(self, value: Any) -> str | None:
        """Why a value does not fit; None if it does."""
        try:
            error = next(self._validator.iter_errors(value), None)
        except Exception as broken:  # a reference that leads nowhere or round in a circle, a pattern that is none
            return f"the schema cannot be checked: {printable(' '.join(str(broken).split()), 200)}"
        if error is None:
            return None
        return f"{error.json_path}: {printable(error.message, 200)}"


def _has_key(value: Any, name: str) -> bool:
    """Whether any object within has this key."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, Mapping):
            if name in one:
                return True
            left += one.values()
        elif isinstance(one, list):
            left += one
    return False


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    import regex
    from jsonschema import ValidationError

    if isinstance(instance, str) and not regex.search(pattern, instance, timeout=PATIENCE):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")
