"""Two sides, where they part, and which mistake explains it: `python -m main compare A B`.

Differences count from where rounding no longer explains them. Where both sides tell activations, the first layer,
position and operation that part are named. Where one side's model is available, it is run again with each
mistake, and those that give the other side's numbers are named.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mistral.logprobs import logprobs
from mistral.oracle import arrays, mutants
from mistral.oracle.inputs import inside, prompts_for
from mistral.oracle.metrics import LIMITS, Progress, place, short
from mistral.oracle.outputs import ErrorBudget, Outputs
from mistral.oracle.pack import PackError, folder_of
from mistral.oracle.sides import FolderSide, PackSide, Side, known
from mistral.util.errors import UsageError

# Where no model and no budget is available: what is rounding in sums of ordinary length, and no mistake.
UNKNOWN = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

# Each position is judged by the largest error of the budget, of which it may have this many times the limit.
SINGLE = 1.5

# A mistake explains a difference if it leaves at most this share of it, and at most so many times the limit.
SHARE, SLACK = 0.02, 8.0


@dataclass(frozen=True)
class Divergence:
    """Where two sides part: an activation (None: the log-probs), the prompt and the position."""

    activation: str | None
    prompt: int
    position: int


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Args:
        a, b: the sides.
        lens: of the prompts.
        compared: positions at which both sides told log-probs of some token.
        tokens: the most of which both told at a position.
        largest: difference of log-probs, in nats.
        limit: the most that rounding explains.
        budget: the error budget of which it is a multiple; None where nothing is available to measure that on.
        agreement: share of positions whose most likely token is the same; None where it is not known.
        first: where log-probs part.
        activation: the first activation that parts; None where none does, or a side tells none.
        activations: how many were compared.
        mistakes: mutants that give the other side's numbers, with the largest difference that is left.
        nearest: the one that comes closest, where none does.
        tried: how many mutants were tried; 0 where no model is available.
        mutated_side: the side whose model made them, "A" or "B".
        notes: what could not be told, a sentence each.
    """

    a: str
    b: str
    lens: tuple[int, ...]
    compared: int
    tokens: int
    largest: float
    limit: float
    budget: ErrorBudget | None
    agreement: float | None
    first: Divergence | None
    activation: Divergence | None
    activations: int
    mistakes: dict[str, float] = field(default_factory=dict)
    nearest: tuple[str, float] | None = None
    tried: int = 0
    mutated_side: str = ""
    notes: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        return self.first is None and self.activation is None


