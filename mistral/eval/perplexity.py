"""How well a model predicts a text of any length, in the memory of a window and a chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mistral.engine import LOGIT_FLOATS, STEP_TOKENS
from mistral.finite import why_not_finite
from mistral.logprobs import logprobs
from mistral.model import Transformer
from mistral.tokenizer import outside
from mistral.util import memory
from mistral.util.english import counted
from mistral.util.errors import UsageError


@dataclass(frozen=True)
class Score:
    """How a text was predicted.

    Args:
        tokens: that were predicted: all but the first.
        nats: minus the sum of their natural log-probabilities, each given all tokens before it that the windows show.
    """

    tokens: int
    nats: float

    @property
    def perplexity(self) -> float:
        """exp of the nats a token; infinite where that is beyond a float."""
        try:
            return math.exp(self.nats / self.tokens)
        except OverflowError:
            return math.inf


@torch.inference_mode()
def perplexity(
    model: Transformer,
    ids: Sequence[int],
    *,
    chunk_size: int = STEP_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score a text as one sequence.

    The cache holds what the windows show, so memory does not grow with the text, but for layers without a window.
    Log-probabilities are taken in float64 and summed without rounding (`math.fsum`), so the chunks change
    nothing but the last digits.

    Args:
        ids: of the text, bos included; at least two.
        chunk_size: tokens of a step.
        progress: told after each step how many tokens were processed, and how many there are.

    Raises:
        UsageError: fewer than two tokens, an id outside the vocabulary, a chunk of none, or logits that are no
            numbers.
        OutOfMemory: the cache does not fit the memory left.
    """
    if len(ids) < 2:
        raise UsageError(f"{counted(len(ids), 'token')}: there is nothing to predict in fewer than 2")
    if chunk_size < 1:
        raise UsageError(f"chunk_size is {chunk_size}; it must be at least 1")
    if (what := outside(ids, None, model.args.vocab_size)) is not None:
        raise UsageError(f"the text has {what}")
    total = len(ids) - 1
    needed = model.cache_bytes(total)
    memory.require(needed, model.device, f"keys and values of {total} positions", "give a shorter text")
    cache = model.make_cache(1, total)
    rows = max(1, LOGIT_FLOATS // model.args.vocab_size)
    sums: list[float] = []
    for first in range(0, total, chunk_size):
        piece = torch.tensor(ids[first : min(first + chunk_size, total)], device=model.device)
        targets = torch.tensor(ids[first + 1 : first + 1 + len(piece)], device=model.device)
        with model.share_cores():
            h = model.forward_partial(piece, [len(piece)], cache)
            for part, wanted in zip(h.split(rows), targets.split(rows), strict=True):
                sums.append(float(logprobs(model.logits(part), wanted[:, None]).sum()))
        if progress is not None:
            progress(first + len(piece), total)
    nats = -math.fsum(sums)
    if math.isnan(nats):
        raise UsageError(f"the model's logits are NaN: {why_not_finite(model, model.dtype)}")
    return Score(total, nats)
