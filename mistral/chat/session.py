"""Conversations on disk: one JSON file, written whole or not at all, and read only by the model that it is of.

The cache is not in it: a conversation that is read is prefilled anew, and goes on with the same random draws.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from mistral.chat.conversation import Chat
from mistral.chat.messages import ROLES, Message, TemplateError
from mistral.sampling import Sampler
from mistral.sampling_params import SamplingError
from mistral.util.errors import FormatError, short_repr
from mistral.util.files import read_limited

FORMAT, VERSION = "mistral conversation", 2
OLDEST = 1  # had a list of turns: question, answer (ids), text
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
OPTIONS = (*SAMPLING, "max_tokens", "stop")


class SessionError(FormatError):
    """A file that cannot be written or read, or is no conversation of this model."""


def save(chat: Chat, path: str | os.PathLike[str], model: str) -> None:
    """Write a conversation. The file appears complete; one that was there is replaced only if it is a conversation.

    Args:
        model: the fingerprint of the model (`formats.fingerprint`).

    Raises:
        SessionError: the file cannot be written, or would replace something else.
    """
    target = Path(os.path.expanduser(path))
    if os.path.exists(target):
        try:
            _read(target)
        except SessionError:
            raise SessionError(f"{target} is there and is no conversation: give another name") from None
    stop = chat.options.get("stop")
    options = {**chat.options, "stop": [stop] if isinstance(stop, str) else list(stop or ())}
    told = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "template": chat.template.name,
        "system": chat.system,
        "seed": chat.seed,
        "answers": chat.answers,
        **{name: options[name] for name in OPTIONS if name in options},
        "messages": [_entry(message) for message in chat.messages],
    }
    try:
        _write(json.dumps(told, ensure_ascii=False) + "\n", Path(os.path.realpath(target)))  # a link stays one
    except (OSError, ValueError) as error:  # no Unicode, or a name with a null in it
        raise SessionError(f"{target} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def load(chat: Chat, path: str | os.PathLike[str], model: str) -> None:
    """Put a saved conversation in the place of the present one, with its sampling, and its place in the random draws.

    Args:
        model: the fingerprint of the model, which must be that of the file.

    Raises:
        SessionError: no such file, or no conversation of this model; the present one is as before.
    """
    source = Path(os.path.expanduser(path))
    told = _read(source)
    if told.get("model") != model:
        raise SessionError(f"{source} is a conversation with another model")
    if told.get("template") != chat.template.name:
        raise SessionError(
            f"{source} was written with template {short_repr(told.get('template'))}, and this is {chat.template.name}"
        )
    try:
        system, seed, answers = _of(told, "system", str), _of(told, "seed", int), _of(told, "answers", int)
        messages = _messages(told, chat.model.args.vocab_size)
        options = _options(told)
        chat.template.encode_chat([Message("system", system), *messages, Message("user", "")])
    except (TypeError, SamplingError, TemplateError) as error:
        raise SessionError(f"{source} is a broken conversation: {error}") from None
    chat.system, chat.seed, chat.answers, chat.messages = system, seed, answers, messages
    chat.options = {**chat.options, **options}


def _write(text: str, target: Path) -> None:
    beside = target.with_name(f".{target.name[:50]}.{secrets.token_hex(4)}.part")
    try:
        with beside.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            beside.unlink()
        raise


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(read_limited(path).decode("utf-8"))
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):  # not UTF-8, not JSON, a number of thousands of digits, nested without end
        raise SessionError(f"{path} is not a conversation: it holds no JSON") from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise SessionError(f"{path} is not a conversation: /save writes them")
    if type(told.get("version")) is not int or not OLDEST <= told["version"] <= VERSION:
        raise SessionError(
            f"{path} is of version {short_repr(told.get('version'))} of the format; this reads {OLDEST} to {VERSION}"
        )
    return told


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
    return {"role": message.role, "content": message.content, **ids}


def _messages(told: dict[str, Any], vocab_size: int) -> list[Message]:
    if told["version"] == 1:
        return [m for entry in _of(told, "turns", list) for m in _turn(entry, vocab_size)]
    return [_message(entry, vocab_size) for entry in _of(told, "messages", list)]


def _message(entry: Any, vocab_size: int) -> Message:
    if not isinstance(entry, dict) or entry.get("role") not in ROLES:
        raise TypeError(f"a message is {short_repr(entry)}")
    ids = None if entry.get("ids") is None else _ids(entry, "ids", vocab_size)
    return Message(entry["role"], _of(entry, "content", str), ids)


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


def _options(told: dict[str, Any]) -> dict[str, Any]:
    sampling = {name: told[name] for name in SAMPLING if name in told}
    Sampler(**sampling)  # refuses what is out of range
    if "max_tokens" in told and _of(told, "max_tokens", int) < 0:
        raise TypeError(f"max_tokens is {told['max_tokens']}")
    if "stop" in told and not all(isinstance(s, str) and s and _valid(s) for s in _of(told, "stop", list)):
        raise TypeError("stop holds something else than texts")
    return {name: told[name] for name in OPTIONS if name in told}
