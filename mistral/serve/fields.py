"""What bodies of requests may say: each field with its type; anything else is refused by name.

Knows nothing about HTTP but the numbers of its errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mistral.util.english import did_you_mean
from mistral.util.errors import MistralError, short_repr


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form.

    Args:
        message: what is wrong, and what to do.
        param: the field at fault.
        status: of HTTP.
        kind, code: OpenAI's `type` and `code`.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.kind, self.code = message, param, status, kind, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


# Types of fields: a name for people and for the OpenAPI document, and a test.
@dataclass(frozen=True)
class Kind:
    """What a field holds."""

    name: str
    schema: Mapping[str, Any]
    test: Callable[[Any], bool] = field(repr=False)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_int, value))


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_prompt(value: Any) -> bool:
    several = isinstance(value, list) and bool(value) and all(map(is_ids, value))
    return isinstance(value, str) or is_ids(value) or _is_strings(value) or several


def _list_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


_TEXT, _ID = {"type": "string"}, {"type": "integer"}
INT = Kind("a whole number", _ID, is_int)
NUMBER = Kind("a number", {"type": "number"}, is_number)
BOOL = Kind("true or false", {"type": "boolean"}, lambda value: isinstance(value, bool))
STRING = Kind("text", _TEXT, lambda value: isinstance(value, str))
IDS = Kind("a list of ids", _list_of(_ID), is_ids)
OBJECT = Kind("an object", {"type": "object"}, lambda value: isinstance(value, dict))
OBJECTS = Kind(
    "a list of objects",
    _list_of({"type": "object"}),
    lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value),
)
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": {"anyOf": [_TEXT, _list_of({"type": "object"}), {"type": "null"}]},
    },
    "required": ["role"],
}
MESSAGES = Kind(OBJECTS.name, {**_list_of(_MESSAGE), "minItems": 1}, OBJECTS.test)
CHOICE = Kind(
    "text or an object",
    {"anyOf": [_TEXT, {"type": "object"}]},
    lambda value: isinstance(value, str | dict),
)
STOP = Kind(
    "text or a list of texts",
    {"anyOf": [_TEXT, _list_of(_TEXT)]},
    lambda value: isinstance(value, str) or _is_strings(value),
)
PROMPT = Kind(
    "text, ids, or a list of either",
    {"anyOf": [_TEXT, _list_of(_ID), _list_of(_TEXT), _list_of(_list_of(_ID))]},
    _is_prompt,
)

SAMPLING = {"temperature": NUMBER, "top_p": NUMBER, "min_p": NUMBER, "top_k": INT, "seed": INT, "n": INT}
SAMPLING |= {"frequency_penalty": NUMBER, "presence_penalty": NUMBER, "repetition_penalty": NUMBER}
_BOTH = {
    **SAMPLING,
    **{"model": STRING, "max_tokens": INT, "stop": STOP, "logit_bias": OBJECT, "prompt_logprobs": INT},
    **{"stream": BOOL, "stream_options": OBJECT, "return_token_ids": BOOL, "ignore_eos": BOOL},
    **{"user": STRING, "safety_identifier": STRING, "prompt_cache_key": STRING},  # without effect
    "return_tokens_as_token_ids": BOOL,
    **{"response_format": OBJECT, "structured_outputs": OBJECT},
}
COMPLETION = {**_BOTH, "prompt": PROMPT, "suffix": STRING, "echo": BOOL, "logprobs": INT, "best_of": INT}
CHAT = {**_BOTH, "messages": MESSAGES, "max_completion_tokens": INT, "logprobs": BOOL, "top_logprobs": INT}
CHAT |= {"reasoning_effort": STRING, "tools": OBJECTS, "tool_choice": CHOICE, "parallel_tool_calls": BOOL}
TOKENIZE = {"model": STRING, "prompt": STRING, "messages": MESSAGES, "add_special_tokens": BOOL}
TOKENIZE |= {"add_generation_prompt": BOOL, "tools": OBJECTS, "reasoning_effort": STRING}
DETOKENIZE = {"model": STRING, "tokens": IDS}

# Fields of OpenAI's that mean something which is not done here; each with the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    **{"functions": ([],), "function_call": ("none",), "modalities": (["text"],)},
    **{"audio": (), "prediction": (), "web_search_options": (), "store": (False,)},
    **{"service_tier": ("auto", "default"), "metadata": ({},), "verbosity": ()},
}


@contextmanager
def blamed(param: str, *others: str) -> Iterator[None]:
    """While open, what is wrong is wrong with this field, or with the one of the others that a message begins with.

    Raises:
        ApiError: with its name.
    """
    try:
        yield
    except ApiError:
        raise
    except MistralError as error:
        first = str(error).partition(" ")[0]
        raise ApiError(str(error), first if first in others else param) from None


def fields_of(body: Any, known: Mapping[str, Kind]) -> dict[str, Any]:
    """The fields of a body that are given, each of its type; null is as good as absent.

    Raises:
        ApiError: not an object, an unknown field, or a wrong type.
    """
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in list(given.items()):
        if name in _REFUSED and name not in known:
            if value not in _REFUSED[name]:
                raise ApiError(f"{name} is not supported by this server: leave it out", name, code="unsupported_field")
            del given[name]
        elif name not in known:
            meant = did_you_mean(name[:80], known) or f": {', '.join(known)}"
            raise ApiError(f"no field is called {short_repr(name)}{meant}", name[:80], code="unknown_field")
        elif not known[name].test(value):
            raise ApiError(f"{name} is {short_repr(value)}; it must be {known[name].name}", name)
    return given
