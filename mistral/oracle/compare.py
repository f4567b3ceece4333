"""Two sides, where they differ, and which mutant explains it: `python -m main compare A B`.

Differences count from where rounding no longer explains them. Where both sides tell activations, the first layer,
position and operation that differ are named. Where one side's model is available, it is run again with each
mistake, and those that give the other side's numbers are named.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mistral.logprobs import logprobs
from mistral.oracle import mutants
from mistral.oracle.comparison import Causes, Comparison, Differences, Divergence, Limits
from mistral.oracle.inputs import inside, prompts_for
from mistral.oracle.metrics import LIMITS, Progress, place, short
from mistral.oracle.outputs import ErrorBudget, Outputs
from mistral.oracle.pack import PackError, folder_of
from mistral.oracle.sides import FolderSide, PackSide, ServerSide, Side, known
from mistral.util.errors import UsageError

# Where no model and no budget is available: what is rounding in sums of ordinary length, and no mistake.
UNKNOWN = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}

# Each position is judged by the largest error of the budget, of which it may have this many times the limit.
SINGLE = 1.5

# What others' quantized weights of so many bits may differ by: times what ours do. Types of as many bits differ among
# themselves, and what they change at the worst of few positions is a matter of luck.
DECLARED = 3.0

# A mistake explains a difference if it leaves at most this share of it, and at most so many times the limit.
SHARE, SLACK = 0.02, 8.0


def compare(
    a: Side,
    b: Side,
    *,
    compute: torch.dtype = torch.float32,
    quantized: str | None = None,
    prompts: Sequence[Tensor] | None = None,
    full: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two sides.

    Args:
        compute: dtype of the arithmetic of the side that is not the truth, or of the weights that were rounded to it.
        quantized: "int8" or "int4", if the weights of a side are rounded to so few bits, in whatever way: differences
            count from what such a rounding does not explain.
        prompts: what to ask where neither side is bound to prompts of its own; None takes random ones.
        full: see `reading.prompts_for`.
        seed: of random prompts.
        progress: told how much of what is being done is done, and how much of that there is: the truth about a side,
            its error budget, the mistakes that are tried, each from its beginning.

    Raises:
        UsageError: the sides speak of different prompts, or have no shape in common.
        ValueError: another subclass: a side cannot be had.
    """
    asked = _prompts(a, b, prompts, full, seed)
    _check_vocabularies(a, b, asked)
    _lend_tokenizer(a, b)
    lens = [len(p) for p in asked]
    for one in (a, b):
        if isinstance(one, FolderSide):
            one.progress = progress
    found_a, found_b = a.evidence(asked), b.evidence(asked)
    ours, side = _ours(a, b)
    limits = _limits(a, b, ours, found_a if side == "A" else found_b, asked, compute, quantized)
    apart = _differences(a, b, found_a, found_b, limits, lens)
    causes, notes = Causes(), [] if ours is None else [note for note in [inside(ours.found.args, lens)] if note]
    if apart.first or apart.activation:
        if ours is not None:
            left = _explained(ours, found_b if side == "A" else found_a, asked, progress)
            causes = _causes(left, apart.largest, limits.logprobs, side)
        in_reverse = side == "B" and isinstance(a, PackSide)
        unexplained = not causes.mistakes and compute == torch.float32 and quantized is None
        notes += _advice(ours is not None, in_reverse, unexplained)
    return Comparison(a.name, b.name, tuple(lens), apart, limits, causes, tuple(notes))


def _check_vocabularies(a: Side, b: Side, prompts: Sequence[Tensor]) -> None:
    """Refuse sides of different vocabularies, and prompts with ids outside of them."""
    sizes = [s.args.vocab_size for s in (a, b) if s.args is not None]
    if len(set(sizes)) > 1:
        raise UsageError(f"the vocabularies differ: {a.name} and {b.name} know {sizes[0]} and {sizes[1]} tokens")
    if any(int(p.max()) >= min(sizes, default=2**62) or int(p.min()) < 0 for p in prompts):
        raise UsageError(f"a prompt has an id outside the vocabulary of {min(sizes)}")


def _lend_tokenizer(a: Side, b: Side) -> None:
    """A server may take texts only: it is asked with the texts that the other side's tokenizer has for ids."""
    for one, other in ((a, b), (b, a)):
        if isinstance(one, ServerSide) and isinstance(other, FolderSide):
            one.server.tokenizer = other.tokenizer


def _advice(mutable: bool, in_reverse: bool, unexplained_in_fp32: bool) -> Iterator[str]:
    """Notes on a difference, for whoever looks for its cause."""
    if not mutable:
        yield "no model is available to mutate: give a folder, or a pack with weights, as one side"
        return
    if in_reverse:
        yield "the mutants are those of B, because A has no weights: what B does wrong is reported in reverse"
    if unexplained_in_fp32:
        yield "if a side computes in 16 bits, say so: --dtype bfloat16; if its weights are quantized: --quantized int4"


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


