"""Messages with calls and results as mistral-common takes them; what its versions have no place for is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from mistral.chat.messages import TOOL, Message, TemplateError
from mistral.chat.thinking import for_mistral_common
from mistral.chat.tools import ID, Tool
from mistral.util.errors import short_repr
from mistral.util.parsed import parse_json

WITH_IDS = ("v3", "v7", "v11")  # versions that write the ids of calls


def offered(tools: Sequence[Tool]) -> list[Any] | None:
    """Functions in mistral-common's form."""
    from mistral_common.protocol.instruct.tool_calls import Tool as Theirs

    return [Theirs.from_openai(dict(tool.definition)) for tool in tools] or None


def prepared(messages: Sequence[Message], version: str, last_user: int) -> list[Message]:
    """Messages with calls and results as mistral-common's normalizer leaves them: each result after a call that it is
    of, results in the order of the calls (from v11 on), JSON written in one way.

    Args:
        last_user: where the last question is; there must be one.

    Raises:
        TemplateError: no place for tools, a result of no call, or an id that the version cannot write.
    """
    if version == "v1":
        raise TemplateError("template v1 has no place for tools: leave them out")
    if last_user < 0:
        raise TemplateError("a conversation with tools needs a message of the user")
    found: list[Message] = []
    names: dict[str, str] = {}
    for message in messages:
        if message.tool_calls:
            if message.content and version in ("v2", "v3"):
                raise TemplateError(
                    f"template {version} has no place for text beside tool calls: leave its content out"
                )
            names = {call.id: call.name for call in message.tool_calls}
            for call in message.tool_calls:
                _check_id(call.id, version)
        elif message.role == TOOL:
            name = _name_of(message, names)
            content = _normal(message.content) if version in ("v2", "v3") else message.content
            message = replace(message, content=content, name=message.name or name)
        found.append(message)
    if version == "v2":
        _refuse_two_results(found[last_user:])
    return _in_order(found) if version not in ("v2", "v3", "v7") else found


def _check_id(given: str, version: str) -> None:
    if version in WITH_IDS and not ID.fullmatch(given):
        raise TemplateError(
            f"the id of a tool call is {short_repr(given)}; template {version} writes it, as 9 letters and digits"
        )


def _name_of(message: Message, names: dict[str, str]) -> str:
    if message.tool_call_id not in names:
        raise TemplateError(
            f"a result is of the call {short_repr(message.tool_call_id)}, which no answer before it has"
        )
    return names[message.tool_call_id or ""]


def _refuse_two_results(messages: Sequence[Message]) -> None:
    for one, two in pairwise(messages):
        if one.role == two.role == TOOL:
            raise TemplateError("template v2 has no place for several results of one answer")


def _in_order(messages: Sequence[Message]) -> list[Message]:
    """Results in the order of the calls that they are of."""
    found: list[Message] = []
    order: dict[str, int] = {}
    begin = 0
    for message in messages:
        if message.tool_calls:
            order = {call.id: i for i, call in enumerate(message.tool_calls)}
        found.append(message)
        if message.role != TOOL:
            begin = len(found)
        else:
            found[begin:] = sorted(found[begin:], key=lambda m: order.get(m.tool_call_id or "", len(order)))
    return found


def _normal(text: str) -> str:
    """JSON as mistral-common writes it; other text as it is."""
    try:
        return json.dumps(parse_json(text or "{}"), ensure_ascii=False)
    except ValueError:
        return text


def answer(message: Message) -> Any:
    """An answer, which may have calls."""
    from mistral_common.protocol.instruct.messages import AssistantMessage
    from mistral_common.protocol.instruct.tool_calls import FunctionCall, ToolCall

    made = [
        ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=_normal(call.arguments)))
        for call in message.tool_calls
    ]
    return AssistantMessage(content=for_mistral_common(message), tool_calls=made or None)


def result(message: Message) -> Any:
    """What a function gave back."""
    from mistral_common.protocol.instruct.messages import ToolMessage

    return ToolMessage(content=message.content, tool_call_id=message.tool_call_id, name=message.name)
