"""Every way of running a model available, on its own weights, against the truth: `python -m main verify FOLDER`.

All variants go through layer i before layer i + 1 is read, so the peak is one layer's weights in two dtypes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mistral.args import ModelArgs
from mistral.attention import Attend
from mistral.backends import BACKENDS
from mistral.backends.varlen import VarlenAttention
from mistral.fast.kernels import KernelsUnavailable, library
from mistral.formats.folder import Folder
from mistral.formats.gguf import multiplied_as_they_are
from mistral.logprobs import logprobs
from mistral.oracle import arrays
from mistral.oracle.inputs import WeightReader, random_prompts, through
from mistral.oracle.layerwise import (
    DecodeRunner,
    LayerwiseRunner,
    LibraryRunner,
    OneFileRunner,
    TransformersRunner,
    batched,
    chunked,
    one_file_ref,
    stepwise,
    whole,
)
from mistral.oracle.metrics import LIMITS, LOGITS, Errors, ErrorStats, Progress, Verdict, judge, short, table
from mistral.oracle.truth import Truth, error_budget, num_draws, scale_of_rounding
from mistral.parameters import OUTPUT
from mistral.util.threads import Sharing
from mistral.window import QUERY_BLOCK

WINDOW = 64  # in place of wider ones, so that short prompts roll
LENS = (136, 1, 9, 40)  # the longest rolls a buffer of that window, 64 + 63 slots
CHUNK = 48
Dtypes = tuple[torch.dtype, torch.dtype]  # of weights, of the arithmetic
CACHES = (torch.float16, torch.bfloat16, torch.int8)  # that keys and values may be kept in beside fp32 arithmetic
Rounding = tuple[torch.dtype | None, torch.dtype, torch.dtype | None]  # see `_rounding`


@dataclass
class Variant:
    """One way of running the model.

    Args:
        name: which tokens come together, or whose model it is.
        attention: the backend.
        dtypes: of weights and arithmetic.
        stream: the prompts on their way through it.
        device: where.
        cache: dtype of its keys and values; None: it has no cache.
    """

    name: str
    attention: str
    dtypes: Dtypes
    stream: LayerwiseRunner
    device: str = "cpu"
    cache: torch.dtype | None = None


@dataclass(frozen=True)
class Row:
    """What was found of a variant.

    Args:
        window: the windows it ran with, human-readable.
        budget: the error budget of its dtypes.
    """

    name: str
    attention: str
    dtypes: Dtypes
    device: str
    cache: torch.dtype | None
    window: str
    errors: Errors
    budget: Errors
    verdict: Verdict

    @property
    def overflows(self) -> bool:
        """Whether rounding alone takes the model's numbers beyond the dtype."""
        return self.budget.largest == float("inf")


