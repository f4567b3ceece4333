"""How far log-probabilities are from the truth, and whether that is more than the error budget of their dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral.logprobs import logprobs

# How many times its error budget an implementation may have over all positions. Right ones have about 1 in 16 bits,
# and up to 2 in fp32 and float64, where it shows in which order sums are added. Of the mutants, the least, a missing
# epsilon, has 22 and more.
LIMITS = {torch.float64: 5.0, torch.float32: 5.0, torch.bfloat16: 2.0, torch.float16: 2.0}

# The largest error of all may be this many times the limit, of the largest of the budget. It is one random number over
# a few: where a model is sensitive at one position only, beyond 5 times once in 500 runs.
LARGEST = 2.5

LOGITS = 1 << 22  # held at once of the truth, and of one other: 32 MB in float64

Progress = Callable[[int, int], None]  # told how much of the work is done, and how much there is


@dataclass(frozen=True)
class Errors:
    """Differences to the truth over all positions and the whole vocabulary.

    Args:
        rms: root mean square of the differences of log-probabilities, in nats.
        largest: the largest of them; inf where any logit is not finite.
        kl: mean Kullback-Leibler divergence from the truth, in nats a position.
        agreement: share of the positions whose most likely token is the truth's.
        per_position: [T] the largest difference at each position; of budgets [draws * T], draw after draw.
        squares: [T] the mean square of the differences at each position; of budgets like per_position.
    """

    rms: float
    largest: float
    kl: float
    agreement: float
    per_position: Tensor
    squares: Tensor

    def scaled(self, factor: float) -> Errors:
        """What the errors are where rounding is `factor` times as coarse; KL goes with the square."""
        square = factor**2
        return Errors(
            self.rms * factor,
            self.largest * factor,
            self.kl * square,
            self.agreement,
            self.per_position * factor,
            self.squares * square,
        )


class ErrorStats:
    """Errors of blocks of logits, added up; of a budget, those of all its draws."""

    def __init__(self) -> None:
        self._kl = 0.0
        self._agreeing = 0
        self._squares: list[Tensor] = []
        self._largest: list[Tensor] = []

    def add(self, true: Tensor, logits: Tensor) -> None:
        """A block: the truth's log-probs and somebody's logits, [n, V] each."""
        found = logprobs(logits)
        difference = (found - true).abs()
        difference[difference.isnan()] = float("inf")
        self._squares.append(difference.square().mean(-1))
        self._kl += float((true.exp() * (true - found)).sum())
        self._agreeing += int((found.argmax(-1) == true.argmax(-1)).sum())
        self._largest.append(difference.amax(-1))

    def errors(self) -> Errors:
        """Of everything that was added."""
        each, squares = torch.cat(self._largest), torch.cat(self._squares)
        kl = self._kl / len(each)
        return Errors(
            rms=float(squares.mean()) ** 0.5,
            largest=float(each.max()),
            kl=max(kl, 0.0) if kl == kl else float("inf"),  # below 0 only by the sum's own rounding
            agreement=self._agreeing / len(each),
            per_position=each,
            squares=squares,
        )


@dataclass(frozen=True)
class Verdict:
    """Errors against a budget.

    Args:
        ratio: how many times the error budget: see `judge`.
        limit: the most that passes.
        first: prompt and position of the first difference beyond LARGEST times the limit.
    """

    ratio: float
    limit: float
    first: tuple[int, int] | None

    @property
    def passes(self) -> bool:
        return self.ratio <= self.limit and self.first is None


def judge(errors: Errors, budget: Errors, limit: float, lens: Sequence[int]) -> Verdict:
    """Whether errors of an implementation are explained by rounding.

    Each position is measured by its own budget, the root mean square over draws and vocabulary, and the ratio is the
    root mean square over positions. So one position that a model is very sensitive at (trained ones have some, with
    errors a hundred times the others') counts as one, and hides nothing elsewhere.

    Args:
        budget: the errors of the error budget's draws, on the same prompts.
        limit: how many times those it may have.
        lens: of the prompts, whose positions are one after the other.
    """
    # A model whose logits are all alike has a budget of none; a difference in the last bit of a float64 is never one.
    least = 4 * torch.finfo(torch.float64).eps
    expected = budget.squares.view(-1, sum(lens)).mean(0)
    # Positions at which rounding happens to change little, or nothing, are measured by the median.
    expected = expected.clamp(min=max(float(expected.median()), least**2))
    ratio = float((errors.squares / expected).mean()) ** 0.5
    if not errors.largest + budget.largest < float("inf"):  # nothing is explained by rounding that overflows
        ratio = float("inf")
    most = LARGEST * limit * max(budget.largest, least)
    beyond = (errors.per_position > most).nonzero().flatten().tolist()
    return Verdict(ratio, limit, place(beyond[0], lens) if beyond else None)


def place(row: int, lens: Sequence[int]) -> tuple[int, int]:
    """Prompt and position of a row of the whole."""
    for prompt, n in enumerate(lens):
        if row < n:
            return prompt, row
        row -= n
    raise IndexError(row)


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Cells as lines of equally wide columns; those numbered in `right` end together."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def short(dtype: torch.dtype) -> str:
    """fp32, bf16: as people say it."""
    name = str(dtype).removeprefix("torch.")
    return {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, name)