def _limits(
    a: Side,
    b: Side,
    ours: FolderSide | None,
    true: Outputs,
    prompts: Sequence[Tensor],
    compute: torch.dtype,
    quantized: str | None,
) -> Limits:
    """The most that is no mistake's; `true` is what ours says, if there is one."""
    budget = _budget(a, b, ours, prompts, compute)
    # Where keys are rounded more coarsely than sums, the order of sums is no matter: the limit is that of 16 bits.
    coarse = ours is not None and ours.cache not in (None, compute)
    times = SINGLE * LIMITS[torch.bfloat16 if coarse else compute]
    limit = UNKNOWN[compute] if budget is None else max(times * budget.logprobs, _told(compute))
    if not limit < torch.inf:
        raise UsageError(
            f"rounding to {short(compute)} makes numbers of this model infinite, so nothing can be told apart from it"
        )
    prints = {} if budget is None else {name: times * x for name, x in budget.prints.items()}
    if quantized is None:
        return Limits(limit, prints, budget)
    if ours is None:
        raise UsageError("what quantized weights change is measured on a model: give a folder, or a pack with weights")
    few = _in_few_bits(ours, true, prompts, quantized)
    prints = {name: prints.get(name, 0.0) + DECLARED * x for name, x in few.prints.items()}
    return Limits(limit + DECLARED * few.logprobs, prints, few, quantized)


def _in_few_bits(ours: FolderSide, true: Outputs, prompts: Sequence[Tensor], kind: str) -> ErrorBudget:
    """What rounding the weights to so few bits changes."""
    rounded = ours.in_few_bits(prompts, kind)
    apart = (rounded.logprobs - true.logprobs).abs()
    prints = {name: float((x - true.prints[name]).abs().max()) for name, x in rounded.prints.items()}
    return ErrorBudget(kind, float(apart.square().mean()) ** 0.5, float(apart.max()), prints)


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
            raise UsageError(
                f"one side tells of token {int(a.ids.max())}, but the other has {V} tokens: the vocabularies differ"
            )
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


def _differences(
    a: Side, b: Side, found_a: Outputs, found_b: Outputs, limits: Limits, lens: Sequence[int]
) -> Differences:
    """How far apart what the sides said is.

    Raises:
        UsageError: they said nothing of the same token.
    """
    difference = differences(found_a, found_b)
    if difference.isnan().all():
        raise UsageError(f"{a.name} and {b.name} tell log-probs of no token in common")
    beyond = (difference > limits.logprobs).nonzero().flatten().tolist()
    first = Divergence(None, *place(beyond[0], lens), float(difference[beyond[0]]), limits.logprobs) if beyond else None
    args = a.args or b.args
    shared = [name for name in (known(args, found_a.prints) if args else found_a.prints) if name in found_b.prints]
    return Differences(
        compared=int((~difference.isnan()).sum()),
        tokens=min(len(e.logprobs[0]) for e in (found_a, found_b)),
        largest=float(difference.nan_to_num(nan=0.0, posinf=torch.inf).max()),
        agreement=_agreement(found_a, found_b),
        first=first,
        activation=_first_activation(shared, found_a, found_b, limits, lens),
        activations=len(shared),
    )


def _first_activation(
    shared: Sequence[str], a: Outputs, b: Outputs, limits: Limits, lens: Sequence[int]
) -> Divergence | None:
    for name in shared:
        apart = (a.prints[name] - b.prints[name]).abs().amax(-1)
        most = limits.prints.get(name, limits.logprobs)
        beyond = (~(apart <= most)).nonzero().flatten().tolist()
        if beyond:
            return Divergence(name, *place(beyond[0], lens), float(apart[beyond[0]]), most)
    return None


def _explained(
    ours: FolderSide, other: Outputs, prompts: Sequence[Tensor], progress: Progress | None
) -> dict[str, float]:
    """For each mistake that matters here, the largest difference that is left when ours makes it too."""
    args, lens = ours.found.args, [len(p) for p in prompts]
    model = ours.model()
    tried = [name for name in mutants.MUTANTS if mutants.applies(name, args, lens, ours.adapted)]
    left: dict[str, float] = {}
    for done, name in enumerate(tried, 1):
        making = ours.model(name) if mutants.MUTANTS[name].loads else model
        mistaken = torch.cat(mutants.logits_with(making, list(prompts), name))
        told = ~mistaken.isnan().all(-1)  # a mistake may leave out a prompt's first row
        difference = differences(Outputs(None, logprobs(mistaken), {}, told), other)
        if not difference.isnan().all():
            left[name] = float(difference.nan_to_num(nan=0.0, posinf=torch.inf).max())
        if progress is not None:
            progress(done, len(tried))
    return left


def _causes(left: dict[str, float], largest: float, limit: float, side: str) -> Causes:
    """Which mutants explain a difference, by what each leaves of it."""
    # A model that makes a mistake may round more coarsely than the right one, for which the limit was measured.
    near = max(limit, min(SLACK * limit, SHARE * largest))
    mistakes = {name: error for name, error in left.items() if error <= near}
    nearest = min(left.items(), key=lambda pair: pair[1]) if left and not mistakes else None
    return Causes(mistakes, nearest, len(left), side if left else "")
