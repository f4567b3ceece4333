"""Conversations as ids, and which of them are the model's own: the loss is on answers and the id that ends them.

Mistral's templates are written message by message, through mistral-common. Of any other template the beginnings of a
conversation are compared: what an answer adds to the ids before it is the answer.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mistral.chat import tool_messages
from mistral.chat.messages import BETWEEN, TOOL, Message, TemplateError, Thought, ToolCall
from mistral.chat.templates import MistralCommon, Template
from mistral.chat.thinking import for_mistral_common
from mistral.chat.tools import ID, Tool
from mistral.tokenizer import Tokenizer
from mistral.util.english import counted
from mistral.util.errors import UsageError, printable

NO_ID = "null"  # of a call that has none; mistral-common's own
SHOWN = 5  # control tokens that a note names


@dataclass(frozen=True)
class Turn:
    """A message of a sample.

    Args:
        role: system, user, assistant or tool.
        content: the text; may be empty where there are tool calls.
        weight: of an answer in the loss.
        tool_calls: of an answer: id, name and arguments (JSON as text) of each.
        tool_call_id, name: of a tool's result.
        thinking: of an answer or a system prompt; learned as the rest of an answer is.
    """

    role: str
    content: str
    weight: float = 0.0
    tool_calls: tuple[tuple[str, str, str], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    thinking: tuple[Thought, ...] = ()

    @property
    def message(self) -> Message:
        """The same as a message."""
        calls = tuple(ToolCall(name, arguments, id) for id, name, arguments in self.tool_calls)
        whose = (self.tool_call_id, self.name)
        return Message(self.role, self.content, None, calls, *whose, self.thinking)


@dataclass
class Marked:
    """Ids of a sample, and how much the prediction of each counts: of the first, which nothing predicts, it is 0.

    Args:
        renamed: ids of tool calls that the template could not write, and so have others.
    """

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    renamed: int = 0

    def add(self, ids: Sequence[int], weight: float = 0.0) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)


class Spelt:
    """Counts samples whose texts spell control tokens: a text never becomes one, so they are learned as text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        names = sorted(filter(None, tokenizer.control_tokens), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._seen = Counter[str]()
        self._samples = 0

    def look(self, *texts: str) -> None:
        """Take the texts of one sample."""
        seen = {name for text in texts for name in self._names.findall(text)}
        self._seen.update(seen)
        self._samples += bool(seen)

    def notes(self) -> list[str]:
        """A note on all samples, if there is anything to tell."""
        if not self._samples:
            return []
        names = ", ".join(printable(name) for name, _ in self._seen.most_common(SHOWN))
        more = ", .." if len(self._seen) > SHOWN else ""
        verb = "spells" if self._samples == 1 else "spell"
        return [
            f"{counted(self._samples, 'sample')} {verb} control tokens ({names}{more}), which are learned as text, not "
            "as tokens: leave them out, and give conversations as messages, which the template writes with its tokens"
        ]


def mark_text(tokenizer: Tokenizer, prompt: str, text: str) -> Marked:
    """A text behind another one, bos before both and eos behind; the ids of the second and eos count."""
    marked = Marked()
    before, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    before = before[:1] if not prompt else before
    # A word may be split otherwise where the text goes on; a model that is asked will have the prompt's own ids.
    joined = whole[: len(before)] == before
    marked.add(before)
    marked.add(whole[len(before) :] if joined else _behind(tokenizer, before, text, tokenizer.decode(whole)), 1.0)
    if tokenizer.eos_id >= 0:
        marked.add([tokenizer.eos_id], 1.0)
    return marked


def _behind(tokenizer: Tokenizer, before: list[int], text: str, whole: str) -> list[int]:
    """Ids of a text that goes on in the middle of a word, or behind a space: those that decode to the whole.

    SentencePiece puts a space in front of a text. Behind a line break it has none.
    """
    alone, line = tokenizer.encode(text, bos=False), tokenizer.encode("\n", bos=False)
    found = [alone, tokenizer.encode("\n" + text, bos=False)[len(line) :]]
    return next((ids for ids in found if tokenizer.decode(before + ids) == whole), alone)


def mark_turns(
    template: Template, turns: Sequence[Turn], tools: Sequence[dict[str, Any]], eos: frozenset[int]
) -> Marked:
    """A conversation, of which answers count as their weights say.

    Args:
        tools: definitions of functions, as OpenAI's API has them.
        eos: ids that end a sequence.

    Raises:
        TemplateError: the template has no place for something in it, or writes earlier turns again.
    """
    if isinstance(template, MistralCommon):
        return _by_messages(template, turns, tools)
    return _by_beginnings(template, turns, tools, eos | template.ends)


def _by_messages(template: MistralCommon, turns: Sequence[Turn], tools: Sequence[dict[str, Any]]) -> Marked:
    from mistral_common.exceptions import MistralCommonException

    try:
        return _written(template, turns, tools)
    except TemplateError:
        raise
    except (MistralCommonException, ValueError) as error:  # the library's own checks
        raise TemplateError(f"template {template.name} cannot write it: {_brief(error)}") from None


def _written(template: MistralCommon, turns: Sequence[Turn], tools: Sequence[dict[str, Any]]) -> Marked:
    from mistral_common.protocol.instruct.messages import SystemMessage, UserMessage

    instruct, in_place, settings = template.parts
    template.check_thoughts([turn.message for turn in turns])
    system = None
    if not in_place:
        system = BETWEEN.join(turn.content for turn in turns if turn.role == "system" and turn.content) or None
        turns = [turn for turn in turns if turn.role != "system"]
    turns = _joined(turns)
    users = [i for i, turn in enumerate(turns) if turn.role == "user"]
    if not users:
        raise TemplateError("a conversation needs a message of the user")
    offered = tool_messages.offered(_tools(tools))
    marked = Marked()
    messages = _with_calls(template, [turn.message for turn in turns], bool(tools), users[-1], marked)
    marked.add(instruct.start())
    for i, (turn, message) in enumerate(zip(turns, messages, strict=True)):
        before = i < users[-1]
        if message.role == "user":
            where = (i == users[-1], i == users[0])
            said = UserMessage(content=message.content)
            marked.add(instruct.encode_user_message(said, offered, *where, system_prompt=system, **settings)[0])
        elif message.role == "system":
            marked.add(instruct.encode_system_message(SystemMessage(content=for_mistral_common(message) or ""))[0])
        elif message.role == TOOL:
            marked.add(instruct.encode_tool_message(tool_messages.result(message), before)[0])
        else:
            marked.add(instruct.encode_assistant_message(tool_messages.answer(message), before), turn.weight)
    return marked


def _with_calls(
    template: MistralCommon, messages: list[Message], tools: bool, last_user: int, marked: Marked
) -> list[Message]:
    """Messages as a chat has them: calls and results prepared for the template, each at the place of one of its role.

    Where the template writes ids of calls, which are 9 letters and digits, others (OpenAI's) are replaced, and counted.
    """
    if not (tools or any(message.tool_calls or message.role == TOOL for message in messages)):
        return messages
    if template.version in tool_messages.WITH_IDS:
        calls = [call for message in messages for call in message.tool_calls]
        new = {call.id: _nine(call.id) for call in calls if call.id != NO_ID and not ID.fullmatch(call.id)}
        marked.renamed = len(new)
        messages = [
            replace(
                message,
                tool_calls=tuple(replace(call, id=new.get(call.id, call.id)) for call in message.tool_calls),
                tool_call_id=new.get(message.tool_call_id or "", message.tool_call_id),
            )
            for message in messages
        ]
    return tool_messages.prepared(messages, template.version, last_user)


def _nine(id: str) -> str:
    """9 letters and digits that follow from an id."""
    return hashlib.sha256(id.encode()).hexdigest()[:9]


def _joined(turns: Sequence[Turn]) -> list[Turn]:
    """Neighbouring questions as one, as in `chat.messages.joined`."""
    found: list[Turn] = []
    for turn in turns:
        if found and turn.role == found[-1].role == "user":
            found[-1] = Turn("user", found[-1].content + BETWEEN + turn.content)
        else:
            found.append(turn)
    return found


def _tools(tools: Sequence[dict[str, Any]]) -> list[Tool]:
    try:
        return [Tool(tool) for tool in tools]
    except UsageError as error:
        raise TemplateError(f"tools: {error}") from None


def _by_beginnings(
    template: Template, turns: Sequence[Turn], tools: Sequence[dict[str, Any]], ends: frozenset[int]
) -> Marked:
    messages = [turn.message for turn in turns]
    offered = _tools(tools)
    marked = Marked()
    for i, turn in enumerate(turns):
        if turn.role != "assistant" or not turn.weight:  # one that is not learned may be written in any way
            continue
        if i and turns[i - 1].role == "assistant":  # what the template writes between them would be taken for learned
            raise TemplateError("two answers follow each other: make them one, or give what is asked between them")
        asked, answered = (template.encode_chat(messages[:n], offered) for n in (i, i + 1))
        at = len(asked)
        if answered[:at] != asked or asked[: len(marked.ids)] != marked.ids:
            several = sum(turn.role == "assistant" for turn in turns) > 1
            raise TemplateError(
                f"the template {template.name} writes earlier turns again, so that it is not known which ids are "
                "answers: --template takes another one, or "
                + ("give a line for each answer" if several else "give the line as prompt and completion")
            )
        stop = next((k + 1 for k in range(at, len(answered)) if answered[k] in ends), len(answered))
        marked.add(asked[len(marked.ids) :])
        marked.add(answered[at:stop], turn.weight)
        marked.add(answered[stop:])
    return marked


def _brief(error: Exception) -> str:
    return printable(" ".join(str(error).split()), 200)
