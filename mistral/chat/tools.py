"""Functions that a model may call: how each kind of template writes calls, and calls read from what was generated.

A call is given out only once it is whole, names a function that was offered, and its arguments fit that function's
schema; anything else stays text, with the reason. Knows nothing about templates or HTTP.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mistral.chat.messages import ToolCall, valid
from mistral.chat.schemas import Schema
from mistral.util.errors import UsageError, printable, short_repr
from mistral.util.parsed import KeyTwice, parse_json

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
ID = re.compile(r"[a-zA-Z0-9]{9}")  # mistral-common refuses others
CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
OPEN, CLOSE = "<tool_call>", "</tool_call>"

# How calls are written: [TOOL_CALLS] and a list (v2, v3, v7); [TOOL_CALLS]name[ARGS]{..}, again for each call, with
# [CALL_ID]id between in v11; an object between <tool_call> and </tool_call> (Hermes and those after it).
Form = Literal["list", "args", "tags"]
MARKERS: dict[Form, tuple[str, ...]] = {
    "list": (CALLS,),
    "args": (CALLS, CALL_ID, ARGS),
    "tags": (OPEN, CLOSE),
}


class ToolError(UsageError):
    """A function that cannot be offered to a model."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call.

    Args:
        definition: in OpenAI's form, `{"type": "function", "function": {"name": .., ..}}`.

    Raises:
        ToolError, SchemaError: it is none.
    """

    definition: Mapping[str, Any]
    name: str = field(init=False)
    strict: bool = field(init=False)
    parameters: Mapping[str, Any] = field(init=False)
    schema: Schema = field(init=False, repr=False)

    def __post_init__(self) -> None:
        function = self.definition.get("function")
        if self.definition.get("type") != "function" or not isinstance(function, dict):
            raise ToolError('a tool must be {"type": "function", "function": {"name": .., "parameters": ..}}')
        given = {name: value for name, value in function.items() if value is not None}
        if unknown := given.keys() - {"name", "description", "parameters", "strict"}:
            raise ToolError(f"a function has {short_repr(min(unknown))}, which is not supported: leave it out")
        name, parameters = given.get("name"), given.get("parameters", {})
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ToolError(f"a function's name is {short_repr(name)}; it must be 1 to 64 letters, digits, _ or -")
        if not isinstance(given.get("description", ""), str) or not isinstance(given.get("strict", False), bool):
            raise ToolError(f"the description of {name} must be text, and strict true or false")
        if not isinstance(parameters, dict):
            raise ToolError(f"the parameters of {name} are {short_repr(parameters)}; they must be a JSON schema")
        try:
            valid(json.dumps(self.definition, ensure_ascii=False))
        except RecursionError:
            raise ToolError(f"the definition of {name} is nested too deep") from None
        for key, value in (("name", name), ("strict", given.get("strict", False)), ("parameters", parameters)):
            object.__setattr__(self, key, value)
        object.__setattr__(self, "schema", Schema({"type": "object", **parameters}))


@dataclass(frozen=True)
class Unread:
    """Text that began as a call and is none.

    Args:
        text: as it was generated, control tokens by their names.
        reason: what is wrong with it.
    """

    text: str
    reason: str


Part = str | ToolCall | Unread


def new_id() -> str:
    """An id of a call that no other has."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class ToolReader:
    """Parts of an answer, from its text and its control tokens as they come.

    Args:
        form: how calls are written.
        tools: the functions that were offered.
        most: the most calls that may be made.
    """

    def __init__(self, form: Form, tools: Sequence[Tool], most: int | None = None) -> None:
        self._form: Form = form
        self._tools = {tool.name: tool for tool in tools}
        self._most = most
        self._fields: list[list[str]] = []  # of a call that has begun: a marker and its text, each
        self._held = ""  # text that may be the beginning of a tag
        self._after_call = False  # spaces between calls are no text
        self.calls = 0

    def push(self, text: str, marker: str | None = None) -> list[Part]:
        """What is certain after some text, and one of MARKERS behind it."""
        if self._form == "tags":
            return self._push_tags(text + (marker or ""))
        parts: list[Part] = []
        if self._fields:
            self._fields[-1][1] += text
        elif text:
            parts.append(text)
        if marker == CALLS and self._form == "args":
            parts += self._whole()
        if marker is not None and (self._fields or marker == CALLS):
            self._fields.append([marker, ""])
        elif marker is not None:
            parts.append(marker)
        return parts

    def end(self) -> list[Part]:
        """What is left at the end of the answer."""
        held, self._held = self._held, ""
        if not self._fields:
            return [held] if held else []
        self._fields[-1][1] += held
        return self._whole()

    def _push_tags(self, text: str) -> list[Part]:
        parts: list[Part] = []
        text, self._held = self._held + text, ""
        while text:
            tag = CLOSE if self._fields else OPEN
            before, found, text = text.partition(tag)
            if not found:
                keep = next((n for n in range(len(tag) - 1, 0, -1) if before.endswith(tag[:n])), 0)
                self._held, before = before[len(before) - keep :], before[: len(before) - keep]
            if self._fields:
                self._fields[-1][1] += before
                parts += self._whole(CLOSE) if found else []
                continue
            before = before.lstrip() if self._after_call else before
            if before:
                parts.append(before)
                self._after_call = False
            if found:
                self._fields.append([OPEN, ""])
        return parts

    def _whole(self, closing: str = "") -> list[Part]:
        """The calls that the fields hold, and none any more."""
        fields, self._fields = self._fields, []
        if not fields:
            return []
        self._after_call = True
        raw = "".join(marker + text for marker, text in fields) + closing
        try:
            written, rest = _READ[self._form](fields)
        except (ValueError, RecursionError) as error:
            why = "its values are nested too deeply" if isinstance(error, RecursionError) else str(error)
            return [Unread(raw, f"not a call: {printable(why, 200)}")]
        parts: list[Part] = []
        for one in written:
            name, arguments, given = one
            problem = self._problem(name, arguments)
            if problem:
                parts.append(Unread(raw if len(written) == 1 else _as_json(one), problem))
                continue
            self.calls += 1
            parts.append(ToolCall(name, arguments, given if given and ID.fullmatch(given) else new_id()))
        return parts + ([rest] if rest.strip() else [])

    def _problem(self, name: str, arguments: str) -> str | None:
        if name not in self._tools:
            return f"no function is called {short_repr(name)}: {', '.join(self._tools)}"
        if self._most is not None and self.calls >= self._most:
            return f"more than {self._most} call, and parallel_tool_calls is false"
        try:
            problem = self._tools[name].schema.problem(parse_json(arguments))
        except KeyTwice as error:
            problem = f"it {error}"
        return problem and f"the arguments of {name} do not fit its schema: {problem}"


