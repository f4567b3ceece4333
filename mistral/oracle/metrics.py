"""How far log-probabilities are from the truth, and whether that is more than their dtype makes unavoidable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral.args import ModelArgs
from mistral.logprobs import logprobs

# How many times the unavoidable error an implementation may have: its root mean square, and its largest against the
# largest. In 16 bits what is stored rounds far more coarsely than sums in fp32 do, and right implementations have 1.0
# to 1.6. In fp32 sums round as coarsely as what is stored, so right ones have 2 to 8, and more with longer sums: about
# the root of their length times as many (5 to 15 in 7B). Of the named mistakes an epsilon left out has 15, others
# have a thousand and more.
LIMITS = {torch.float64: 10.0, torch.float32: 10.0, torch.bfloat16: 2.0, torch.float16: 2.0}

LONG = 1024  # numbers in a sum beyond which the limit grows with it

LOGITS = 1 << 22  # held at once of the truth, and of one other: 32 MB in float64

Progress = Callable[[int, int], None]  # told how much of the work is done, and how much there is


@dataclass(frozen=True)
class Errors:
    """Differences to the truth over all positions and the whole vocabulary.

    Args:
        rms: root mean square of the differences of log-probabilities, in nats.
        largest: the largest of them; inf where any logit is not finite.
        kl: mean Kullback-Leibler divergence from the truth, in nats a position.
        agreement: share of the positions whose likeliest token is the truth's.
        per_position: [T] the largest difference at each position; of budgets, draw after draw.
    """

    rms: float
    largest: float
    kl: float
    agreement: float
    per_position: Tensor

    def scaled(self, factor: float) -> Errors:
        """What the errors are where rounding is `factor` times as coarse; KL goes with the square."""
        kl, each = self.kl * factor**2, self.per_position * factor
        return Errors(self.rms * factor, self.largest * factor, kl, self.agreement, each)


class ErrorStats:
    """Errors of blocks of logits, added up; of a budget, those of all its draws."""

    def __init__(self) -> None:
        self._squares = self._kl = 0.0
        self._count = self._agreeing = 0
        self._largest: list[Tensor] = []

    def add(self, true: Tensor, logits: Tensor) -> None:
        """A block: the truth's log-probs and somebody's logits, [n, V] each."""
        found = logprobs(logits)
        difference = (found - true).abs()
        difference[difference.isnan()] = float("inf")
        self._squares += float(difference.square().sum())
        self._count += difference.numel()
        self._kl += float((true.exp() * (true - found)).sum())
        self._agreeing += int((found.argmax(-1) == true.argmax(-1)).sum())
        self._largest.append(difference.amax(-1))

    def errors(self) -> Errors:
        """Of everything that was added."""
        each = torch.cat(self._largest)
        kl = self._kl / len(each)
        return Errors(
            rms=(self._squares / self._count) ** 0.5,
            largest=float(each.max()),
            kl=max(kl, 0.0) if kl == kl else float("inf"),  # below 0 only by the sum's own rounding
            agreement=self._agreeing / len(each),
            per_position=each,
        )


@dataclass(frozen=True)
class Verdict:
    """Errors against a budget.

    Args:
        ratio: how many times the unavoidable error: root mean squares, or the largest where that is more over.
        limit: the most that passes.
        first: prompt and position of the first difference beyond the limit.
    """

    ratio: float
    limit: float
    first: tuple[int, int] | None

    @property
    def passes(self) -> bool:
        return self.ratio <= self.limit and self.first is None


def limit_of(compute: torch.dtype, args: ModelArgs) -> float:
    """How many times the unavoidable error a model of a shape may have that computes in `compute`; see LIMITS."""
    longest = max(args.dim, args.hidden_dim, args.n_heads * args.head_dim)
    return LIMITS[compute] * (max(1.0, longest / LONG) ** 0.5 if compute.itemsize > 2 else 1.0)


def judge(errors: Errors, budget: Errors, limit: float, lens: Sequence[int]) -> Verdict:
    """Whether errors of an implementation are explained by rounding.

    Args:
        budget: the unavoidable errors, on the same prompts.
        limit: how many times those it may have.
        lens: of the prompts, whose positions are one after the other.
    """
    # A model whose logits are all alike has a budget of none; a difference in the last bit of a float64 is never one.
    least = 4 * torch.finfo(torch.float64).eps
    ratio = max(errors.rms / max(budget.rms, least), errors.largest / max(budget.largest, least))
    if not errors.largest + budget.largest < float("inf"):  # nothing is explained by rounding that overflows
        ratio = float("inf")
    beyond = (errors.per_position > limit * max(budget.largest, least)).nonzero().flatten().tolist()
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
    return {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[
        str(dtype).removeprefix("torch.")
    ]
