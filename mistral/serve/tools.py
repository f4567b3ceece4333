"""Functions in requests: which are offered, which must be called, and the calls and results in messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mistral.chat.messages import TOOL, Message, Thought, ToolCall, from_chunks
from mistral.chat.templates import Template
from mistral.chat.thinking import FIELDS, of_field, of_part
from mistral.chat.tools import ARGS, CALL_ID, CALLS, CLOSE, MARKERS, OPEN, Form, Tool
from mistral.grammar import SPACE, Grammar, Grammars, as_text
from mistral.serve.fields import ApiError, blamed
from mistral.serve.formats import whole
from mistral.tokenizer import Tokenizer
from mistral.util.errors import short_repr

MOST_TOOLS = 128


@dataclass(frozen=True)
class ToolUse:
    """What a request says of functions.

    Args:
        tools: that are offered.
        form: how calls are written.
        markers: control ids that are part of a call, and their names.
        most: the most calls of an answer; None: any number.
        grammar: what the answer must fit, where a call is required, its arguments are strict, or text has a format.
    """

    tools: tuple[Tool, ...]
    form: Form
    markers: Mapping[int, str]
    most: int | None
    grammar: Grammar | None


def read_tools(
    given: Mapping[str, Any],
    template: Template,
    tokenizer: Tokenizer,
    grammars: Callable[[], Grammars],
    answer: str | None,
) -> ToolUse | None:
    """What a body says of functions; None where none is offered.

    Args:
        grammars: makes them.
        answer: the rule that an answer without calls must fit; see `formats.read_format`.

    Raises:
        ApiError, MistralError: what it says cannot be.
    """
    choice = given.get("tool_choice", "auto")
    if not given.get("tools"):
        if choice not in ("auto", "none"):
            raise ApiError("tool_choice needs tools", "tool_choice")
        if "parallel_tool_calls" in given:
            raise ApiError("parallel_tool_calls needs tools", "parallel_tool_calls")
        return None
    if len(given["tools"]) > MOST_TOOLS:
        raise ApiError(f"{len(given['tools'])} tools; at most {MOST_TOOLS} can be offered", "tools")
    with blamed("tools"):
        tools = tuple(Tool(tool) for tool in given["tools"])
    if len({tool.name for tool in tools}) < len(tools):
        raise ApiError("two tools have the same name", "tools")
    wanted = _wanted(choice, tools)
    if choice == "none":
        return None
    if template.tool_form is None:
        raise ApiError(f"the template of this model, {template.name}, has no place for tools", "tools")
    form, control = template.tool_form, tokenizer.control_tokens
    markers = {control[name]: name for name in MARKERS[form] if name in control}
    if form != "tags" and CALLS not in markers.values():
        raise ApiError(f"this model's tokenizer has no control token {CALLS}", "tools")
    most = None if given.get("parallel_tool_calls", True) else 1
    grammar = None
    if wanted or answer is not None or any(tool.strict for tool in tools):
        text = None if wanted else answer
        if wanted and answer is not None:
            whole(answer, grammars())  # no text will come that must fit it, but what is no format is refused
        grammar = _grammar(form, wanted or tools, most, tokenizer, grammars(), required=bool(wanted), text=text)
    return ToolUse(tools, form, markers, most, grammar)


def _wanted(choice: Any, tools: Sequence[Tool]) -> Sequence[Tool]:
    """The functions of which one must be called."""
    if choice in ("auto", "none"):
        return ()
    if choice == "required":
        return tools
    named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(named, dict) or named.keys() != {"name"}:
        form = '{"type": "function", "function": {"name": ..}}'
        raise ApiError(f"tool_choice is {short_repr(choice)}; it must be none, auto, required or {form}", "tool_choice")
    found = [tool for tool in tools if tool.name == named["name"]]
    if not found:
        raise ApiError(f"tool_choice names {short_repr(named['name'])}, which is not among the tools", "tool_choice")
    return found


def _grammar(
    form: Form,
    tools: Sequence[Tool],
    most: int | None,
    tokenizer: Tokenizer,
    grammars: Grammars,
    *,
    required: bool,
    text: str | None,
) -> Grammar:
    """Calls of some functions: at once, or in place of a text that fits a rule, or from the first marker on.

    Arguments fit their schemas where a call is required or the function is strict.
    """

    def token(name: str) -> str:
        return f"<[{tokenizer.control_tokens[name]}]>" if name in tokenizer.control_tokens else json.dumps(name)

    def call(tool: Tool) -> str:
        exact = required or tool.strict
        schema = {"type": "object", **tool.parameters} if exact else {"type": "object"}
        arguments = f"{SPACE}? %json {as_text(schema)}"
        if form == "args":
            number = f"({token(CALL_ID)} /[a-zA-Z0-9]{{9}}/)? " if CALL_ID in tokenizer.control_tokens else ""
            return f"{json.dumps(tool.name)} {number}{token(ARGS)} {arguments}"
        begin = json.dumps(f'{{"name": "{tool.name}", "arguments":')
        number = r'("," SPACE? "\"id\": \"" /[a-zA-Z0-9]{9}/ "\"")?' if form == "list" else ""
        return f'{begin} {arguments} {number} SPACE? "}}"'

    again = "" if most == 1 else "*"
    rest = {
        "list": f'SPACE? "[" call ("," SPACE? call){again} SPACE? "]"' if again else 'SPACE? "[" call SPACE? "]"',
        "args": f"call ({token(CALLS)} call)*" if again else "call",
        "tags": f"one (SPACE? {token(OPEN)} one)*" if again else "one",
    }[form]
    first = token(OPEN if form == "tags" else CALLS)
    lines = [
        *(
            ["start: calls | text", f"text: {text}"]
            if text is not None
            else ["start: calls" if required else "start: rest"]
        ),
        f"calls: {first} rest",
        f"rest: {rest}",
        f"one: SPACE? call SPACE? {token(CLOSE)}" if form == "tags" else "",
        "call: " + " | ".join(f"call_{i}" for i in range(len(tools))),
        *(f"call_{i}: {call(tool)}" for i, tool in enumerate(tools)),
        f"SPACE: {SPACE}",
    ]
    after = None
    if not required and text is None:
        marker = OPEN if form == "tags" else CALLS
        after = tokenizer.added_tokens.get(marker)
        if after is None:
            raise ApiError(f"strict needs a token {marker}, which this model's tokenizer lacks: leave it out", "tools")
    return grammars.lark("\n".join(line for line in lines if line), after)


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages as they are in a body.

    Raises:
        ApiError: what they say cannot be.
    """
    found = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        given = {name: value for name, value in message.items() if value is not None and value != []}
        role, content = given.get("role"), given.get("content", "")
        if role != "assistant" and message.get("content") is None:  # an answer may be calls, or a thought, alone
            raise ApiError(f"{where} has no content", "messages")
        known = {"assistant": ("tool_calls", "tool_call_error", *FIELDS), TOOL: ("tool_call_id",)}
        for name in given:
            if name not in ("role", "content", "name", *(known.get(role, ()) if isinstance(role, str) else ())):
                raise ApiError(f"{where} has {short_repr(name)}, which is not supported: leave it out", "messages")
        chunks = [_part(part, where, role) for part in content] if isinstance(content, list) else [content]
        thought = of_field(given)
        if thought is not None and any(isinstance(chunk, Thought) for chunk in chunks):
            raise ApiError(f"{where} has thoughts in its content and beside it: give one of them", "messages")
        texts = (
            role,
            *(c for c in chunks if not isinstance(c, Thought)),
            given.get("tool_call_id", ""),
            given.get("name", ""),
        )
        if not all(isinstance(text, str) for text in texts) or role is None:
            raise ApiError(f"{where} must have a role and a content, both text", "messages")
        if role == TOOL and not given.get("tool_call_id"):
            raise ApiError(f"{where} must have the tool_call_id of the call that it is the result of", "messages")
        calls = _calls(given.get("tool_calls", []), where)
        first = [] if thought is None else [Thought(thought)]
        made = from_chunks("system" if role == "developer" else role, first + chunks)
        of_call: dict[str, Any] = {name: given.get(name) for name in ("tool_call_id", "name")}
        found.append(replace(made, tool_calls=calls, **of_call))
    if not found:
        raise ApiError("a conversation has at least one message", "messages")
    return found


def _calls(given: Any, where: str) -> tuple[ToolCall, ...]:
    calls = []
    for call in given if isinstance(given, list) else [None]:
        told = call if isinstance(call, dict) and call.get("type", "function") == "function" else {}
        function = told.get("function")
        function = function if isinstance(function, dict) else {}
        name, arguments, number = function.get("name"), function.get("arguments"), told.get("id")
        if not (isinstance(name, str) and isinstance(arguments, str) and isinstance(number, str)):
            form = '{"id": .., "type": "function", "function": {"name": .., "arguments": ..}}'
            raise ApiError(f"{where} has a tool call that is not {form}", "messages")
        calls.append(ToolCall(name, arguments, number))
    return tuple(calls)


def _part(part: Any, where: str, role: Any) -> str | Thought:
    thought = of_part(part) if isinstance(part, dict) and role in ("assistant", "system", "developer") else None
    if thought is not None:
        return thought
    if isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text":
        text = part["text"]
        if isinstance(text, str):
            return text
    raise ApiError(f'{where} has a part that is not {{"type": "text", "text": ..}}: only text is supported', "messages")