Written = tuple[str, str, str | None]  # name, arguments and id


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not in JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _as_json(call: Written) -> str:
    return f'{{"name": {json.dumps(call[0], ensure_ascii=False)}, "arguments": {call[1]}}}'


def _json(text: str) -> tuple[Any, str]:
    """A value at the beginning of a text, and what follows it."""
    text = text.lstrip()
    value, end = _DECODER.raw_decode(text)
    return value, text[end:]


def _written(value: Any) -> Written:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("a call must be an object with a name and arguments")
    arguments, given = value.get("arguments", value.get("parameters")), value.get("id")
    if isinstance(arguments, str):
        arguments, rest = _json(arguments)
        if rest.strip():
            raise ValueError(f"the arguments of {short_repr(value['name'])} are no JSON")
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {short_repr(value['name'])} are no object")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return value["name"], text, given if isinstance(given, str) else None


def _list(fields: list[list[str]]) -> tuple[list[Written], str]:
    if len(fields) > 1:
        raise ValueError(f"{CALLS} comes twice")
    value, rest = _json(fields[0][1])
    if not isinstance(value, list) or not value:
        raise ValueError(f"after {CALLS} comes no list of calls")
    return [_written(one) for one in value], rest


def _object(fields: list[list[str]]) -> tuple[list[Written], str]:
    value, rest = _json(fields[0][1])
    if rest.strip():
        raise ValueError(f"more than one object comes before {CLOSE}")
    return [_written(value)], ""


def _args(fields: list[list[str]]) -> tuple[list[Written], str]:
    markers = [marker for marker, _ in fields]
    if markers not in ([CALLS, ARGS], [CALLS, CALL_ID, ARGS]):
        raise ValueError(f"{''.join(markers)} is not {CALLS}name{ARGS}{{..}}")
    value, rest = _json(fields[-1][1])
    given = fields[1][1].strip() if len(fields) == 3 else None
    return [_written({"name": fields[0][1].strip(), "arguments": value, "id": given})], rest


_READ = {"list": _list, "args": _args, "tags": _object}