@dataclass(frozen=True)
class Report:
    """What was found.

    Args:
        tensors: how many the folder has; all have the shapes that were asked for, and finite numbers.
        lens: of the prompts.
        rows: the variants.
        notes: what was not available, a sentence each.
    """

    tensors: int
    lens: tuple[int, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def passes(self) -> bool:
        return all(row.verdict.passes for row in self.rows)


def verify(
    found: Folder,
    *,
    full: bool = False,
    lens: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Run every variant available over the same random prompts, and compare each with the truth.

    Args:
        full: prompts that roll the model's own window, rather than one of `WINDOW` in its place.
        lens: of the prompts, at least 1 each; None takes `LENS`.
        seed: of the prompts.
        progress: told how much of the work is done, and how much there is.

    Raises:
        UsageError: a weight that is not finite.
        WeightsError: a file that cannot be read.
    """
    lens = _lens(found.args, full) if lens is None else list(lens)
    prompts = random_prompts(found.args, lens, seed)
    groups = [found.args]
    if not full and any(w is not None and w > WINDOW for w in found.args.windows):
        groups.append(narrowed(found.args))
    notes = [*_about(found, len(groups) > 1), *_not_at_hand()]
    reading = WeightReader(found)
    stored = reading.get(OUTPUT).dtype
    each = [(args, _variants(args, prompts, stored)) for args in groups]
    for _, variants in each[1:]:  # what has no buffer does not roll
        variants[:] = [v for v in variants if v.name not in ("whole", "batched")]
    # Each stream, the truth and the budgets included, takes a step a layer, one before and one after.
    keys = [{_rounding(reading, x) for x in v} for _, v in each]
    streams = sum(
        len(v) + 1 + sum(num_draws(prompts, k[2]) for k in its) for (_, v), its in zip(each, keys, strict=True)
    )
    total = streams * (found.args.n_layers + 2) - len(each)
    steps = itertools.count(1)

    def step() -> None:
        if progress is not None:
            progress(next(steps), total)

    rows = [row for args, variants in each for row in _compare(reading, args, prompts, variants, step)]
    beyond = dict.fromkeys(short(row.dtypes[1]) for row in rows if row.overflows)
    notes += [
        "fp64 is measured by the error budget of fp32, which cannot hold this model's numbers"
        if dtype == "fp64"
        else f"{dtype} cannot hold this model's numbers: they overflow however it is computed"
        for dtype in beyond
    ]
    return Report(len(found.tensors), tuple(lens), tuple(rows), tuple(notes))


def _about(found: Folder, rolls_narrowed: bool) -> list[str]:
    """What should be known about how a folder is verified, a sentence each."""
    notes = []
    if rolls_narrowed:
        notes.append(f"rolled with windows of {WINDOW} in place of wider ones; --full rolls the model's own")
    elif all(w is None for w in found.args.windows):
        notes.append("no layer has a window: nothing rolls")
    meant = "taken as the fp32 numbers that they mean, not as the kernels compute"
    if found.quant is not None:
        notes.append(f"weights in {found.quant} are {meant}")
    if multiplied_as_they_are(found.weights, found.args):
        notes.append(f"blocks of few bits are {meant}")
    return notes


def _lens(args: ModelArgs, full: bool) -> list[int]:
    """Of the prompts; with `full`, the longest goes on for a while after the widest window has rolled."""
    widest = max((w for w in args.windows if w is not None), default=0)
    return [max(LENS[0], widest + QUERY_BLOCK + 32), *LENS[1:]] if full else list(LENS)


def narrowed(args: ModelArgs) -> ModelArgs:
    """The shape with windows of at most WINDOW; layers without one stay without."""
    return dataclasses.replace(args, sliding_window=tuple(w and min(w, WINDOW) for w in args.windows))


def _compare(
    reading: WeightReader, args: ModelArgs, prompts: Sequence[Tensor], variants: list[Variant], step: Callable[[], None]
) -> list[Row]:
    """Truth, budgets and variants through all layers together."""
    budgets = list(dict.fromkeys(_rounding(reading, v) for v in variants))
    truth = Truth(args, prompts)
    # What is measured together, and the dtype of the weights it is given; None: as they are stored.
    measured: list[tuple[Sequence[LayerwiseRunner], torch.dtype | None]] = [
        *((error_budget(args, prompts, *key, exact=truth), None) for key in budgets),
        *(([v.stream], v.dtypes[0]) for v in variants),
    ]
    streams = [(truth, None), *((stream, dtype) for group, dtype in measured for stream in group)]
    for _ in through(reading, streams, args.n_layers):
        step()
    norm, output = reading.get("norm.weight"), reading.get(OUTPUT)
    block, sharing = max(1, LOGITS // args.vocab_size), Sharing()
    true = [logprobs(logits) for logits in truth.head(norm, output, block)]
    errors_of: list[Errors] = []
    for group, dtype in measured:
        measure = ErrorStats()
        last, product = (norm, output) if dtype is None else (norm.to(dtype), output.to(dtype))
        for stream in group:
            with sharing():
                for want, logits in zip(true, stream.head(last, product, block), strict=True):
                    measure.add(want, logits)
            step()
        errors_of.append(measure.errors())
    budget_of = dict(zip(budgets, errors_of, strict=False))
    lens = [len(p) for p in prompts]
    rows = []
    for v, errors in zip(variants, errors_of[len(budgets) :], strict=True):
        key = _rounding(reading, v)
        budget = budget_of[key].scaled(scale_of_rounding(v.dtypes[1]))
        # Where keys are rounded more coarsely than sums, the order of sums is no matter: the limit is that of 16 bits.
        limit = LIMITS[v.dtypes[1] if key[2] is None else torch.bfloat16]
        verdict = judge(errors, budget, limit, lens)
        rows.append(Row(v.name, v.attention, v.dtypes, v.device, v.cache, args.window_text, errors, budget, verdict))
    return rows


def _rounding(reading: WeightReader, variant: Variant) -> Rounding:
    """What an error budget of a variant rounds to: weights (None: not at all), results, and keys (None: as results).

    Those that round alike share one: what is stored in bf16 is the same in fp32, and float64 is measured by fp32.
    """
    weights, compute = variant.dtypes
    cache = None if variant.cache in (None, compute) else variant.cache
    return None if reading.fit(weights) else weights, torch.float32 if compute == torch.float64 else compute, cache


def _variants(args: ModelArgs, prompts: Sequence[Tensor], stored: torch.dtype) -> list[Variant]:
    """What is available: one_file_ref, transformers, and ours in every schedule, backend and dtype. Neighbours share
    a dtype of weights."""
    narrow = min(stored, torch.float32, key=lambda dtype: dtype.itemsize)
    fp32 = (torch.float32, torch.float32)
    made: list[Variant] = []
    if args.moe is None and (module := one_file_ref()) is not None:  # it has dense models alone
        made.append(Variant("one_file_ref", "its own", fp32, OneFileRunner(module, args, prompts, torch.float32)))
    if args.moe is None and importlib.util.find_spec("transformers") is not None:
        made.append(Variant("transformers", "eager", fp32, TransformersRunner(args, prompts, torch.float32)))

    def ours(*given: Any, **named: Any) -> None:
        made.append(_ours(args, prompts, *given, **named))

    sdpa, eager = BACKENDS["sdpa"](), BACKENDS["eager"]()
    for name in ("whole", "batched", "chunked", "stepwise"):
        ours(name, "sdpa", sdpa, fp32)
    ours("batched", "eager", eager, fp32)
    ours("stepwise", "eager", eager, fp32)
    if has_kernels():
        ours("stepwise", "sdpa", sdpa, (narrow, torch.float32), fast=True)
    for cache in CACHES:
        ours("stepwise", "sdpa", sdpa, fp32, cache=cache)
        if has_kernels():
            ours("stepwise", "sdpa", sdpa, (narrow, torch.float32), fast=True, cache=cache)
    ours("batched", "eager", eager, (torch.float64, torch.float64))
    half = stored if stored.itemsize == 2 else torch.bfloat16
    for name in ("batched", "stepwise"):
        ours(name, "sdpa", sdpa, (half, half))
    for device, attention, attend, dtype in _on_gpus(args.head_dim, half):
        for name in ("batched", "stepwise"):
            ours(name, attention, attend, (dtype, dtype), device)
    return made


def _ours(
    args: ModelArgs,
    prompts: Sequence[Tensor],
    name: str,
    attention: str,
    attend: Attend,
    dtypes: Dtypes,
    device: str = "cpu",
    fast: bool = False,
    cache: torch.dtype | None = None,
) -> Variant:
    """The library's own way of a schedule.

    Args:
        fast: by the kernels.
        cache: dtype of keys and values, where it is another than that of the arithmetic.
    """
    lens = [len(p) for p in prompts]
    schedule, cached = {
        "whole": (whole(lens), False),
        "batched": (batched(lens), False),
        "chunked": (chunked(lens, CHUNK), True),
        "stepwise": (stepwise(lens), True),
    }[name]
    weights, compute = dtypes
    runner = DecodeRunner if fast else LibraryRunner
    how: dict[str, Any] = {
        "weights": weights,
        "compute": compute,
        "cached": cached,
        "device": device,
        "kernels": fast,
        "cache": cache,
    }
    stream = runner(args, prompts, schedule, attend, **how)
    kept = (cache or compute) if cached else None
    return Variant(name, f"{attention}, kernels" if fast else attention, dtypes, stream, device, kept)


def has_kernels() -> bool:
    """Whether the kernels of `fast` can be built here."""
    try:
        library()
    except KernelsUnavailable:
        return False
    return True


def _on_gpus(head_dim: int, half: torch.dtype) -> Iterator[tuple[str, str, Attend, torch.dtype]]:
    """Device, name and function of each attention backend that runs on a GPU here, and the dtypes to try it in."""
    devices = ["cuda"] if torch.cuda.is_available() else ["mps"] if torch.backends.mps.is_available() else []
    for device, (name, make) in itertools.product(devices, BACKENDS.items()):
        for dtype in (half, torch.float32):
            try:
                attend = make()
                if isinstance(attend, VarlenAttention):
                    attend.prove(torch.device(device), dtype, head_dim)
            except Exception:  # a missing library, an old one, no kernel: it is not available
                continue
            yield device, name, attend, dtype


def _not_at_hand() -> list[str]:
    missing = []
    if one_file_ref() is None:
        missing.append("one_file_ref.py, which is in the repository and not in the installed package")
    if importlib.util.find_spec("transformers") is None:
        missing.append("transformers (pip install transformers)")
    if not has_kernels():
        missing.append("the kernels, which want a C compiler")
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        missing.append("a GPU, and with it flash and xformers")
    return [f"not available: {'; '.join(missing)}"] if missing else []


def as_json(report: Report) -> str:
    """One object."""
    rows = [
        {
            "name": row.name,
            "attention": row.attention,
            "device": row.device,
            "weights": short(row.dtypes[0]),
            "compute": short(row.dtypes[1]),
            "cache": None if row.cache is None else short(row.cache),
            "window": row.window,
            "max_delta_logprob": row.errors.largest,
            "rms_delta_logprob": row.errors.rms,
            "kl": row.errors.kl,
            "top1_agreement": row.errors.agreement,
            "budget_max": row.budget.largest,
            "budget_rms": row.budget.rms,
            "times_budget": row.verdict.ratio,
            "limit": row.verdict.limit,
            "first_beyond": row.verdict.first,
            "passes": row.verdict.passes,
        }
        for row in report.rows
    ]
    facts = {"tensors": report.tensors, "prompts": report.lens, "notes": report.notes, "passes": report.passes}
    return arrays.as_json({**facts, "rows": rows}, indent=2)


def as_text(report: Report) -> str:
    """A table, and what it means."""
    lines = [
        f"{report.tensors} tensors, shapes as they should be, all numbers finite; "
        f"prompts of {_listed(report.lens)} ids",
        "",
    ]
    titles = ("", "window", "weights/compute/cache", "attention", "max |dlogp|", "KL", "top-1", "x budget", "first", "")
    lines += table([titles, *map(_cells, report.rows)], right=(4, 5, 6, 7, 8))
    failed = sum(not row.verdict.passes for row in report.rows)
    lines += ["", *(f"note: {note}" for note in report.notes)]
    lines.append(f"{failed} of {len(report.rows)} fail" if failed else f"all {len(report.rows)} pass")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    e, v = row.errors, row.verdict
    return (
        row.name if row.device == "cpu" else f"{row.name}, {row.device}",
        row.window,
        f"{short(row.dtypes[0])}/{short(row.dtypes[1])}/{'none' if row.cache is None else short(row.cache)}",
        row.attention,
        f"{e.largest:.1e}",
        f"{e.kl:.1e}",
        f"{e.agreement:.1%}",
        f"{v.ratio:.1f} of {v.limit:.3g}",
        "none" if v.first is None else f"{v.first[0]}:{v.first[1]}",
        "pass" if v.passes else "FAIL",
    )


def _listed(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
