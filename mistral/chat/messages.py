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


@dataclass(frozen=True)
class Thought:
    """What a model thinks before it answers; in a system prompt, where thoughts go.

    Args:
        text: of it.
        at: characters of the message's content that come before it.
        closed: whether its end was written; not so where an answer was broken off within it.
    """

    text: str
    at: int = 0
    closed: bool = True


@dataclass
class Message:
    """What one side says.

    Args:
        role: one of ROLES, or TOOL.
        content: the text, without thoughts.
        thinking: of an answer or a system prompt, the thoughts in it, in their order.
        ids: of an answer, as the model generated it, without the end of sequence; None where only the text is known.
            Mistral's own templates use them as they are; a Jinja template is rendered from texts.
        tool_calls: of an answer, what it wants called.
        tool_call_id: of a result, the call that it is of.
        name: of a result, the function; of others, who speaks, which only a Jinja template can write.
    """

    role: str
    content: str
    ids: list[int] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    thinking: tuple[Thought, ...] = ()

    @property
    def chunks(self) -> list[str | Thought]:
        """Texts and thoughts, in their order."""
        found: list[str | Thought] = []
        done = 0
        for thought in self.thinking:
            if thought.at > done:
                found.append(self.content[done : thought.at])
            found.append(thought)
            done = thought.at
        return found + ([self.content[done:]] if self.content[done:] else [])


def from_chunks(role: str, chunks: Sequence[str | Thought]) -> Message:
    """A message of texts and thoughts; the places of the thoughts are counted here."""
    content = ""
    thinking: list[Thought] = []
    for chunk in chunks:
        if isinstance(chunk, Thought):
            thinking.append(replace(chunk, at=len(content)))
        else:
            content += chunk
    return Message(role, content, thinking=tuple(thinking))


def checked(messages: Sequence[Message]) -> list[Message]:
    """The messages, in a list. An empty system prompt is one: a template may have another for where there is none.

    Raises:
        TemplateError: none, an unknown role, or text that is not valid Unicode.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Message) for message in messages):
        raise TemplateError(f"messages is {short_repr(messages)}; it must be a list of Message(role, content)")
    if not messages:
        raise TemplateError("a conversation has at least one message")
    for message in messages:
        if message.role not in (*ROLES, TOOL):
            raise TemplateError(f"no role is called {short_repr(message.role)}: {', '.join((*ROLES, TOOL))}")
        if message.tool_calls and message.role != "assistant":
            raise TemplateError(f"a message of the role {message.role} has tool calls: only answers have")
        if message.thinking and message.role not in ("assistant", "system"):
            raise TemplateError(f"a message of the role {message.role} has a thought: leave it out")
        thoughts = (thought.text for thought in message.thinking)
        calls = (text for call in message.tool_calls for text in (call.name, call.arguments, call.id))
        for text in (message.content, message.name or "", message.tool_call_id or "", *calls, *thoughts):
            valid(text)
    return list(messages)


def with_something(messages: Sequence[Message]) -> list[Message]:
    """The messages without system prompts that are empty, for templates that have no place for one."""
    return [m for m in messages if m.role != "system" or m.content or m.thinking]


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
    if one.thinking or two.thinking:  # as mistral-common joins them: an empty line between two texts alone
        before, after = one.chunks, two.chunks
        if before and after and isinstance(before[-1], str) and isinstance(after[0], str):
            before.append(BETWEEN)
        made = from_chunks(one.role, before + after)
        return replace(one, content=made.content, thinking=made.thinking, ids=None, tool_calls=calls)
    texts = [text for text in (one.content, two.content) if text or not calls]
    return replace(one, content=BETWEEN.join(texts), ids=None, tool_calls=calls)


def behind(system: Message | None, messages: Sequence[Message]) -> list[Message]:
    """The messages, behind a system prompt if there is one."""
    return [*messages] if system is None else [system, *messages]


def valid(text: object) -> str:
    """A text.

    Raises:
        TemplateError: it is none, or holds half of a pair of surrogates, which no encoding has.
    """
    if not isinstance(text, str):
        raise TemplateError(f"{short_repr(text)} is no text: give a str")
    if found := re.search(r"[\ud800-\udfff]", text):
        raise TemplateError(f"the text is not valid Unicode at character {found.start()}")
    return text
