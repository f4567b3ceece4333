"""Samples from a file of JSON lines, every line checked before a weight is read.

A line is a text, {"text": ..}, a conversation, {"messages": [..], "tools": [..]}, as mistral-finetune and OpenAI's
fine-tuning have them, or a text and how it goes on, {"prompt": .., "completion": ..}, of which the latter is learned.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from mistral.chat.messages import BETWEEN, Message, Thought, from_chunks, valid
from mistral.chat.thinking import FIELDS, of_field, of_part
from mistral.train.conversations import NO_ID, Marked, Turn
from mistral.util.english import counted, did_you_mean
from mistral.util.errors import FormatError, MistralError, printable, short_repr
from mistral.util.files import LFS, POINTER, Lines, not_text, reason_of
from mistral.util.parsed import KeyTwice, parse_json

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
OF_A_LINE = {"text", "messages", "interactions", "tools", "prompt", "completion"}
OF_A_MESSAGE = {"role", "content", "weight", "tool_calls", "tool_call_id", "name", *FIELDS}
REFUSED = {
    "functions": "give tools",
    "function_call": "give tool_calls",
}
SHOWN = 5  # different mistakes that an error names, and lines that have the same one


class DataError(FormatError):
    """Samples that cannot be used; the message names the file and the line."""


class NotJson(DataError):
    """A line that is no JSON."""


class NoTemplate(FormatError):
    """Conversations cannot be written at all, whatever the line."""


@dataclass(frozen=True)
class Sample:
    """One sequence to learn from.

    Args:
        line: of the file, counted from 1.
        ids: [n] its tokens.
        weights: [n] how much the prediction of each counts; the first is 0.
    """

    line: int
    ids: array[int]
    weights: array[float]


@dataclass
class Samples:
    """The samples of a file.

    Args:
        path, sha256: the file, and what was in it.
        samples: in the file's order.
        notes: what was cut or ignored, a sentence each.
    """

    path: Path
    sha256: str
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


MarkText = Callable[[str, str], Marked]
MarkTurns = Callable[[Sequence[Turn], Sequence[dict[str, Any]]], Marked]


def read_samples(path: Path, mark_text: MarkText, mark_turns: MarkTurns, seq_len: int) -> Samples:
    """Read and check every line of a file, and encode it.

    Args:
        mark_text, mark_turns: give the ids of a text and how it goes on, and of a conversation.
        seq_len: most tokens of a sample: conversations are cut there, texts are cut into several samples.

    Raises:
        DataError: the file cannot be read, a line is wrong (the first few are named), or nothing is left to learn.
        NoTemplate: of `mark_turns`, for the first conversation.
    """
    found = Samples(path, "")
    digest, ignored, cut = hashlib.sha256(), Counter[str](), Counter[str]()
    wrong: dict[str, list[int]] = {}  # lines by what is wrong with them
    strange = 0  # lines that are no JSON
    for number, line in _lines(path):
        digest.update(line)
        if not line.strip():
            continue
        try:
            marked, splits = _marked(line, mark_text, mark_turns, ignored)
            cut["calls"] += marked.renamed
            found.samples += _pieces(number, marked, seq_len, splits, cut)
        except NoTemplate:
            raise
        except MistralError as error:
            strange += isinstance(error, NotJson)
            wrong.setdefault(str(error), []).append(number)
    if 2 * strange > sum(map(len, wrong.values())) and not found.samples:  # some bytes of a picture may be a number
        why, (first, *_) = next(iter(wrong.items()))
        raise DataError(f"{path} is no file of samples, a JSON object a line: line {first}: {why}")
    if wrong:
        raise DataError(_mistakes(path, wrong))
    found.sha256 = digest.hexdigest()
    found.notes = _notes(path, ignored, cut, seq_len)
    if not found.samples:
        why = "; ".join(note.removeprefix(f"{path}: ") for note in found.notes) or "it has no lines"
        raise DataError(f"{path} has nothing to learn from: {why}")
    return found


def _mistakes(path: Path, wrong: Mapping[str, Sequence[int]]) -> str:
    """The first few mistakes, each once, with the first few lines that have it."""
    told = []
    for message, (first, *others) in list(wrong.items())[:SHOWN]:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        also = f" (also line{'s' * (len(others) > 1)} {', '.join(map(str, others[:SHOWN]))}{more})" if others else ""
        told.append(f"{path}:{first}: {message}{also}")
    left = sum(len(numbers) for numbers in list(wrong.values())[SHOWN:])
    return "; ".join(told) + (f" (and {left} more wrong lines)" if left else "")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(Lines(file, str(path)), 1):
                if number == 1 and line.startswith(POINTER):
                    raise DataError(f"{path} cannot be read: {LFS}")
                yield number, line
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason_of(error)}") from None


def _marked(line: bytes, mark_text: MarkText, mark_turns: MarkTurns, ignored: Counter[str]) -> tuple[Marked, bool]:
    """The ids of a line, and whether it may be split."""
    try:
        entry = parse_json(line.decode("utf-8"))  # of bytes, json guesses the encoding
    except UnicodeDecodeError as error:
        raise NotJson(f"it is {not_text(error)}") from None
    except KeyTwice as error:
        raise DataError(f"it {error}") from None
    except ValueError as error:
        raise NotJson(f"it is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise DataError(f"it must be an object, not {short_repr(entry)}")
    _keys(entry, OF_A_LINE, "the line", ignored)
    messages = entry.get("messages", entry.get("interactions"))
    kinds = [
        kind for kind in ("messages", "text", "completion") if (messages if kind == "messages" else entry.get(kind))
    ]
    if len(kinds) != 1:
        raise DataError(_no_kind(entry, kinds))
    if kinds == ["text"]:
        return mark_text("", _text(entry, "text")), True
    if kinds == ["completion"]:
        return mark_text(_text(entry, "prompt"), _text(entry, "completion")), False
    tools = entry.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"tools must be a list of objects, not {short_repr(tools)}")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"messages must be a list that is not empty, not {short_repr(messages)}")
    turns = [_turn(message, f"messages[{i}]", ignored) for i, message in enumerate(messages)]
    return mark_turns(_weighed(turns, messages, bool(tools)), tools), False


def _no_kind(entry: dict[str, Any], kinds: Sequence[str]) -> str:
    """What is wrong with a line that is none of the kinds of samples, or several."""
    if kinds:
        return f"it has {' and '.join(map(short_repr, kinds))}: give each a line of its own"
    if empty := [key for key in ("messages", "interactions", "text", "completion") if key in entry]:
        return f"its {empty[0]} is empty, so there is nothing to learn"
    if "conversations" in entry:
        return (
            'it has "conversations", the form of ShareGPT, which is not read: write it as '
            '{"messages": [{"role": "user", "content": ..}, {"role": "assistant", "content": ..}]}'
        )
    if {"instruction", "output"} <= set(entry):
        return (
            'it has "instruction" and "output", the form of Alpaca, which is not read: write it as '
            '{"messages": [..]} or {"prompt": .., "completion": ..}'
        )
    return f'it has none of "messages", "text", and "prompt" with "completion"{_unknown(entry)}'


def _unknown(entry: dict[str, Any]) -> str:
    """The keys of a line that mean nothing here, to go behind what it lacks: one of them may be misspelt."""
    keys = [short_repr(key) for key in entry if key not in OF_A_LINE]
    if not keys:
        return ""
    near = next((hint for key in entry if key not in OF_A_LINE and (hint := did_you_mean(key, OF_A_LINE))), "")
    return f"; not known: {', '.join(keys[:SHOWN])}{', ..' if len(keys) > SHOWN else ''}{near}"


def _text(entry: dict[str, Any], key: str) -> str:
    if key not in entry:
        raise DataError(f"it has no {key}{_unknown(entry)}")
    if not isinstance(entry.get(key), str):
        raise DataError(f"{key} must be a text, not {short_repr(entry.get(key))}")
    return valid(entry[key])


def _keys(entry: dict[str, Any], known: set[str], where: str, ignored: Counter[str]) -> None:
    for key, advice in REFUSED.items():
        if key in entry:
            raise DataError(f"{where} has {key}, which is not supported: {advice}")
    ignored.update(key for key in entry if key not in known)


def _turn(message: Any, where: str, ignored: Counter[str]) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f"{where} must be an object, not {short_repr(message)}")
    _keys(message, OF_A_MESSAGE, where, ignored)
    given = message.get("role")
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise DataError(f"{where} has the role {short_repr(given)}, which is not one of {', '.join(ROLES)}")
    weight = message.get("weight")
    if weight is not None and role != "assistant":
        raise DataError(f"{where} has a weight, but is no answer: only messages of the assistant are learned")
    bad = isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf
    if weight is not None and bad:
        raise DataError(f"{where} has the weight {short_repr(weight)}; it must be a number, at least 0")
    calls = tuple(_call(call, where) for call in message.get("tool_calls") or ())
    if calls and role != "assistant":
        raise DataError(f"{where} has tool_calls, but is no answer")
    said = _content(message, role, where)
    content = said.content
    if not content and not said.thinking and not calls and role == "assistant":
        raise DataError(f"{where} is an answer without content")
    ids = [message.get(key) for key in ("tool_call_id", "name")]
    if any(not isinstance(value, str | None) for value in ids) or (role == "tool" and ids[0] is None):
        raise DataError(f"{where} needs tool_call_id and name as texts")
    return Turn(role, content, 1.0 if weight is None else float(weight), calls, ids[0], ids[1], said.thinking)


def _content(message: dict[str, Any], role: str, where: str) -> Message:
    """The text of a message, which may be given in parts, and the thoughts in it or beside it."""
    content = "" if message.get("content") is None else message["content"]
    thought = of_field(message)
    chunks: list[str | Thought] = []
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        chunk = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        chunk = of_part(part) if chunk is None and isinstance(part, dict) else chunk
        if not isinstance(chunk, str | Thought):
            if not isinstance(content, list):
                raise DataError(f"{where} has the content {short_repr(content)}; it must be a text")
            raise DataError(f"{where} has content that is no text: images and sound cannot be learned here")
        if chunks and isinstance(chunks[-1], str) and isinstance(chunk, str):
            chunks.append(BETWEEN)
        chunks.append(chunk)
    if thought is not None and any(isinstance(chunk, Thought) for chunk in chunks):
        raise DataError(f"{where} has thoughts in its content and beside it: give one of them")
    said = from_chunks(role, ([] if thought is None else [Thought(thought)]) + chunks)
    if said.thinking and role not in ("assistant", "system"):
        raise DataError(f"{where} has a thought, but is no answer and no system prompt")
    for text in (said.content, *(one.text for one in said.thinking)):
        valid(text)
    return said


def _call(call: Any, where: str) -> tuple[str, str, str]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where} has a tool call without a function's name: {short_repr(call)}")
    arguments = function.get("arguments", "{}")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    id = call.get("id")
    return id if isinstance(id, str) else NO_ID, valid(function["name"]), valid(text)


def _weighed(turns: list[Turn], messages: list[Any], tools: bool) -> list[Turn]:
    """The turns in an order that can be learned. With tools, which templates show with the last question, only answers
    behind that count unless weights say otherwise."""
    for i, (before, turn) in enumerate(pairwise(turns), 1):
        if before.role == turn.role == "assistant":
            raise DataError(f"messages[{i}] is an answer behind an answer: join the two")
        if turn.role == "tool" and not (before.tool_calls or before.role == "tool"):
            raise DataError(f"messages[{i}] is a tool's result, but nothing was called before it")
    if turns[-1].role != "assistant":
        raise DataError("the last message is not the assistant's, so there is no answer to learn")
    if not tools or any("weight" in message for message in messages):
        return turns
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=0)
    return [replace(t, weight=0.0 if i < last else t.weight) for i, t in enumerate(turns)]


def _pieces(line: int, marked: Marked, seq_len: int, splits: bool, cut: Counter[str]) -> Iterator[Sample]:
    """A line as samples of at most seq_len predictions."""
    most = seq_len + 1  # the last id is predicted, and not read
    ids, weights = marked.ids, marked.weights
    if len(ids) > most:
        cut["split" if splits else "cut"] += 1
        cut["tokens"] += 0 if splits else len(ids) - most
    # Each piece of a text begins with the last id of the one before, so that every id is predicted once.
    for first in range(0, len(ids) - 1, seq_len) if splits else (0,):
        part = slice(first, first + most)
        weighed = [0.0, *weights[part][1:]]
        if any(weighed):
            yield Sample(line, array("i", ids[part]), array("f", weighed))
        else:
            cut["empty"] += 1


def _notes(path: Path, ignored: Counter[str], cut: Counter[str], seq_len: int) -> list[str]:
    notes = []
    if ignored:
        keys = ", ".join(f"{printable(key)} ({counted(n, 'time')})" for key, n in ignored.most_common(8))
        notes.append(f"{path}: ignored keys: {keys}")
    if cut["cut"]:
        notes.append(
            f"{path}: {counted(cut['cut'], 'conversation')} of more than {seq_len} tokens lost "
            f"{counted(cut['tokens'], 'token')} at the end: --seq_len keeps more"
        )
    if cut["split"]:
        was = "was" if cut["split"] == 1 else "were"
        notes.append(f"{path}: {counted(cut['split'], 'text')} of more than {seq_len} tokens {was} split")
    if cut["calls"]:
        notes.append(
            f"{path}: {counted(cut['calls'], 'id')} of tool calls had to become 9 letters and digits, which the "
            "template writes"
        )
    if cut["empty"]:
        are = "is" if cut["empty"] == 1 else "are"
        notes.append(f"{path}: {counted(cut['empty'], 'sample')} without an answer that counts {are} not used")
    return notes
