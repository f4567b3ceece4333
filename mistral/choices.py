"""The next token of each request, chosen from its logits by its own params and random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mistral.logprobs import logprobs, most_likely
from mistral.request import Request
from mistral.sampling import LogitChanges, sample_each


class Choice(NamedTuple):
    """A token, its log-probability (NaN: the logits are), and those of the most likely ones, if asked for."""

    token: int
    logprob: float
    top: dict[int, float]


def choices(logits: Tensor, requests: Sequence[Request]) -> list[Choice]:
    """What each request goes on with; its random number is used up.

    Args:
        logits: [R, V], a row for each request.
    """
    draws = [0.0 if request.rng is None else request.rng() for request in requests]
    uniform = torch.tensor(draws, dtype=torch.float32, device=logits.device)
    chosen = sample_each(_changed(logits, requests), uniform, [request.params for request in requests])
    return _described(logits, chosen, requests)


def choices_ahead(logits: Tensor, begins: Mapping[Request, int]) -> dict[int, Choice]:
    """`choices` for requests whose next tokens were guessed, of all rows that count at once, by row.

    A row counts if all guesses before it are right. Nothing unless every request takes the most likely token of the
    model's own logits: only then it is known which rows those are, whatever becomes of the tokens.

    Args:
        logits: [R, V], for each request one row more than it has guesses.
        begins: the first row of each request.
    """
    if any(not request.params.greedy or request.params.changes_logits for request in begins):
        return {}
    most_likely_ids = logits.argmax(-1)
    ids, rows, requests = most_likely_ids.tolist(), list[int](), list[Request]()
    for request, first in begins.items():
        right = 0
        while right < len(request.guesses) and request.guesses[right] == ids[first + right]:
            right += 1
        rows += range(first, first + right + 1)
        requests += [request] * (right + 1)
    return dict(zip(rows, _described(logits[rows], most_likely_ids[rows], requests), strict=True))


def _described(logits: Tensor, chosen: Tensor, requests: Sequence[Request]) -> list[Choice]:
    of_chosen = logprobs(logits, chosen[:, None]).squeeze(-1)
    tops = most_likely(logits, [request.params.top_logprobs for request in requests])
    return [Choice(*one) for one in zip(chosen.tolist(), of_chosen.tolist(), tops, strict=True)]


def _changed(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """The logits to choose from: [R, V], in which some requests' rows differ from what the model gave."""
    rows = [row for row, request in enumerate(requests) if request.params.changes_logits]
    if not rows:
        return logits
    changed = logits.clone()
    for row in rows:
        request = requests[row]
        if request.changes is None:
            request.changes = LogitChanges(request.params, request.prompt_ids, logits.shape[-1], logits.device)
        changed[row] = request.changes(logits[row], request.output_ids)
    return changed
