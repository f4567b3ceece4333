"""Messages of a conversation, and what every template does with them first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mistral.util.errors import UsageError, short_repr

ROLES = ("system", "user", "assistant")
TOOL = "tool"  # the role of what a function that was called gives back
BETWEEN = "\n\n"  # between neighbouring messages of one role, as mistral-common joins them


class TemplateError(UsageError):
    """A template that does not exist, does not go with the tokenizer, or cannot express what was asked."""


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called.

    Args:
        name: of the function.
        arguments: JSON, as text.
        id: by which the result is known; some templates write it.
    """

    name: str
    arguments: str
    id: str


@dataclass
class Message:
    """What one side says.

    Args:
        role: one of ROLES, or TOOL.
        content: the text.
        ids: of an answer, as the model generated it, without the end of sequence; None where only the text is known.
            Mistral's own templates use them as they are; a Jinja template is rendered from texts.
        tool_calls: of an answer, what it wants called.
        tool_call_id, name: of a result, the call and the function it is of.
    """

    role: str
    content: str
    ids: list[int] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


def checked(messages: Sequence[Message]) -> list[Message]:
    """The messages, without system messages that are empty.

    Raises:
        TemplateError: none, an unknown role, or text that is not valid Unicode.
    """
    if not messages:
        raise TemplateError("a conversation has at least one message")
    for message in messages:
        if message.role not in (*ROLES, TOOL):
            raise TemplateError(f"no role is called {short_repr(message.role)}: {', '.join((*ROLES, TOOL))}")
        if message.tool_calls and message.role != "assistant":
            raise TemplateError(f"a message of the role {message.role} has tool calls: only answers have")
        calls = (text for call in message.tool_calls for text in (call.name, call.arguments, call.id))
        for text in (message.content, message.name or "", message.tool_call_id or "", *calls):
            valid(text)
    return [m for m in messages if m.role != "system" or m.content]


def joined(messages: Sequence[Message], roles: Sequence[str] = ROLES) -> list[Message]:
    """The messages, with neighbours of one role as one message: roles need not alternate."""
    found: list[Message] = []
    for message in messages:
        if found and message.role == found[-1].role and message.role in roles:
            found[-1] = _as_one(found[-1], message)
        else:
            found.append(message)
    return found


def _as_one(one: Message, two: Message) -> Message:
    calls = one.tool_calls + two.tool_calls
    texts = [text for text in (one.content, two.content) if text or not calls]
    return replace(one, content=BETWEEN.join(texts), ids=None, tool_calls=calls)


def valid(text: str) -> str:
    """A text.

    Raises:
        TemplateError: it holds half of a pair of surrogates, which no encoding has.
    """
    if found := re.search(r"[\ud800-\udfff]", text):
        raise TemplateError(f"the text is not valid Unicode at character {found.start()}")
    return text
