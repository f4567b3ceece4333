"""Messages of a conversation, and what every template does with them first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mistral.util.errors import UsageError, short_repr

ROLES = ("system", "user", "assistant")
BETWEEN = "\n\n"  # between neighbouring messages of one role, as mistral-common joins them


class TemplateError(UsageError):
    """A template that does not exist, does not go with the tokenizer, or cannot express what was asked."""


@dataclass
class Message:
    """What one side says.

    Args:
        role: one of ROLES.
        content: the text.
        ids: of an answer, as the model generated it, without the end of sequence; None where only the text is known.
            Mistral's own templates use them as they are; a Jinja template is rendered from texts.
    """

    role: str
    content: str
    ids: list[int] | None = None


def checked(messages: Sequence[Message]) -> list[Message]:
    """The messages, without system messages that are empty.

    Raises:
        TemplateError: none, an unknown role, or text that is not valid Unicode.
    """
    if not messages:
        raise TemplateError("a conversation has at least one message")
    for message in messages:
        if message.role not in ROLES:
            raise TemplateError(f"no role is called {short_repr(message.role)}: {', '.join(ROLES)}")
        valid(message.content)
    return [m for m in messages if m.role != "system" or m.content]


def joined(messages: Sequence[Message], roles: Sequence[str] = ROLES) -> list[Message]:
    """The messages, with neighbours of one role as one message: roles need not alternate."""
    found: list[Message] = []
    for message in messages:
        if found and message.role == found[-1].role and message.role in roles:
            found[-1] = replace(found[-1], content=found[-1].content + BETWEEN + message.content, ids=None)
        else:
            found.append(message)
    return found


def valid(text: str) -> str:
    """A text.

    Raises:
        TemplateError: it holds half of a pair of surrogates, which no encoding has.
    """
    if found := re.search(r"[\ud800-\udfff]", text):
        raise TemplateError(f"the text is not valid Unicode at character {found.start()}")
    return text
