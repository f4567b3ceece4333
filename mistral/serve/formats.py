"""What an answer must fit: `response_format` of OpenAI's, `structured_outputs` of vLLM's, as a rule of a grammar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mistral.grammar import Grammar, Grammars, choice_rule, json_rule, regex_rule
from mistral.serve.fields import ApiError
from mistral.util.errors import short_repr

MOST_CHOICES = 1000


def format_field(given: Mapping[str, Any]) -> str:
    """The field of a request that says what an answer must fit."""
    return "structured_outputs" if given.get("structured_outputs") is not None else "response_format"


def read_format(given: Mapping[str, Any], grammars: Callable[[], Grammars]) -> str | None:
    """The right side of the rule that an answer must fit, in llguidance's form of Lark; None where it may be any text.

    Raises:
        ApiError, MistralError: what it says cannot be.
    """
    wanted, structured = given.get("response_format"), given.get("structured_outputs")
    if wanted is not None and wanted.get("type") == "text" and wanted.keys() == {"type"}:
        wanted = None
    if wanted is None and structured is None:
        return None
    if wanted is not None and structured is not None:
        raise ApiError("response_format and structured_outputs: give one of them", "structured_outputs")
    if given.get("ignore_eos"):
        raise ApiError("ignore_eos: an answer that must fit a format ends where that is complete", "ignore_eos")
    return _response_format(wanted) if wanted is not None else _structured(structured, grammars)


def whole(rule: str, grammars: Grammars) -> Grammar:
    """The grammar of an answer that fits a rule and has nothing else.

    Raises:
        SamplingError: it has what llguidance does not know.
    """
    return grammars.lark(f"start: {rule}")


def _response_format(wanted: Mapping[str, Any]) -> str:
    if wanted == {"type": "json_object"}:
        return json_rule({"type": "object"})
    told = wanted.get("json_schema") if wanted.get("type") == "json_schema" else None
    if not isinstance(told, dict) or told.keys() - {"name", "description", "schema", "strict"}:
        form = '{"type": "json_schema", "json_schema": {"name": .., "schema": {..}}}'
        raise ApiError(
            f'response_format must be {{"type": "text"}}, {{"type": "json_object"}} or {form}', "response_format"
        )
    return json_rule(_object(told.get("schema"), "response_format"))


def _structured(wanted: Any, grammars: Callable[[], Grammars]) -> str:
    name = "structured_outputs"
    found = {key: value for key, value in wanted.items() if value is not None}
    if len(found) != 1 or not found.keys() <= {"json", "regex", "choice"}:
        raise ApiError(f"{name} must have one of json, regex and choice", name)
    ((kind, value),) = found.items()
    if kind == "json":
        return json_rule(_object(value, name))
    if kind == "regex":
        if not isinstance(value, str):
            raise ApiError(f"regex is {short_repr(value)}; it must be text", name)
        grammars()  # says what is missing where llguidance is
        return regex_rule(value)
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise ApiError(f"choice is {short_repr(value)}; it must be a list of texts", name)
    if not 1 <= len(value) <= MOST_CHOICES:
        raise ApiError(f"choice has {len(value)} texts; it must have 1 to {MOST_CHOICES}", name)
    return choice_rule(value)


def _object(schema: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(schema, dict):
        raise ApiError(f"the schema is {short_repr(schema)}; it must be an object", name)
    return schema
