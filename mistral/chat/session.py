"""Conversations on disk: one JSON file, written whole or not at all, and read only by the model that it is of.

The cache is not in it: a conversation that is read is prefilled anew, and goes on with the same random draws.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mistral.chat.conversation import Chat
from mistral.chat.templates import TemplateError, Turn
from mistral.sampling import Sampler
from mistral.sampling_params import SamplingError
from mistral.util.errors import FormatError, short_repr
from mistral.util.files import read_limited, write_atomic

FORMAT, VERSION = "mistral conversation", 1
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
        "turns": [{"question": t.question, "answer": t.answer, "text": t.text} for t in chat.turns],
    }
    try:
        with write_atomic(target) as beside:
            beside.write_text(json.dumps(told, ensure_ascii=False) + "\n", encoding="utf-8")
    except UnicodeEncodeError as error:
        raise SessionError(f"{target} cannot be written: {error}") from None
    except FormatError as error:
        raise SessionError(str(error)) from None


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
        turns = [_turn(entry, chat.model.args.vocab_size) for entry in _of(told, "turns", list)]
        options = _options(told)
        chat.template.conversation(system, [*turns, Turn("")])
    except (TypeError, SamplingError, TemplateError) as error:
        raise SessionError(f"{source} is a broken conversation: {error}") from None
    chat.system, chat.seed, chat.answers, chat.turns = system, seed, answers, turns
    chat.options = {**chat.options, **options}


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(read_limited(path).decode("utf-8"))
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):  # not UTF-8, not JSON, a number of thousands of digits, nested without end
        raise SessionError(f"{path} is not a conversation: it holds no JSON") from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise SessionError(f"{path} is not a conversation: /save writes them")
    if told.get("version") != VERSION or type(told["version"]) is not int:
        raise SessionError(
            f"{path} is of version {short_repr(told.get('version'))} of the format; this reads {VERSION}"
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


def _turn(entry: Any, vocab_size: int) -> Turn:
    if not isinstance(entry, dict):
        raise TypeError(f"a turn is {short_repr(entry)}")
    answer = _of(entry, "answer", list)
    if not all(type(i) is int and 0 <= i < vocab_size for i in answer):
        raise TypeError(f"an answer has ids outside the vocabulary of {vocab_size}")
    return Turn(_of(entry, "question", str), answer, _of(entry, "text", str))


def _options(told: dict[str, Any]) -> dict[str, Any]:
    sampling = {name: told[name] for name in SAMPLING if name in told}
    Sampler(**sampling)  # refuses what is out of range
    if "max_tokens" in told and _of(told, "max_tokens", int) < 0:
        raise TypeError(f"max_tokens is {told['max_tokens']}")
    if "stop" in told and not all(isinstance(s, str) and s and _valid(s) for s in _of(told, "stop", list)):
        raise TypeError("stop holds something else than texts")
    return {name: told[name] for name in OPTIONS if name in told}