def compare(
    a: Side,
    b: Side,
    *,
    compute: torch.dtype = torch.float32,
    prompts: Sequence[Tensor] | None = None,
    full: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two sides.

    Args:
        compute: dtype of the arithmetic of the side that is not the truth, or of the weights that were rounded to it.
        prompts: what to ask where neither side is bound to prompts of its own; None takes random ones.
        full: see `reading.prompts_for`.
        seed: of random prompts.
        progress: told how many of the mistakes were tried, and how many there are.

    Raises:
        UsageError: the sides speak of different prompts, or have no shape in common.
        ValueError: another subclass: a side cannot be had.
    """
    notes: list[str] = []
    asked = _prompts(a, b, prompts, full, seed)
    _check_vocabularies(a, b, asked)
    lens = [len(p) for p in asked]
    found_a, found_b = a.evidence(asked), b.evidence(asked)
    ours, mutated_side = _ours(a, b)
    other = found_b if mutated_side == "A" else found_a
    if ours is not None and (note := inside(ours.found.args, lens)):
        notes.append(note)
    budget = _budget(a, b, ours, asked, compute)
    difference = differences(found_a, found_b)
    args = a.args or b.args
    times = SINGLE * LIMITS[compute]
    limit = UNKNOWN[compute] if budget is None else max(times * budget.logprobs, _told(compute))
    if not limit < torch.inf:
        raise UsageError(
            f"rounding to {short(compute)} makes numbers of this model infinite, so nothing can be told apart from it"
        )
    beyond = (difference > limit).nonzero().flatten().tolist()
    first = Divergence(None, *place(beyond[0], lens)) if beyond else None
    if difference.isnan().all():
        raise UsageError(f"{a.name} and {b.name} tell log-probs of no token in common")
    shared = [name for name in (known(args, found_a.prints) if args else found_a.prints) if name in found_b.prints]
    most = {} if budget is None else {name: times * x for name, x in budget.prints.items()}
    parted = _first_activation(shared, found_a, found_b, most, limit, lens)
    largest = float(difference.nan_to_num(nan=0.0, posinf=torch.inf).max())
    left: dict[str, float] = {}
    if (first or parted) and ours is not None:
        left = _explained(ours, other, asked, progress)
    # A model that makes a mistake may round more coarsely than the right one, for which the limit was measured.
    near = max(limit, min(SLACK * limit, SHARE * largest))
    mistakes = {name: error for name, error in left.items() if error <= near}
    nearest = min(left.items(), key=lambda pair: pair[1]) if left and not mistakes else None
    if first or parted:
        in_reverse = mutated_side == "B" and isinstance(a, PackSide)
        notes += _advice(ours is not None, in_reverse, not mistakes and compute == torch.float32)
    return Comparison(
        a.name,
        b.name,
        tuple(lens),
        int((~difference.isnan()).sum()),
        min(len(e.logprobs[0]) for e in (found_a, found_b)),
        largest,
        limit,
        budget,
        _agreement(found_a, found_b),
        first,
        parted,
        len(shared),
        mistakes,
        nearest,
        len(left),
        mutated_side if left else "",
        tuple(notes),
    )


def _check_vocabularies(a: Side, b: Side, prompts: Sequence[Tensor]) -> None:
    """Refuse sides of different vocabularies, and prompts with ids outside of them."""
    sizes = {s.args.vocab_size for s in (a, b) if s.args is not None}
    if len(sizes) > 1:
        raise UsageError(f"the vocabularies differ: {a.name} and {b.name} know {sizes.pop()} and {sizes.pop()} tokens")
    if any(int(p.max()) >= min(sizes, default=2**62) or int(p.min()) < 0 for p in prompts):
        raise UsageError(f"a prompt has an id outside the vocabulary of {min(sizes)}")


def _advice(mutable: bool, in_reverse: bool, unexplained_in_fp32: bool) -> Iterator[str]:
    """Notes on a difference, for whoever looks for its cause."""
    if not mutable:
        yield "no model is available to mutate: give a folder, or a pack with weights, as one side"
        return
    if in_reverse:
        yield "the mutants are those of B, because A has no weights: what B does wrong is reported in reverse"
    if unexplained_in_fp32:
        yield "if a side computes in 16 bits, say so: --dtype bfloat16"


def _prompts(a: Side, b: Side, given: Sequence[Tensor] | None, full: bool, seed: int) -> list[Tensor]:
    bound = [s for s in (a, b) if s.prompts is not None]
    if bound and given is not None:
        raise UsageError(f"{bound[0].name} speaks of its own prompts: leave the others out")
    if len(bound) == 2:
        first, second = ([p.tolist() for p in s.prompts or ()] for s in bound)
        if first != second:
            raise UsageError(f"{a.name} and {b.name} speak of different prompts")
    if bound:
        return list(bound[0].prompts or ())
    if given is not None:
        return list(given)
    args = a.args or b.args
    if args is None:
        raise UsageError("two servers have no prompts to be asked: give --file, or a pack or a folder as one side")
    return prompts_for(args, full, seed)


def _ours(a: Side, b: Side) -> tuple[FolderSide | None, str]:
    """The first side whose model is available, and which it is."""
    for one, which in ((a, "A"), (b, "B")):
        if isinstance(one, FolderSide):
            return one, which
        if isinstance(one, PackSide):
            with contextlib.suppress(PackError):  # it has no weights
                return FolderSide(folder_of(one.pack.path, one.pack.path.parent), one.name), which
    return None, ""


def _budget(
    a: Side, b: Side, ours: FolderSide | None, prompts: Sequence[Tensor], compute: torch.dtype
) -> ErrorBudget | None:
    """What rounding explains: measured on the model that is available, or as a pack tells."""
    if ours is not None:
        stored = [s.stored for s in (a, b) if isinstance(s, FolderSide)] or [ours.stored]
        # Folders of different dtypes: one is the other rounded, and to tell them apart is not the aim.
        return ours.rounded(prompts, min([*stored, compute], key=lambda dtype: dtype.itemsize), compute)
    told = (u for s in (a, b) if isinstance(s, PackSide) for u in s.pack.budgets)
    return next((u for u in told if u.of.endswith(f"/{short(compute)}")), None)


def _told(compute: torch.dtype) -> float:
    """What telling a log-prob rounds away, of numbers up to 32: they come in fp32 at best, but from float64."""
    return 16 * torch.finfo(torch.promote_types(compute, torch.float32)).eps


def differences(a: Outputs, b: Outputs) -> Tensor:
    """[T] the largest difference of log-probs at each position, of tokens that both tell of; nan where there is none.

    Raises:
        UsageError: the vocabularies differ.
    """
    if a.ids is None and b.ids is None:
        if a.logprobs.shape[1] != b.logprobs.shape[1]:
            raise UsageError(
                f"log-probs of {a.logprobs.shape[1]} tokens on one side, of {b.logprobs.shape[1]} on the other: "
                "the vocabularies differ"
            )
        return _largest(a.logprobs - b.logprobs, (a.told & b.told)[:, None].expand_as(a.logprobs))
    if a.ids is None:
        return differences(b, a)
    if b.ids is None:
        V = b.logprobs.shape[1]
        if int(a.ids.max()) >= V:
            raise UsageError(f"one side tells of token {int(a.ids.max())}, but the other knows only {V}")
        theirs = b.logprobs.gather(1, a.ids.clamp(min=0))
        return _largest(a.logprobs - theirs, (a.ids >= 0) & b.told[:, None])
    both = (a.ids[:, :, None] == b.ids[:, None]) & (a.ids >= 0)[:, :, None]
    apart = a.logprobs[:, :, None] - b.logprobs[:, None]
    return _largest(apart.flatten(1), both.flatten(1))


def _largest(difference: Tensor, known: Tensor) -> Tensor:
    """[T] the largest of what is known of each row, inf where that is no number; nan where nothing is."""
    apart = difference.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return torch.where(known.any(-1), torch.where(known, apart, -1.0).amax(-1), torch.nan)


def _top_tokens(evidence: Outputs) -> Tensor:
    best = evidence.logprobs.nan_to_num(nan=-torch.inf).argmax(-1)
    return best if evidence.ids is None else evidence.ids.gather(1, best[:, None])[:, 0]


def _agreement(a: Outputs, b: Outputs) -> float | None:
    """Share of equal most likely tokens, where both sides told more than the prompt's own."""
    told = [e.ids is None or (e.ids >= 0).sum(-1).max() > 2 for e in (a, b)]
    if not all(told):
        return None
    rows = torch.ones(len(a.logprobs), dtype=torch.bool)
    for e in (a, b):
        rows &= e.told
    return float((_top_tokens(a) == _top_tokens(b))[rows].double().mean())


def _first_activation(
    shared: Sequence[str], a: Outputs, b: Outputs, most: dict[str, float], otherwise: float, lens: Sequence[int]
) -> Divergence | None:
    for name in shared:
        apart = (a.prints[name] - b.prints[name]).abs().amax(-1)
        beyond = (~(apart <= most.get(name, otherwise))).nonzero().flatten().tolist()
        if beyond:
            return Divergence(name, *place(beyond[0], lens))
    return None


def _explained(
    ours: FolderSide, other: Outputs, prompts: Sequence[Tensor], progress: Progress | None
) -> dict[str, float]:
    """For each mistake that matters here, the largest difference that is left when ours makes it too."""
    args, lens = ours.found.args, [len(p) for p in prompts]
    model = ours.model()
    tried = [name for name in mutants.MUTANTS if mutants.applies(name, args, lens)]
    left: dict[str, float] = {}
    for done, name in enumerate(tried, 1):
        mistaken = torch.cat(mutants.logits_with(model, list(prompts), name))
        told = ~mistaken.isnan().all(-1)  # a mistake may leave out a prompt's first row
        difference = differences(Outputs(None, logprobs(mistaken), {}, told), other)
        if not difference.isnan().all():
            left[name] = float(difference.nan_to_num(nan=0.0, posinf=torch.inf).max())
        if progress is not None:
            progress(done, len(tried))
    return left


def as_json(c: Comparison) -> str:
    """One object."""
    return arrays.as_json(
        {
            "a": c.a,
            "b": c.b,
            "prompts": c.lens,
            "positions_compared": c.compared,
            "tokens_compared": c.tokens,
            "max_delta_logprob": c.largest,
            "limit": c.limit,
            "error_budget": None if c.budget is None else c.budget.logprobs,
            "dtypes": None if c.budget is None else c.budget.of,
            "top1_agreement": c.agreement,
            "first_position": None if c.first is None else [c.first.prompt, c.first.position],
            "activations_compared": c.activations,
            "first_activation": None
            if c.activation is None
            else {"name": c.activation.activation, "prompt": c.activation.prompt, "position": c.activation.position},
            "mistakes": c.mistakes,
            "nearest": c.nearest,
            "mistakes_tried": c.tried,
            "mutated_side": c.mutated_side or None,
            "notes": c.notes,
            "same": c.same,
        },
        indent=2,
    )


def as_text(c: Comparison) -> str:
    """A few lines."""
    lines = [
        f"A: {c.a}",
        f"B: {c.b}",
        f"{len(c.lens)} {'prompt' if len(c.lens) == 1 else 'prompts'} of {', '.join(map(str, c.lens))} ids",
    ]
    told = f"log-probs: {c.compared} positions of up to {c.tokens} tokens compared, largest difference {c.largest:.2e}"
    if c.budget is not None and c.budget.logprobs > 0:
        u = c.budget
        told += f": {c.largest / u.logprobs:.3g} times the error budget of {u.of} ({u.logprobs:.1e}; "
        told += f"limit {c.limit / u.logprobs:.3g} times)"
    else:
        why = "rounding changes nothing" if c.budget else "no model is available to measure an error budget"
        told += f" (limit {c.limit:.0e}: {why})"
    lines.append(told)
    if c.agreement is not None:
        lines.append(f"most likely token the same at {c.agreement:.1%} of the positions")
    if c.first is not None:
        lines.append(f"log-probs part first in prompt {c.first.prompt} at position {c.first.position}")
    if c.activation is not None:
        d = c.activation
        lines.append(f"activations part first at {d.activation}, prompt {d.prompt}, position {d.position}")
    elif c.activations:
        lines.append(f"activations: {c.activations} compared, none parts")
    other = "B" if c.mutated_side == "A" else "A"
    for name, error in sorted(c.mistakes.items(), key=lambda pair: pair[1]):
        lines.append(f"{other} is {c.mutated_side} with {name}: {mutants.MUTANTS[name].what} ({error:.1e} is left)")
    if c.nearest is not None:
        near = f"the nearest, {c.nearest[0]}, leaves {c.nearest[1]:.1e} of {c.largest:.1e}"
        lines.append(f"none of {c.tried} mutants of {c.mutated_side} gives {other}'s numbers; {near}")
    lines += [f"note: {note}" for note in c.notes]
    lines.append("the same" if c.same else "DIFFERENT")
    return "\n".join(lines)
