"""What a comparison of two sides found, and how it is reported."""

from __future__ import annotations

from dataclasses import dataclass, field

from mistral.oracle import arrays, mutants
from mistral.oracle.outputs import ErrorBudget


@dataclass(frozen=True)
class Divergence:
    """Where two sides differ first: an activation (None: the log-probs), the prompt and the position.

    Args:
        difference: the largest there.
        limit: the most that is explained there.
    """

    activation: str | None
    prompt: int
    position: int
    difference: float = 0.0
    limit: float = 0.0


@dataclass(frozen=True)
class Limits:
    """The largest differences that are no mistake's.

    Args:
        logprobs: of log-probs.
        prints: of fingerprints of activations, by name; `logprobs` for others.
        budget: the error budget that they are a multiple of; None where nothing is available to measure one on.
        quantized: what a side's weights are declared to be rounded to: then the limits are for that.
    """

    logprobs: float
    prints: dict[str, float]
    budget: ErrorBudget | None
    quantized: str | None = None


@dataclass(frozen=True)
class Differences:
    """How far apart two sides are.

    Args:
        compared: positions at which both sides told log-probs of some token.
        tokens: the most of which both told at a position.
        largest: difference of log-probs, in nats.
        agreement: share of positions whose most likely token is the same; None where it is not known.
        first: where log-probs differ by more than is explained first.
        activation: the first activation that does; None where none does, or a side tells none.
        activations: how many were compared.
    """

    compared: int
    tokens: int
    largest: float
    agreement: float | None
    first: Divergence | None
    activation: Divergence | None
    activations: int


@dataclass(frozen=True)
class Causes:
    """Mutants that were tried on one side's model, to give the other side's numbers.

    Args:
        mistakes: those that do, with the largest difference that is left.
        nearest: the one that comes closest, where none does.
        tried: how many there were; 0 where no model is available.
        side: whose model made them, "A" or "B"; "" for neither's.
    """

    mistakes: dict[str, float] = field(default_factory=dict)
    nearest: tuple[str, float] | None = None
    tried: int = 0
    side: str = ""


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Args:
        a, b: the sides.
        lens: of the prompts.
        differences: how far apart they are.
        limits: the most that rounding explains.
        causes: what explains more than that.
        notes: what could not be told, a sentence each.
    """

    a: str
    b: str
    lens: tuple[int, ...]
    differences: Differences
    limits: Limits
    causes: Causes
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        return self.differences.first is None and self.differences.activation is None

    @property
    def verdict(self) -> str:
        """In a sentence, with the reason."""
        declared = f"what rounding the weights to {self.limits.quantized} explains" if self.limits.quantized else ""
        explained = declared or "what rounding explains"
        if self.differences.first is not None:
            return f"DIFFERENT: log-probs differ by more than {explained}"
        if (d := self.differences.activation) is None:
            return f"the same, within {declared}" if declared else "the same"
        return (
            f"DIFFERENT: log-probs agree within {explained}, but the activation {d.activation} differs by "
            f"{d.difference:.1e}, of which rounding explains {d.limit:.1e}"
        )


def as_json(c: Comparison) -> str:
    """One object."""
    budget, found = c.limits.budget, c.differences
    activation = found.activation
    return arrays.as_json(
        {
            "a": c.a,
            "b": c.b,
            "prompts": c.lens,
            "positions_compared": found.compared,
            "tokens_compared": found.tokens,
            "max_delta_logprob": found.largest,
            "limit": c.limits.logprobs,
            "quantized": c.limits.quantized,
            "error_budget": None if budget is None else budget.logprobs,
            "dtypes": None if budget is None else budget.of,
            "top1_agreement": found.agreement,
            "first_position": None if found.first is None else [found.first.prompt, found.first.position],
            "activations_compared": found.activations,
            "first_activation": None
            if activation is None
            else {"name": activation.activation, "prompt": activation.prompt, "position": activation.position},
            "mistakes": c.causes.mistakes,
            "nearest": c.causes.nearest,
            "mistakes_tried": c.causes.tried,
            "mutated_side": c.causes.side or None,
            "notes": c.notes,
            "same": c.same,
            "verdict": c.verdict,
        },
        indent=2,
    )


def as_text(c: Comparison) -> str:
    """A few lines."""
    d = c.differences
    lines = [
        f"A: {c.a}",
        f"B: {c.b}",
        f"{len(c.lens)} {'prompt' if len(c.lens) == 1 else 'prompts'} of {', '.join(map(str, c.lens))} ids",
        f"log-probs: {d.compared} positions of up to {d.tokens} tokens compared, largest difference {_measured(c)}",
    ]
    if d.agreement is not None:
        lines.append(f"most likely token the same at {d.agreement:.1%} of the positions")
    if d.first is not None:
        lines.append(f"log-probs part first in prompt {d.first.prompt} at position {d.first.position}")
    if (at := d.activation) is not None:
        lines.append(f"activations part first at {at.activation}, prompt {at.prompt}, position {at.position}")
    elif d.activations:
        lines.append(f"activations: {d.activations} compared, none parts")
    return "\n".join([*lines, *_explained(c), *(f"note: {note}" for note in c.notes), c.verdict])


def _measured(c: Comparison) -> str:
    """The largest difference of log-probs, and its limit."""
    budget, limit, largest = c.limits.budget, c.limits.logprobs, c.differences.largest
    if c.limits.quantized and budget is not None:
        return f"{largest:.2e} (limit {limit:.1e}: rounding the weights to {budget.of} changes {budget.logprobs:.1e})"
    if budget is not None and budget.logprobs > 0:
        return (
            f"{largest:.2e}: {largest / budget.logprobs:.3g} times the error budget of {budget.of} "
            f"({budget.logprobs:.1e}; limit {limit / budget.logprobs:.3g} times)"
        )
    why = "rounding changes nothing" if budget else "no model is available to measure an error budget"
    return f"{largest:.2e} (limit {limit:.0e}: {why})"


def _explained(c: Comparison) -> list[str]:
    """A line for each mutant that explains the difference, or one on the nearest."""
    ours, other = c.causes.side, "B" if c.causes.side == "A" else "A"
    lines = [
        f"{other} is {ours} with {name}: {mutants.MUTANTS[name].what} ({error:.1e} is left)"
        for name, error in sorted(c.causes.mistakes.items(), key=lambda pair: pair[1])
    ]
    if c.causes.nearest is not None:
        name, left = c.causes.nearest
        near = f"the nearest, {name}, leaves {left:.1e} of {c.differences.largest:.1e}"
        lines.append(f"none of {c.causes.tried} mutants of {ours} gives {other}'s numbers; {near}")
    return lines
