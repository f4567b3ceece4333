"""The input files of a batch job: which they are, their lines one at a time, and lines that share a custom_id.

Runs without torch.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral.batch.lines import EXAMPLE, LONGEST, NOT_JSON, Answered, Line, LineError, id_of, read_line
from mistral.formats.layouts import LAYOUTS
from mistral.util.errors import UsageError
from mistral.util.files import Lines, reason_of


def find_inputs(patterns: Sequence[str], output: str) -> list[Path]:
    """The files that names and patterns mean, each once, in this order; those of a pattern sorted.

    A pattern may match the output, which is there from the second run on: it is no input.

    Raises:
        UsageError: there is none for a name, it is no file that can be read twice, or it is the output.
    """
    if output == "-":
        raise UsageError("OUTPUT is a file, with which an ended job goes on: - is not stdout here")
    found: dict[Path, None] = {}
    for pattern in patterns:
        named = os.path.lexists(pattern)
        names = [pattern]
        if not named:
            matched = sorted(glob.glob(pattern, recursive=True))
            names = [name for name in matched if _is_file(name) and not _same(name, output)]
        if not names:
            stdin = ": INPUT is read twice, which stdin cannot be" if pattern == "-" else ""
            raise UsageError(f"no file {pattern}{stdin}")
        for name in names:
            if not _is_file(name):
                raise UsageError(f"{name} is {_no_input(name)}")
            if name.lower().endswith(".gguf"):
                raise UsageError(f"{name} is a model: give it as --model {name}, before or behind INPUT and OUTPUT")
            if _same(name, output):
                raise UsageError(f"{output} is an input and the output: give the output a name of its own")
            found[Path(name)] = None
    return list(found)


def _is_file(name: str) -> bool:
    return Path(name).is_file()


def _no_input(name: str) -> str:
    """What a name is that no requests can be read from."""
    if not os.path.isdir(name):
        return "no file that can be read twice"
    if any(layout.has_config(Path(name)) for layout in LAYOUTS.values()):
        return f"the folder of a model: give it as --model {name}, before or behind INPUT and OUTPUT"
    return f"a folder: give the files in it as a pattern, as '{os.path.join(name, '*.jsonl')}'; a model is --model"


def _same(name: str, output: str) -> bool:
    return os.path.exists(output) and os.path.samefile(name, output)


@dataclass(frozen=True)
class Place:
    """Where a line is."""

    file: Path
    number: int

    def __str__(self) -> str:
        return f"{self.file} line {self.number}"


def raw_lines(files: Sequence[Path]) -> Iterator[tuple[Place, bytes, str]]:
    """Of each line that is not empty: where it is, its bytes (of one that is too long, only the first), and its id.

    Raises:
        UsageError: a file cannot be read.
        FormatError: it is not in the encoding that its byte order mark stands for.
    """
    before: Counter[bytes] = Counter()  # by a digest, which is shorter than most lines
    for path in files:
        try:
            with open(path, "rb") as file:
                lines, number = Lines(file, str(path)), 0
                while text := lines.readline(LONGEST + 2):
                    number += 1
                    while not text.endswith(b"\n") and (rest := lines.readline(LONGEST)):
                        text = text[: LONGEST + 1] + rest[-1:]
                    text = text.strip()
                    if text:
                        digest = hashlib.sha256(text).digest()[:12]
                        yield Place(path, number), text, id_of(text, before[digest])
                        before[digest] += 1
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {reason_of(error)}") from None


@dataclass(frozen=True)
class Index:
    """What a first look at all lines has found.

    Args:
        ids: of the lines.
        repeated: where the first one is, of lines whose custom_id another line has, by id.
    """

    ids: frozenset[str]
    repeated: Mapping[str, str]


def index(files: Sequence[Path], answered: Mapping[str, str]) -> Index:
    """Look at all lines once.

    Args:
        answered: ids of lines that an earlier run has answered, by custom_id: they keep it whatever the files' order.

    Raises:
        UsageError: a file cannot be read, or none of its lines is a JSON object, so that it is something else.
    """
    ids: list[str] = []
    firsts: dict[str, Place] = {}
    repeated: dict[str, str] = {}
    strange: dict[Path, str] = {}  # by file, what is wrong with its first line, where no other is better
    sound: set[Path] = set()
    for place, text, line_id in raw_lines(files):
        ids.append(line_id)
        try:
            name = read_line(text, line_id).custom_id
            sound.add(place.file)
        except LineError as error:
            if error.code == NOT_JSON:
                strange.setdefault(place.file, f"line {place.number}: {error.message}")
            else:
                sound.add(place.file)
            if error.custom_id is None:
                continue
            name = error.custom_id
        if name in firsts:
            repeated[line_id] = f"that of {firsts[name]}"
        elif answered.get(name, line_id) != line_id:
            repeated[line_id] = "that of a line that was answered before"
        else:
            firsts[name] = place
    for path, why in strange.items():
        if path not in sound:
            example = "" if EXAMPLE in why else f"; a line is such as {EXAMPLE}"
            raise UsageError(f"{path} is no file of requests, a JSON object a line: {why}{example}")
    return Index(frozenset(ids), repeated)


def requests(files: Sequence[Path], found: Index, done: Container[str]) -> Iterator[Line | Answered]:
    """The lines that are not done, each as a request, or as what is written for one that is none."""
    for place, text, line_id in raw_lines(files):
        if line_id in done:
            continue
        try:
            line = read_line(text, line_id)
            if line_id in found.repeated:
                what = f"its custom_id {line.custom_id} is {found.repeated[line_id]} already"
                raise LineError("duplicate_custom_id", what, line.custom_id)
        except LineError as error:
            told = {"code": error.code, "message": f"{place}: {error.message}"}
            yield Answered(line_id, error.custom_id, error=told)
        else:
            yield line
