"""A batch job: lines that are not done yet go to whoever answers them, and each answer is written at once.

Knows nothing about how lines are answered. Runs without torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mistral.batch.inputs import Index, index, requests
from mistral.batch.lines import Answered, Line
from mistral.batch.output import Output
from mistral.util.english import counted
from mistral.util.errors import UsageError

Write = Callable[[Answered], None]
# Answers lines in any order: each is passed to `write` once. Takes the next line when it has room for it.
Runner = Callable[[Iterator[Line], Write], None]


@dataclass
class Progress:
    """How far a job is.

    Args:
        total: lines in all.
        done: of them, those that an earlier run did included.
        earlier: those that it did.
        failed: errors in the output, of all runs.
        tokens: generated in this run.
        first_error: which line of this run failed first, and why.
    """

    total: int
    done: int
    earlier: int
    failed: int
    tokens: int = 0
    first_error: str | None = None
    began: float = 0.0

    def describe(self) -> str:
        """In words."""
        seconds = time.monotonic() - self.began
        failed = f", {self.failed:,} of them {'an error' if self.failed == 1 else 'errors'}" if self.failed else ""
        speed = f", {self.tokens / seconds:.1f} tokens/s" if self.tokens and seconds > 0 else ""
        return f"{self.done:,} of {counted(self.total, 'line')}{failed}{speed}"


class Job:
    """What is to be done, and how far it is.

    Args:
        files: the inputs.
        output: where answers go, and those of an earlier run are.
        tell: is called with the progress after every answer.

    Raises:
        UsageError: no input has a line, or the output is another job's.
    """

    def __init__(self, files: list[Path], output: Output, tell: Callable[[Progress], None]) -> None:
        self._files, self._output, self._tell = files, output, tell
        earlier = output.earlier
        self._index = index(files, {custom_id: line_id for line_id, custom_id in earlier.ok.items()})
        _check(self._index, output)
        done = len(output.done)
        self.progress = Progress(len(self._index.ids), done, done, len(earlier.failed))

    @property
    def left(self) -> int:
        """Lines that are not done."""
        return self.progress.total - self.progress.done

    def run(self, answer: Runner) -> None:
        """Have all lines answered that are not. Whatever ends it early, what was answered is in the file."""
        self.progress.began = time.monotonic()
        self._tell(self.progress)
        answer(self._requests(), self._write)

    def _requests(self) -> Iterator[Line]:
        for line in requests(self._files, self._index, frozenset(self._output.done)):
            if isinstance(line, Line):
                yield line
            else:
                self._write(line)

    def _write(self, answered: Answered) -> None:
        if not self._output.append(answered):
            return
        progress = self.progress
        progress.done += 1
        if not answered.ok:
            progress.failed += 1
            who = f"{answered.custom_id}: " if answered.custom_id else ""  # the reason names file and line
            progress.first_error = progress.first_error or who + answered.reason
        elif answered.response is not None:
            progress.tokens += _tokens(answered.response["body"])
        self._tell(progress)


def _check(found: Index, output: Output) -> None:
    if not found.ids:
        raise UsageError("the inputs have no line that is not empty")
    strange = len(output.done - found.ids)
    if strange:
        lost = output.earlier.failed - found.ids
        advice = "; --retry drops errors of lines that are mended now" if len(lost) == strange else ""
        raise UsageError(
            f"{output.path} has answers to {counted(strange, 'line')} not in the inputs: give this job another "
            f"output{advice}"
        )


def _tokens(body: object) -> int:
    usage = body.get("usage") if isinstance(body, dict) else None
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) else 0
