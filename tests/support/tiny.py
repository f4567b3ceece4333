"""Tiny random models, ragged batches and chunk schedules. All from seeds; no global state is read or changed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mistral.args import ModelArgs
from mistral.attention import Attend
from mistral.cache import RollingBufferCache
from mistral.model import Transformer
from mistral.parameters import parameters
from tests.support.truth import truth

TOLERANCE = 1e-5  # rule 11: fp32 log-probs on the CPU, weights of ordinary scale
POISON = 1e4  # rule 9: what unused slots are filled with

Schedule = list[list[int]]  # for each step, the tokens that each row contributes


def tiny_args(**changes: Any) -> ModelArgs:
    """A small shape with K < H and H * D != dim."""
    shape: dict[str, Any] = {
        "dim": 24,
        "n_layers": 2,
        "head_dim": 8,
        "hidden_dim": 40,
        "n_heads": 4,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "vocab_size": 61,
        "sliding_window": 5,
        "rope_theta": 1e4,
    }
    return ModelArgs(**{**shape, **changes})


def shapes_of(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a model."""
    return {name: parameter.shape for name, parameter in parameters(args).items()}


def tiny_model(
    args: ModelArgs,
    seed: int = 0,
    scale: float = 1.0,
    attend: Attend | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Transformer:
    """A random fp32 model: matrices as nn.Linear draws them (times scale), norms around 1."""
    with torch.device("meta"):
        model = Transformer(args, attend, compute_dtype)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # torch.rand, because torch.randn differs between CPU capability levels.
            uniform = torch.rand(weight.shape, generator=generator) * 2 - 1
            if weight.dim() == 1:
                weight.copy_(1 + 0.25 * uniform)
            elif name == "tok_embeddings.weight" and not args.tied_embeddings:  # tied, it is a matrix too
                weight.copy_(uniform * 3**0.5)
            else:
                weight.copy_(uniform * scale * weight.shape[1] ** -0.5)
    return model


def ragged(lens: Sequence[int], vocab_size: int, seed: int = 0) -> list[Tensor]:
    """Random ids: one [n] int64 tensor for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in lens]


def all_at_once(lens: Sequence[int]) -> Schedule:
    return [list(lens)]


def in_chunks(lens: Sequence[int], chunk: int) -> Schedule:
    """Each row contributes `chunk` tokens a step, less at its end, then none."""
    return [[max(0, min(chunk, n - done)) for n in lens] for done in range(0, max(lens), chunk)]


def prefill_then_decode(lens: Sequence[int], decode: int) -> Schedule:
    """All but `decode` tokens of each row in one step, then one token a step while a row has any."""
    steps = [[max(0, n - decode) for n in lens]]
    return [*steps, *in_chunks([min(n, decode) for n in lens], 1)]


def at_random(lens: Sequence[int], seed: int) -> Schedule:
    """Each row contributes none, one or many tokens to a step, until all are through."""
    rng = random.Random(seed)
    left, steps = list(lens), []
    while any(left):
        step = [min(n, rng.choice((0, 1, 1, 2, rng.randint(0, 9), n))) for n in left]
        left = [n - took for n, took in zip(left, step, strict=True)]
        steps.append(step)
    return steps


def make_cache(
    model: Transformer, rows: int, positions: int = 0, start: int = 0, poison: bool = True
) -> RollingBufferCache:
    """A cache as the model makes them, at `start`, with every slot poisoned."""
    cache = model.make_cache(rows, positions)
    cache.reset(position=start)
    if poison:
        poison_rows(cache)
    return cache


def poison_rows(cache: RollingBufferCache, row: int | None = None) -> None:
    """Fill the storage of a row (of all rows) with what no query may see."""
    for layer in cache.layers:
        for storage in (layer.k, layer.v):
            storage[slice(None) if row is None else row] = POISON


def play(
    model: Transformer, prompts: Sequence[Tensor], schedule: Schedule, cache: RollingBufferCache | None
) -> list[Tensor]:
    """Logits [n, V] of each prompt, fed as the schedule says."""
    done = [0] * len(prompts)
    pieces: list[list[Tensor]] = [[] for _ in prompts]
    for step in schedule:
        assert len(step) == len(prompts)
        ids = [p[d : d + n] for p, d, n in zip(prompts, done, step, strict=True)]
        logits = model.forward(torch.cat(ids), step, cache)
        assert logits.shape == (sum(step), model.args.vocab_size)
        for row, piece in enumerate(logits.split(step)):
            pieces[row].append(piece)
            done[row] += step[row]
    assert done == [len(p) for p in prompts], "the schedule does not feed every token exactly once"
    return [torch.cat(p) for p in pieces]


def whole(model: Transformer, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Logits of each prompt, all in one forward without a cache."""
    return play(model, prompts, all_at_once([len(p) for p in prompts]), None)


def true_logprobs(model: Transformer, prompts: Sequence[Tensor], start: int = 0) -> list[np.ndarray]:
    """The contract's float64 log-probs of each prompt, with the model's own weights."""
    return [truth(model.state_dict(), model.args, p, start)[0] for p in prompts]


def logprobs(logits: Tensor) -> np.ndarray:
    """Log-probs of logits, taken in float64 so that only the model's rounding is measured."""
    return logits.detach().double().log_softmax(-1).numpy()


def distance(got: Sequence[Tensor], want: Sequence[np.ndarray | Tensor]) -> float:
    """Largest difference of log-probs; logits in `want` are converted. inf if anything is not finite."""
    assert len(got) == len(want)
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        a, b = logprobs(g), logprobs(w) if isinstance(w, Tensor) else w
        assert a.shape == b.shape
        worst = max(worst, largest(a - b))
    return worst


def largest(x: np.ndarray) -> float:
    """Largest magnitude; inf if anything is not finite."""
    return (float(np.abs(x).max()) if np.isfinite(x).all() else float("inf")) if x.size else 0.0
