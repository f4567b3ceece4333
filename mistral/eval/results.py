"""Results of single cases: in memory, in a file that is continued after an interruption, and counted."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mistral.util.errors import FormatError, UsageError
from mistral.util.files import lock, reason_of, write_atomic

CONFIDENCE = 1.959963984540054  # standard deviations of 95%


@dataclass(frozen=True)
class Result:
    """One case.

    Args:
        group: its length in tokens as asked for, or the file it is from.
        index: its number in the group.
        tokens: of its prompt.
        answer: what would be right.
        text: what the model wrote.
        correct: whether that is right.
    """

    group: str
    index: int
    tokens: int
    answer: str
    text: str
    correct: bool


class ResultFile:
    """Results as JSON lines: what was measured first, then a line for each case, written when it is known.

    A file that is there is continued. A line that was cut off, as a kill in the middle does, is dropped.

    Args:
        path: of the file; None keeps results in memory alone.
        header: what was measured; a file of other settings is refused.

    Attributes:
        found: results so far, by group and index.
        resumed: how many of them were in the file.

    Raises:
        FormatError: the file is another one, was made with other settings, or cannot be written.
        UsageError: another evaluation writes to it.
    """

    def __init__(self, path: str | None, header: dict[str, Any]) -> None:
        self.found: dict[tuple[str, int], Result] = {}
        self._file: int | None = None
        self._path = path
        if path is not None:
            if not Path(path).exists():
                with write_atomic(path) as beside:
                    beside.write_text(f"{json.dumps(header)}\n", encoding="utf-8")
            try:
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
            except OSError as error:
                raise FormatError(f"{path} cannot be written: {reason_of(error)}") from None
            try:
                lock(self._file, f"{path}: another evaluation writes to it: wait for it, or give another file")
                self._read(path, header)
            except BaseException:
                self.close()
                raise
        self.resumed = len(self.found)

    def add(self, result: Result) -> None:
        """Keep a result; in the file, its whole line or nothing of it survives a kill."""
        self.found[result.group, result.index] = result
        if self._file is None:
            return
        try:
            line = f"{json.dumps(asdict(result), ensure_ascii=False)}\n".encode("utf-8", "surrogatepass")
            if os.write(self._file, line) != len(line):
                raise OSError(0, "the disk is full")
            os.fsync(self._file)
        except OSError as error:
            raise FormatError(f"{self._path} cannot be written: {reason_of(error)}") from None

    def close(self) -> None:
        """Close the file; results from here on stay in memory."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _read(self, path: str, header: dict[str, Any]) -> None:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {reason_of(error)}") from None
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", "replace").splitlines()
        try:
            before = json.loads(lines[0])
            results = [Result(**json.loads(line)) for line in lines[1:]]
        except (IndexError, ValueError, TypeError, RecursionError):
            raise FormatError(f"{path} is there and holds something else: give another name, or remove it") from None
        if before != header:
            differing = sorted(k for k in {*before, *header} if before.get(k) != header.get(k))
            raise FormatError(
                f"{path} was made with another {', '.join(differing)}: give the same, or another file to --output"
            )
        self.found = {(result.group, result.index): result for result in results}
        if len(whole) < len(content):
            with open(path, "r+b") as file:
                file.truncate(len(whole))


def wilson(correct: int, n: int) -> tuple[float, float]:
    """The 95% confidence interval of a share, by Wilson's score: inside [0, 1] also for none or all of n.

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927).
    """
    if n < 1:
        raise UsageError("a share of no cases has no confidence interval")
    z2 = CONFIDENCE**2
    share = correct / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = CONFIDENCE / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if correct == 0 else centre - half
    return low, 1.0 if correct == n else centre + half


def counted(group: str, results: list[Result]) -> dict[str, Any]:
    """What the results of a group come to, as a row of a report."""
    correct = sum(result.correct for result in results)
    low, high = wilson(correct, len(results))
    tokens = [result.tokens for result in results]
    return {
        "group": group,
        "cases": len(results),
        "correct": correct,
        "accuracy": correct / len(results),
        "low": low,
        "high": high,
        "tokens_min": min(tokens),
        "tokens_mean": sum(tokens) / len(tokens),
        "tokens_max": max(tokens),
    }
