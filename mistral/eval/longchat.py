"""LongChat's own question files: JSON lines, each with a prompt and what answers it. Nothing of them is shipped here.

Lines have {test_id, prompt, expected_number, ...}, topics {test_id, prompt, topics}; the first topic is asked for. They
are in https://github.com/DachengLi1/LongChat, longeval/evaluation (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral.util.errors import FormatError, UsageError
from mistral.util.files import decode_text, read_limited, reason_of
from mistral.util.parsed import not_json, parse_json


@dataclass(frozen=True)
class Question:
    """One line of a file: which file, its place in it, the prompt and the answer."""

    file: str
    index: int
    prompt: str
    answer: str


def read_questions(path: str, task: str) -> list[Question]:
    """The questions of a file, for a task: "lines" or "topics".

    Raises:
        UsageError: the task has no such files, or the file is for the other one.
        FormatError: it cannot be read, or a line is not a question.
    """
    if task not in ("lines", "topics"):
        raise UsageError(f"--questions are for lines and topics, not for {task}")
    try:
        text = decode_text(read_limited(Path(path)), path)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {reason_of(error)}") from None
    found = list(_questions(path, text, task))
    if not found:
        raise FormatError(f"{path} has no questions")
    return found


def _questions(path: str, text: str, task: str) -> Iterator[Question]:
    name = Path(path).stem
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise FormatError(f"{path} line {number} {not_json(error)}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise FormatError(f"{path} line {number} has no prompt")
        yield Question(name, number - 1, entry["prompt"], _answer(entry, task, f"{path} line {number}"))


def _answer(entry: dict[str, Any], task: str, where: str) -> str:
    if task == "lines":
        number = entry.get("expected_number")
        if type(number) is int or (isinstance(number, str) and number.strip().isdecimal()):
            return str(int(number))
        raise FormatError(f"{where} has no expected_number: a file for lines has one in each line")
    topics = entry.get("topics")
    if isinstance(topics, list) and topics and isinstance(topics[0], str) and topics[0].strip():
        return topics[0]
    raise FormatError(f"{where} has no topics: a file for topics has a list of them in each line")
