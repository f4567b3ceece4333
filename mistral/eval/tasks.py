"""What a retrieval task is: a prompt of a length, its answer, and what counts as right. One task a file.

    made = task.make(case, size)        # a prompt that hides something, and the answer
    right = task.score(text, answer)    # whether a model's text has it

A task's size is in units of its own (sentences, lines, exchanges); `fit` finds the size for a number of tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mistral.eval.filler import Filler
from mistral.util.errors import UsageError

Encode = Callable[[str], list[int]]  # a prompt as ids, with whatever a template puts around it
LARGEST = 10_000_000  # units of a prompt


class Made(NamedTuple):
    """A prompt and its answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Case:
    """Which prompt of a task: the same case has the same answer and the same beginning at any size.

    Args:
        seed: of the run.
        index: of the case, from 0.
        n: how many cases there are; a task may spread what it hides evenly over them.
        filler: the text to hide it in, for tasks that have one.
    """

    seed: int
    index: int
    n: int
    filler: Filler

    def rng(self, task: str) -> random.Random:
        """Random numbers of this case alone; the same in every version of Python."""
        return random.Random(f"{task} {self.seed} {self.index}")


class Task(Protocol):
    """A retrieval task.

    Attributes:
        name: as `--task` has it.
        max_tokens: the most tokens of an answer.
        rule: what counts as right, as a sentence for reports.
    """

    name: str
    max_tokens: int
    rule: str

    def filler(self, seed: int) -> Filler:
        """The text to hide something in, where a user gives none."""

    def make(self, case: Case, size: int) -> Made:
        """A prompt of `size` units; with 0 it is as short as it can be."""

    def score(self, text: str, answer: str) -> bool:
        """Whether a model's text is right."""


class Fitted(NamedTuple):
    """A prompt as ids, its answer, and how many units it has."""

    ids: list[int]
    answer: str
    size: int


def fit(task: Task, case: Case, length: int, encode: Encode) -> Fitted:
    """The largest prompt of a case that has at most `length` tokens.

    Args:
        encode: the model's own tokenizer, and template if there is one; what it adds counts.

    Raises:
        UsageError: even the shortest prompt is longer.
    """
    shortest = encode(task.make(case, 0).prompt)
    if len(shortest) > length:
        raise UsageError(f"--lengths {length}: without any filler, {task.name} already needs {len(shortest)} tokens")
    # From a size that fits, by the mean tokens a unit, to the next guess; between what fits and what does not.
    low, fits, high, unit = 0, shortest, LARGEST, 16.0
    while high - low > 1:
        guess = min(max(low + 1, low + int((length - len(fits)) / unit)), high - 1)
        ids = encode(task.make(case, guess).prompt)
        unit = max(1.0, (len(ids) - len(shortest)) / guess)
        if len(ids) <= length:
            low, fits = guess, ids
        else:
            high = guess
    return Fitted(fits, task.make(case, low).answer, low)
