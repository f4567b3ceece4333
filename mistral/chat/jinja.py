"""Chat templates in Jinja, as folders bring them: rendered in a sandbox, and encoded as transformers does it.

A control token that somebody typed stays text: it is set apart before the template sees it, so the control tokens in
what is rendered are the template's own. Knows nothing about files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from mistral.chat.messages import TOOL, Message, TemplateError, Thought, ToolCall, checked, joined, with_something
from mistral.chat.thinking import FIELDS, ids_of
from mistral.chat.tools import ARGS, CALLS, OPEN, Form, Tool
from mistral.formats.jinja import NotJinja, compile_template
from mistral.thinking import ThoughtIds
from mistral.tokenizer import Tokenizer
from mistral.util.errors import Unavailable, printable
from mistral.util.parsed import parse_json

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")  # what servers take; a template may know fewer
Fim = Callable[[str, str], list[int]]


class JinjaTemplate:
    """A chat template in Jinja.

    Args:
        tokenizer: gives ids, and the texts of bos and eos, which templates ask for.
        text: the template.
        name: what it is called.
        source: where it is from, as people are shown it.
        fim: encodes for fill-in-the-middle, which templates in Jinja do not describe.
        with_tools: makes the template that conversations with tools are written in, where that is another one.

    Raises:
        TemplateError: it is no Jinja, or jinja2 is missing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        text: str,
        *,
        name: str,
        source: str,
        fim: Fim,
        with_tools: Callable[[], JinjaTemplate] | None = None,
    ) -> None:
        self.name, self.source = name, source
        self._tokenizer = tokenizer
        self._compiled = _compile(text, source)
        self._text = text
        self._fim, self._make_with_tools = fim, with_tools

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), effort: str | None = None
    ) -> list[int]:
        """Ids of a conversation; see `templates.Template`. Answers are rendered from their texts.

        Thoughts are given to the template in the first form that it mentions (parts of the content, a field). Whether
        it writes them is its own affair: many leave out those of earlier answers.

        The template is given the messages as they are, as transformers does it. Only where it refuses them a system
        prompt without text is left out, and neighbours of one role are joined.
        """
        if effort is not None and effort not in self.efforts:
            has = f"is one of {', '.join(EFFORTS)}" if self.efforts else "has no place in the template: leave it out"
            raise TemplateError(f"reasoning_effort {has}")
        if tools and self._with_tools is not None:
            return self._with_tools.encode_chat(messages, tools, effort)
        found = checked(messages)
        if self._own_form is None and (tools or any(m.tool_calls or m.role == TOOL for m in found)):
            alone = "calls and results without tools: give tools"
            what = "tools: leave them out" if self._make_with_tools is None else alone
            raise TemplateError(f"the template of {self.source} has no place for {what}")
        try:
            return self._encode(found, tools, effort)
        except TemplateError:
            if len(simpler := joined(with_something(found))) == len(found) or not simpler:
                raise
            return self._encode(simpler, tools, effort)

    def _encode(self, found: Sequence[Message], tools: Sequence[Tool], effort: str | None) -> list[int]:
        told = [self._told(message) for message in found]
        definitions = [dict(tool.definition) for tool in tools]
        apart = self._unused(json.dumps([told, definitions], ensure_ascii=False))
        for message, one in zip(found, told, strict=True):
            self._mark(one, message, apart)
        rendered = self._render(told, self._split(definitions, apart) or None, effort)
        parts: list[str | int] = []
        done = 0
        for match in self._pattern.finditer(rendered):
            parts += [rendered[done : match.start()].replace(apart, ""), self._control[match[0]]]
            done = match.end()
        parts.append(rendered[done:].replace(apart, ""))
        return self._tokenizer.encode_parts([p for p in parts if p != ""], self._control)

    def _told(self, message: Message) -> dict[str, Any]:
        """A message as templates are given it."""
        told: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            told["tool_calls"] = [_call(call) for call in message.tool_calls]
        if message.thinking:
            if re.search(r"""["']thinking["']""", self._text):  # the content in parts, as in Mistral's templates
                told["content"] = [_part(chunk) for chunk in message.chunks]
            else:
                thought = "\n".join(thought.text for thought in message.thinking)
                told |= {name: thought for name in FIELDS if re.search(rf"\b{name}\b", self._text)}
        given = {"tool_call_id": message.tool_call_id, "name": message.name}
        return told | {name: value for name, value in given.items() if value is not None}

    def _mark(self, told: dict[str, Any], message: Message, apart: str) -> None:
        """Set apart what looks like control tokens in a message that the template will see."""
        content = told["content"]
        told.update(self._split(told, apart), role=told["role"])
        if isinstance(content, str):
            told["content"] = self._set_apart(message.content, apart)
        else:
            texts = {"text", "thinking"}
            told["content"] = [
                {k: self._set_apart(v, apart) if k in texts and k == part["type"] else v for k, v in part.items()}
                for part in content
            ]
        told |= {name: self._set_apart(told[name], apart) for name in (*FIELDS, "name") if name in told}

    def encode_fim(self, prefix: str, suffix: str) -> list[int]:
        return self._fim(prefix, suffix)

    @cached_property
    def ends(self) -> frozenset[int]:
        """The control token that the template writes after an answer, if it writes one."""
        answer = self._unused() * 2
        try:
            after = self._render(_probe(answer)).partition(answer)[2].lstrip()
        except TemplateError:
            return frozenset()
        match = self._pattern.match(after)
        return frozenset({self._control[match[0]]}) if match else frozenset()

    def _unused(self, *texts: str) -> str:
        """A private character that neither the template nor the texts have."""
        return next(c for c in map(chr, range(0xE000, 0x110000)) if not any(c in text for text in (self._text, *texts)))

    @cached_property
    def _with_tools(self) -> JinjaTemplate | None:
        return None if self._make_with_tools is None else self._make_with_tools()

    @property
    def tool_form(self) -> Form | None:
        """How calls are written, by what the template mentions that conversations with tools are written in."""
        return self._own_form if self._with_tools is None else self._with_tools.tool_form

    @cached_property
    def _own_form(self) -> Form | None:
        if not re.search(r"\btools\b", self._text):
            return None
        if CALLS in self._text:
            return "args" if ARGS in self._text else "list"
        return "tags" if OPEN in self._text else None

    @cached_property
    def thought_ids(self) -> ThoughtIds | None:
        """By what the template mentions."""
        return ids_of(self._tokenizer.added_tokens, self._text)

    @cached_property
    def efforts(self) -> tuple[str, ...]:
        """Those that servers know, where the template mentions the name."""
        return EFFORTS if re.search(r"\breasoning_effort\b", self._text) else ()

    def _render(self, told: list[dict[str, Any]], tools: Any = None, effort: str | None = None) -> str:
        try:
            return str(
                self._compiled.render(
                    **self._tokenizer.named_in_templates,
                    **({} if effort is None else {"reasoning_effort": effort}),
                    messages=told,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=told[-1]["role"] != "assistant",
                )
            )
        except Exception as error:  # a template may do anything that its language can
            reason = printable(" ".join(str(error).split()) or type(error).__name__, 300)
            raise TemplateError(
                f"the template of {self.source} refuses the conversation: {reason} (--template takes another one)"
            ) from None

    @cached_property
    def _control(self) -> Mapping[str, int]:
        """The tokens that only the template may write: control tokens, and what else was added and it mentions."""
        try:
            written = self._text + self._render(_probe("a"))
        except TemplateError:
            written = self._text
        special = self._tokenizer.control_tokens
        return {t: i for t, i in self._tokenizer.added_tokens.items() if t in special or t in written}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self._control, key=len, reverse=True))) or "(?!)")

    @cached_property
    def _halves(self) -> tuple[frozenset[str], frozenset[str], int]:
        """Beginnings and ends of control tokens, and the length of the longest."""
        begin = frozenset(t[:k] for t in self._control for k in range(1, len(t)))
        end = frozenset(t[k:] for t in self._control for k in range(1, len(t)))
        return begin, end, max(map(len, self._control), default=0)

    def _split(self, value: Any, apart: str) -> Any:
        """JSON in which no text is a control token."""
        if isinstance(value, str):
            return self._pattern.sub(lambda match: match[0][:1] + apart + match[0][1:], value)
        if isinstance(value, list):
            return [self._split(one, apart) for one in value]
        if isinstance(value, dict):
            return {self._split(key, apart): self._split(one, apart) for key, one in value.items()}
        return value

    def _set_apart(self, text: str, apart: str) -> str:
        """A text in which no control token is whole, nor becomes whole beside what the template writes."""
        text = self._split(text, apart)
        begin, end, longest = self._halves
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())  # templates trim
        core = text[first:last]
        inside = core != "" and any(core in token for token in self._control)
        if inside or any(core[-k:] in begin for k in range(1, min(longest, len(core) + 1))):
            text = text[:last] + apart + text[last:]
        if inside or any(core[:k] in end for k in range(1, min(longest, len(core) + 1))):
            text = text[:first] + apart + text[first:]
        return text


def _probe(answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]


def _part(chunk: str | Thought) -> dict[str, Any]:
    if isinstance(chunk, str):
        return {"type": "text", "text": chunk}
    return {"type": "thinking", "thinking": chunk.text, "closed": chunk.closed}


def _call(call: ToolCall) -> dict[str, Any]:
    """A call; its arguments as an object, as templates expect them."""
    try:
        arguments = parse_json(call.arguments or "{}")
    except ValueError:
        arguments = call.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _compile(text: str, source: str) -> Any:
    try:
        return compile_template(text, source)
    except (NotJinja, Unavailable) as error:
        raise TemplateError(str(error)) from None
