"""Messages that hold thoughts: from files, requests and generated text, and as templates take them.

Knows nothing about models or HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mistral.chat.messages import Message, TemplateError, Thought, from_chunks
from mistral.thinking import ThoughtIds
from mistral.util.errors import short_repr

BEGIN, END = "[THINK]", "[/THINK]"
PAIRS = ((BEGIN, END), ("<think>", "</think>"))  # Mistral's; that of many templates in Jinja
FIELDS = ("reasoning_content", "reasoning")  # of messages, as servers and templates name it


def ids_of(tokens: Mapping[str, int], text: str) -> ThoughtIds | None:
    """The ids of thoughts of a template in Jinja: those tokens that its text mentions."""
    for begin, end in PAIRS:
        if begin in tokens and end in tokens and begin in text and end in text:
            return ThoughtIds(tokens[begin], tokens[end])
    return None


def add_thought(message: Message, text: str, closed: bool = False) -> None:
    """Put text behind the thought that a message is in; a new one begins where there is none that is open."""
    *before, last = message.thinking or (Thought("", closed=True),)
    if last.closed:
        before, last = list(message.thinking), Thought("", len(message.content), closed=False)
    message.thinking = (*before, Thought(last.text + text, last.at, closed))


def split_system(text: str) -> Message:
    """A system prompt from a file of a model, in which `[THINK]..[/THINK]` is a thought: Mistral's SYSTEM_PROMPT.txt.

    Raises:
        TemplateError: a thought in it has no end, or no beginning.
    """
    chunks: list[str | Thought] = []
    parts = re.split(r"(\[THINK\].*?\[/THINK\])", text, flags=re.DOTALL)
    for i, part in enumerate(parts):
        inner = part[len(BEGIN) : -len(END)] if i % 2 else part
        if BEGIN in inner or END in inner:
            raise TemplateError(f"the system prompt has {BEGIN} and {END} that do not go together")
        if i % 2:
            chunks.append(Thought(inner))
        elif part:
            chunks.append(part)
    return from_chunks("system", chunks)


def of_field(given: Mapping[str, Any]) -> str | None:
    """The thought of a message as servers write it, in one of FIELDS; None without.

    Raises:
        TemplateError: no text, or two that differ.
    """
    found = {name: given[name] for name in FIELDS if given.get(name) is not None}
    for name, text in found.items():
        if not isinstance(text, str):
            raise TemplateError(f"{name} is {short_repr(text)}; it must be text")
    if len(set(found.values())) > 1:
        raise TemplateError(f"{' and '.join(FIELDS)} differ: give one of them")
    return next(iter(found.values()), None)


def of_part(part: Mapping[str, Any]) -> Thought | None:
    """The thought that a part of a content is, `{"type": "thinking", "thinking": ..}`; None where it is something else.

    `thinking` is text, or a list of texts in parts, as Mistral's API has it.
    """
    if part.get("type") != "thinking" or part.keys() - {"type", "thinking", "closed"}:
        return None
    text, closed = part.get("thinking"), part.get("closed", True)
    if isinstance(text, list) and all(_is_text(p) for p in text):
        text = "".join(p["text"] for p in text)
    return Thought(text, closed=closed) if isinstance(text, str) and isinstance(closed, bool) else None


def _is_text(part: object) -> bool:
    return (
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


def for_mistral_common(message: Message) -> Any:
    """A content as mistral-common takes it: text, or texts and thoughts; None where it is empty."""
    if not message.thinking:
        return message.content or None
    from mistral_common.protocol.instruct.chunk import TextChunk, ThinkChunk

    return [
        ThinkChunk(thinking=c.text, closed=c.closed) if isinstance(c, Thought) else TextChunk(text=c)
        for c in message.chunks
    ]
