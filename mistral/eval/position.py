"""How much context helps: the loss on the same tokens of a text, with more and more of what comes before them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mistral.args import ModelArgs
from mistral.engine import STEP_TOKENS
from mistral.logprobs import logprobs
from mistral.model import Transformer
from mistral.util.errors import UsageError

SPAN = 16  # tokens predicted at each place


@dataclass(frozen=True)
class ByContext:
    """The loss against the context.

    Args:
        window: of the layers, as text.
        contexts: tokens before the first of the SPAN tokens that are predicted, ascending.
        losses: mean nats a token at each.
        gains: mean of the loss with the longest context minus that with each, over the same tokens.
        errors: the standard error of each gain, over the places.
        places: how many were measured.
    """

    window: str
    contexts: list[int]
    losses: list[float]
    gains: list[float]
    errors: list[float]
    places: int


def places_in(ids: Sequence[int], count: int, longest: int, seed: int) -> list[int]:
    """Where the predicted tokens begin: random places of a text that have `longest` tokens before them.

    Raises:
        UsageError: the text is too short.
    """
    last = len(ids) - SPAN
    if last < longest:
        raise UsageError(
            f"the text has {len(ids)} tokens; a context of {longest} and {SPAN} tokens to predict need "
            f"{longest + SPAN}: give a longer --filler, or smaller --lengths"
        )
    rng = random.Random(f"position {seed}")
    return sorted(rng.randint(longest, last) for _ in range(count))


@torch.inference_mode()
def by_context(
    model: Transformer,
    ids: Sequence[int],
    contexts: Sequence[int],
    *,
    places: Sequence[int],
    bos: Sequence[int] = (),
    args: ModelArgs | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ByContext:
    """Predict SPAN tokens at each place, given the last 1, 2, ... tokens before it as `contexts` has it.

    Args:
        ids: of the text, without bos.
        contexts: ascending; each counts `bos`, which begins it.
        places: where the predicted tokens begin.
        args: the model's with other windows; None: its own.
        progress: told how many tokens were processed, and how many there are.

    Raises:
        UsageError: contexts that do not ascend, or do not fit before a place.
    """
    args = model.args if args is None else args
    if sorted(set(contexts)) != list(contexts) or contexts[0] <= len(bos):
        raise UsageError(f"contexts must ascend, from {len(bos) + 1} at least")
    if not places or min(places) < contexts[-1] or max(places) + SPAN > len(ids):
        raise UsageError(f"the places must have {contexts[-1]} tokens before them and {SPAN} after")
    losses = []  # of each context, at each place
    done, total = 0, len(places) * sum(context + SPAN for context in contexts)
    for context in contexts:
        each = []
        for place in places:
            text = [*bos, *ids[place - context + len(bos) : place + SPAN]]
            each.append(_loss(model, args, text, context))
            done += len(text)
            if progress is not None:
                progress(done, total)
        losses.append(each)
    by_place = torch.tensor(losses, dtype=torch.float64)
    gains = by_place[-1] - by_place
    errors = gains.std(-1, correction=min(1, len(places) - 1)) / math.sqrt(len(places))
    return ByContext(
        args.window_text,
        list(contexts),
        by_place.mean(-1).tolist(),
        gains.mean(-1).tolist(),
        errors.tolist(),
        len(places),
    )


def _loss(model: Transformer, args: ModelArgs, ids: Sequence[int], context: int) -> float:
    """Mean nats of the tokens from `context` on."""
    cache = model.make_cache(1, len(ids), args)
    inputs = list(ids[:-1])
    kept = []
    for first in range(0, len(inputs), STEP_TOKENS):
        piece = torch.tensor(inputs[first : first + STEP_TOKENS], device=model.device)
        h = model.forward_partial(piece, [len(piece)], cache)
        kept.append(h[max(0, context - 1 - first) :])
    targets = torch.tensor(list(ids[context:]), device=model.device)
    with model.share_cores():
        found = logprobs(model.logits(torch.cat(kept)), targets[:, None])
    return -float(found.mean())
