"""Conversations on disk: one JSON file, written whole or not at all, and read only by the model that it is of.

The cache is not in it: a conversation that is read is prefilled again, and goes on with the same random draws.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mistral.chat.conversation import Chat
from mistral.chat.messages import ROLES, Message, TemplateError, Thought, behind
from mistral.chat.templates import check_effort
from mistral.request import GenerationError
from mistral.sampling_params import SamplingError, SamplingParams
from mistral.util.arguments import require_kind
from mistral.util.english import counted
from mistral.util.errors import FormatError, short_repr
from mistral.util.files import read_limited, reason_of, write_atomic
from mistral.util.parsed import KeyTwice, parse_json

FORMAT, VERSION = "mistral conversation", 2
OLDEST = 1  # had a list of turns: question, answer (ids), text
EMPTY_SYSTEM = "system_is_empty"  # in a file: its system prompt is there, and has no text
# Fields of SamplingParams that are kept: all but the seed, which is the conversation's, n, which is 1, and functions.
PARAMS = tuple(f.name for f in fields(SamplingParams) if f.name not in ("seed", "n", "logits_processor"))


class SessionError(FormatError):
    """A file that cannot be written or read, or is no conversation of this model."""


def save(chat: Chat, path: str | os.PathLike[str], model: str) -> None:
    """Write a conversation. The file appears complete; one that was there is replaced only if it is a conversation.

    Args:
        model: the fingerprint of the model (`formats.fingerprint`).

    Raises:
        SessionError: the file cannot be written, or would replace something else; or a function changes the logits.
    """
    if chat.params.logits_processor is not None:
        raise SessionError("a conversation with a logits_processor cannot be saved: a file holds no functions")
    target = _place(path)
    if os.path.exists(target):
        try:
            _read(target)
        except SessionError:
            raise SessionError(f"{target} is there and is no conversation: give another name") from None
    told = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "template": chat.template.name,
        "system": chat.system,
        **_of_system(chat.system_message),
        **({} if chat.effort is None else {"reasoning_effort": chat.effort}),
        "seed": chat.seed,
        "answers": chat.answers,
        **{name: getattr(chat.params, name) for name in PARAMS},
        "messages": [_entry(message) for message in chat.messages],
    }
    try:
        with write_atomic(target) as beside:
            beside.write_text(json.dumps(told, ensure_ascii=False) + "\n", encoding="utf-8")
    except UnicodeEncodeError:
        what = "a text in it has half of a pair of surrogates, which is no character"
        raise SessionError(f"{target} cannot be written: {what}") from None
    except FormatError as error:
        raise SessionError(str(error)) from None


def load(chat: Chat, path: str | os.PathLike[str], model: str) -> None:
    """Put a saved conversation in the place of the present one, with its sampling, and its place in the random draws.

    What the file does not specify of its sampling has the default, as it had when the conversation was saved; only a
    `logits_processor` of the chat stays.

    Args:
        model: the fingerprint of the model, which must be that of the file.

    Raises:
        SessionError: no such file, or no conversation of this model; the present one is as before.
    """
    source = _place(path)
    told = _read(source)
    if told.get("model") != model:
        raise SessionError(f"{source} is a conversation with another model, or with another adapter of this one")
    if told.get("template") != chat.template.name:
        raise SessionError(
            f"{source} was written with template {short_repr(told.get('template'))}, and this is {chat.template.name}"
        )
    try:
        seed, answers = _of(told, "seed", int), _of(told, "answers", int)
        system = _system(told)
        effort = None if told.get("reasoning_effort") is None else _of(told, "reasoning_effort", str)
        messages = _messages(told, chat.model.args.vocab_size)
        params = _params(told, chat.params)
        check_effort(chat.template, effort)
        chat.check(params)
        chat.template.encode_chat(behind(system, [*messages, Message("user", "")]), effort=effort)
        chat.set_system("" if system is None else system)
    except (TypeError, SamplingError, GenerationError, TemplateError) as error:
        raise SessionError(f"{source} is a broken conversation: {error}") from None
    chat.seed, chat.answers, chat.messages = seed, answers, messages
    chat.params, chat.effort = params, effort


def _place(path: str | os.PathLike[str]) -> Path:
    require_kind("the file of a conversation", path, str | os.PathLike, "a path", SessionError)
    return Path(os.path.expanduser(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_limited(path)
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {reason_of(error)}") from None
    except ValueError as error:  # a name that no file can have
        raise SessionError(f"{path} cannot be read: {error}") from None
    try:
        told = parse_json(content.decode("utf-8"))
    except KeyTwice as error:
        raise SessionError(f"{path} {error}: mend it") from None
    except ValueError:  # not UTF-8, not JSON, a number of thousands of digits, nested without end
        raise SessionError(f"{path} is not a conversation: {_what(content)}") from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise SessionError(f"{path} is not a conversation: /save writes them")
    if type(told.get("version")) is not int or not OLDEST <= told["version"] <= VERSION:
        raise SessionError(
            f"{path} is of version {short_repr(told.get('version'))} of the format; this reads {OLDEST} to {VERSION}"
        )
    return told


def _what(content: bytes) -> str:
    """What a file holds that is not one value in JSON, to go behind a message."""
    lines = [line for line in content.splitlines() if line.strip()]
    try:
        values = [parse_json(line) for line in lines[:2]]
    except ValueError:
        return "it holds no JSON"
    if len(values) < 2:
        return "it holds no JSON"
    return f"it holds {counted(len(lines), 'line')} of JSON, as files of prompts and samples do; /save writes one value"


def _of(told: dict[str, Any], name: str, kind: type) -> Any:
    value = told.get(name)
    if type(value) is not kind or (isinstance(value, str) and not _valid(value)):
        raise TypeError(f"{name} is {short_repr(value)}")
    return value


def _valid(text: str) -> bool:
    """Whether it can be written; half of a pair of surrogates cannot."""
    return not re.search(r"[\ud800-\udfff]", text)


def _entry(message: Message) -> dict[str, Any]:
    ids = {} if message.ids is None else {"ids": message.ids}
    return {"role": message.role, "content": message.content, **_thinking(message), **ids}


def _thinking(message: Message) -> dict[str, Any]:
    """The thoughts of a message, if it has any."""
    return {"thinking": [asdict(thought) for thought in message.thinking]} if message.thinking else {}


def _of_system(message: Message | None) -> dict[str, Any]:
    """What the text of a system prompt does not tell: its thoughts, and whether there is one that is empty."""
    if message is None:
        return {}
    return _thinking(message) if message.content or message.thinking else {EMPTY_SYSTEM: True}


def _system(told: dict[str, Any]) -> Message | None:
    system = Message("system", _of(told, "system", str), thinking=_thoughts(told))
    there = system.content or system.thinking or (EMPTY_SYSTEM in told and _of(told, EMPTY_SYSTEM, bool))
    return system if there else None


def _thoughts(entry: dict[str, Any]) -> tuple[Thought, ...]:
    """Thoughts of a message, whose content holds the places that they give."""
    found = []
    for one in _of(entry, "thinking", list) if "thinking" in entry else ():
        if not isinstance(one, dict) or one.keys() != {"text", "at", "closed"}:
            raise TypeError(f"a thought is {short_repr(one)}")
        found.append(Thought(_of(one, "text", str), _of(one, "at", int), _of(one, "closed", bool)))
    places = [0, *(thought.at for thought in found), len(entry["content" if "role" in entry else "system"])]
    if places != sorted(places):
        raise TypeError(f"thoughts are at {short_repr(places[1:-1])} of {places[-1]} characters")
    return tuple(found)


def _messages(told: dict[str, Any], vocab_size: int) -> list[Message]:
    if told["version"] == 1:
        return [m for entry in _of(told, "turns", list) for m in _turn(entry, vocab_size)]
    return [_message(entry, vocab_size) for entry in _of(told, "messages", list)]


def _message(entry: Any, vocab_size: int) -> Message:
    if not isinstance(entry, dict) or entry.get("role") not in ROLES:
        raise TypeError(f"a message is {short_repr(entry)}")
    ids = None if entry.get("ids") is None else _ids(entry, "ids", vocab_size)
    return Message(entry["role"], _of(entry, "content", str), ids, thinking=_thoughts(entry))


def _turn(entry: Any, vocab_size: int) -> tuple[Message, Message]:
    """Question and answer, as version 1 has them."""
    if not isinstance(entry, dict):
        raise TypeError(f"a turn is {short_repr(entry)}")
    answer = _ids(entry, "answer", vocab_size)
    return Message("user", _of(entry, "question", str)), Message("assistant", _of(entry, "text", str), answer)


def _ids(entry: dict[str, Any], name: str, vocab_size: int) -> list[int]:
    ids = _of(entry, name, list)
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise TypeError(f"an answer has ids outside the vocabulary of {vocab_size}")
    return list(ids)


def _params(told: dict[str, Any], present: SamplingParams) -> SamplingParams:
    found = {name: told[name] for name in PARAMS if name in told}
    for name in ("stop", "logit_bias"):
        if name in found:
            _of(told, name, list)
    if not all(isinstance(text, str) and _valid(text) for text in found.get("stop", ())):
        raise TypeError("stop holds something else than texts")
    return SamplingParams(**found, seed=told["seed"], logits_processor=present.logits_processor)
