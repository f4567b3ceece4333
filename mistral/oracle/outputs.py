"""What is said of prompts: log-probs and fingerprints of activations; the truth's, and what rounding does to both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mistral.args import ModelArgs
from mistral.logprobs import logprobs
from mistral.oracle.inputs import WeightReader, through
from mistral.oracle.metrics import LOGITS, Errors, ErrorStats, Progress, short
from mistral.oracle.truth import Truth, error_budget, scale_of_rounding
from mistral.parameters import OUTPUT
from mistral.util.threads import Sharing

PRINTS = 8  # numbers in a fingerprint


@dataclass(frozen=True)
class Outputs:
    """What somebody says of prompts. Rows are prompt after prompt, position after position: T of them.

    Args:
        ids: [T, k] tokens whose log-probs after each position are known, -1 for none; None where all are.
        logprobs: [T, k], or [T, V] of all tokens in order; float64. What is no number differs from everything.
        prints: fingerprints [T, PRINTS] of activations, by name; none where only log-probs are known.
        rows: [T] bool, of which rows anything is said; None: of all that have an id.
    """

    ids: Tensor | None
    logprobs: Tensor
    prints: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None

    @property
    def told(self) -> Tensor:
        """[T] bool, of which rows anything is said."""
        if self.rows is not None:
            return self.rows
        return torch.ones(len(self.logprobs), dtype=torch.bool) if self.ids is None else (self.ids >= 0).any(-1)


@dataclass(frozen=True)
class ErrorBudget:
    """By how much the truth changes where results are rounded and sums are in fp32: see `truth.error_budget`.

    Args:
        of: the dtypes of weights and arithmetic, such as "bf16/fp32".
        rms, logprobs: root mean square and largest difference of log-probs.
        prints: largest difference of each activation's fingerprint.
    """

    of: str
    rms: float
    logprobs: float
    prints: dict[str, float]


def signs(width: int) -> Tensor:
    """[width, PRINTS] of 1 and -1, the same everywhere: bits 0, 4, .. 28 of a hash of each row's number."""
    h = torch.arange(1, width + 1, dtype=torch.int64)
    h = h * 0x9E3779B1 % 2**32
    h = (h ^ h >> 15) * 0x85EBCA77 % 2**32
    h = h ^ h >> 13
    return 1 - 2.0 * (h[:, None] >> torch.arange(0, 4 * PRINTS, 4) & 1).double()


def fingerprint(x: Tensor) -> Tensor:
    """[T, width] activations to [T, PRINTS] float64: sums with changing signs, as large as one activation is."""
    return x.double() @ signs(x.shape[1]) / x.shape[1] ** 0.5


def reference_outputs(
    reading: WeightReader,
    args: ModelArgs,
    prompts: Sequence[Tensor],
    dtypes: Sequence[tuple[torch.dtype, ...]] = (),
    progress: Progress | None = None,
) -> tuple[Outputs, list[ErrorBudget]]:
    """The truth about prompts, and the error budget of each group of dtypes: of weights, of the arithmetic, and of a
    cache that is coarser than it, if there is one.

    The weights are read once, a layer at a time. Log-probs are held for all positions: T x V float64.

    Args:
        progress: told how much of the work is done, and how much there is.
    """
    prints: dict[str, Tensor] = {}
    streams = [Truth(args, prompts, note=lambda name, x: prints.update({name: fingerprint(x)}))]
    rounded: list[tuple[list[Truth], dict[str, float]]] = []
    for pair in dtypes:
        apart: dict[str, float] = {}

        def differs(name: str, x: Tensor, apart: dict[str, float] = apart) -> None:
            # The truth goes through each layer first, so what it made is there.
            apart[name] = max(apart.get(name, 0.0), float((fingerprint(x) - prints[name]).abs().max()))

        rounded.append((error_budget(args, prompts, *pair, exact=streams[0]), apart))
        for stream in rounded[-1][0]:
            stream.note = differs
        streams += rounded[-1][0]
    total = len(streams) * (args.n_layers + 2)
    done = 0
    for done, _ in enumerate(through(reading, [(stream, None) for stream in streams], args.n_layers), 1):
        if progress is not None:
            progress(done, total)
    norm, output = reading.get("norm.weight"), reading.get(OUTPUT)
    rows = max(1, LOGITS // args.vocab_size)
    sharing = Sharing()
    with sharing():
        blocks = list(streams[0].head(norm, output, rows))
        true = [logprobs(logits) for logits in blocks]
        outputs = [fingerprint(logits) for logits in blocks]
        del blocks
    told = []
    for pair, (drawn, apart) in zip(dtypes, rounded, strict=True):
        measure, apart["output"] = ErrorStats(), 0.0
        for stream in drawn:
            with sharing():
                for want, wanted, logits in zip(true, outputs, stream.head(norm, output, rows), strict=True):
                    measure.add(want, logits)
                    apart["output"] = max(apart["output"], float((fingerprint(logits) - wanted).abs().max()))
            done += 1
            if progress is not None:
                progress(done, total)
        scale = scale_of_rounding(pair[1])
        errors: Errors = measure.errors().scaled(scale)
        scaled = {name: x * scale for name, x in apart.items()}
        told.append(ErrorBudget("/".join(map(short, pair)), errors.rms, errors.largest, scaled))
    if progress is not None:
        progress(total, total)
    return Outputs(None, torch.cat(true), {**prints, "output": torch.cat(outputs)}), told
