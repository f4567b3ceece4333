"""From one distribution to one token.

What a request asks for changes its logits first, in vLLM's order: logit_bias is added; logits_processor may do
anything; logits of tokens in prompt or output are divided by repetition_penalty where they are positive, else
multiplied by it; frequency_penalty times the number of times that the output has a token, and presence_penalty if it
has it at all, are subtracted (the penalties of https://platform.openai.com/docs/guides/text-generation).

Filters follow, in this order, on the tempered probabilities: top_k keeps the k most likely tokens; top_p
(nucleus sampling, arXiv 1904.09751) keeps a token if the more likely ones kept so far sum to at
most p of what top_k left; min_p keeps those at least p times as likely as the most likely one. Ties go to
the lowest id. The draw is by inverse cumulative distribution from one uniform number, so it is the
same on every device up to rounding.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from mistral.sampling_params import SamplingError, SamplingParams
from mistral.util.errors import short_repr

HEAD = 256  # tokens among which one is looked for first
MANY = 16  # times HEAD: a vocabulary that takes long to sort


def sample(logits: Tensor, uniform: Tensor, params: SamplingParams) -> Tensor:
    """Choose a token for each row.

    Args:
        logits: [R, V] fp32 or float64.
        uniform: [R] numbers in [0, 1), one a row, on the same device; not read if greedy.
        params: of all rows; its filters and temperature are used, nothing else.

    Returns:
        [R] int64.
    """
    if params.greedy:
        return logits.argmax(-1)
    probs = _tempered(logits, params)
    if probs.device.type != "cpu" or probs.shape[-1] < MANY * HEAD:
        return _draw(*_filtered(*_sorted(probs), params), uniform)
    chosen, known = _draw_from_head(probs, uniform, params)
    if not known.all():
        rest = ~known
        chosen[rest] = _draw(*_filtered(*_sorted(probs[rest]), params), uniform[rest])
    return chosen


def distribution(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The filtered probabilities, most likely first and not renormalised, and their ids: two [R, V]."""
    return _filtered(*_sorted(_tempered(logits, params)), params)


def _tempered(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities in the order of ids."""
    # Subtracting the maximum first keeps a tiny temperature from overflowing; one beyond the dtype
    # would become 0 or inf, and 0 / 0 and inf / inf are NaN.
    limits = torch.finfo(logits.dtype)
    temperature = float(min(max(params.temperature, limits.tiny), limits.max))
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)


def _sorted(probs: Tensor) -> tuple[Tensor, Tensor]:
    found = probs.sort(dim=-1, descending=True, stable=True)
    return found.values, found.indices


def _filtered(probs: Tensor, ids: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Sorted probabilities of which those that the filters leave out are 0."""
    if 0 < params.top_k < probs.shape[-1]:
        probs[:, params.top_k :] = 0
    if params.top_p < 1:
        # The total is the last of the sums: sum() adds up in another order for other rows and threads.
        cumulative = probs.cumsum(-1)
        probs = probs.masked_fill(cumulative - probs > params.top_p * cumulative[:, -1:], 0)
    if params.min_p > 0:
        probs = probs.masked_fill(probs < params.min_p * probs[:, :1], 0)
    return probs, ids


def _draw(probs: Tensor, ids: Tensor, uniform: Tensor) -> Tensor:
    """The token of each row that a uniform number falls on."""
    cumulative = probs.cumsum(-1)
    return ids.gather(-1, _place(probs, cumulative, cumulative[:, -1:], uniform)).squeeze(-1)


def _place(probs: Tensor, cumulative: Tensor, total: Tensor, uniform: Tensor) -> Tensor:
    """Where a uniform number falls among sorted probabilities: [R, 1]."""
    target = uniform[:, None].to(probs.dtype) * total
    # Count what lies below the target; rounding must not carry it past the last token kept.
    place = torch.minimum((cumulative <= target).sum(-1, keepdim=True), (probs > 0).sum(-1, keepdim=True) - 1)
    return place.clamp(min=0)  # logits that are NaN keep no token; the caller sees it in the log-probs


def _draw_from_head(probs: Tensor, uniform: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """As `_draw`, from the HEAD most likely tokens alone; to sort all of a vocabulary takes as long as a small model.

    Returns:
        The tokens, and of which rows they are what `_draw` would choose: [R] int64, [R] bool.
    """
    head, ids = _head(probs)
    least = head[:, -1:]  # no token that is not in the head is more likely
    in_order = (head > least) | (least == 0)  # of equal ones some may not be in the head
    cumulative = head.cumsum(-1)
    total = probs.cumsum(-1)[:, -1:]  # in the order of ids, in float64 until it is rounded
    ended = least == 0  # whether no other token can be chosen
    if params.top_k:
        if params.top_k > HEAD:
            return ids[:, 0].clone(), torch.zeros(len(ids), dtype=torch.bool)
        head[:, params.top_k :] = 0
        total, ended = cumulative[:, params.top_k - 1 : params.top_k], torch.ones_like(ended)
    out = torch.zeros_like(in_order)
    if params.top_p < 1:
        out |= head.cumsum(-1) - head > params.top_p * total
    kept = head.masked_fill(out, 0)
    if params.min_p > 0:
        kept = kept.masked_fill(kept < params.min_p * kept[:, :1], 0)
    ended |= kept[:, -1:] == 0
    cumulative = kept.cumsum(-1)
    whole = torch.where(ended, cumulative[:, -1:], total)
    place = _place(kept, cumulative, whole, uniform)
    if params.top_p == 1 and params.min_p == 0:  # else it is not known how many of the others are left
        ended |= uniform[:, None].to(probs.dtype) * whole < cumulative[:, -1:]
    return ids.gather(-1, place).squeeze(-1), (ended & in_order.gather(-1, place)).squeeze(-1)


def _head(probs: Tensor) -> tuple[Tensor, Tensor]:
    """The HEAD largest of each row and their ids; of equal ones the lowest id comes first."""
    ids = probs.topk(HEAD).indices.sort(dim=-1).values
    found = probs.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return found.values, ids.gather(-1, found.indices)


def sample_each(logits: Tensor, uniform: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """`sample`, each row with its own params; rows whose params filter alike are sampled together."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for row, its in enumerate(params):
        groups.setdefault(its.filters, []).append(row)
    if len(groups) == 1:
        return sample(logits, uniform, params[0])
    chosen = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    for rows in groups.values():
        chosen[rows] = sample(logits[rows], uniform[rows], params[rows[0]])
    return chosen


class LogitChanges:
    """What a request changes in its logits before a token is chosen: biases, its processor, penalties.

    Args:
        params: of the request.
        prompt_ids: its prompt.
        vocab_size, device: of the logits.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int, device: torch.device | str
    ) -> None:
        self._params = params
        self._prompt_ids = list(prompt_ids) if params.logits_processor is not None else []
        if params.logit_bias:
            ids, biases = zip(*params.logit_bias, strict=True)
            self._biased = torch.tensor(ids, device=device)
            self._biases = torch.tensor(biases, dtype=torch.float64)
        if params.penalized:
            self._counts = torch.zeros(vocab_size, dtype=torch.int64, device=device)  # in the output
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)  # in prompt or output
            self._seen[torch.tensor(sorted(set(prompt_ids)), device=device)] = True
        self._counted = 0

    def __call__(self, logits: Tensor, output_ids: list[int]) -> Tensor:
        """The logits to choose from, [V] as given; those given stay as they are.

        Args:
            output_ids: what was generated so far; it may only have grown since the last call.

        Raises:
            SamplingError: the processor gave something else than logits.
        """
        params, logits = self._params, logits.clone()
        if params.logit_bias:
            logits[self._biased] += self._biases.to(logits)
        if params.logits_processor is not None:
            logits = self._processed(logits, output_ids)
        if params.penalized:
            for token in output_ids[self._counted :]:
                self._counts[token] += 1
                self._seen[token] = True
            self._counted = len(output_ids)
            penalty = params.repetition_penalty
            logits = torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
            counts = self._counts.to(logits.dtype)
            logits = logits - params.frequency_penalty * counts - params.presence_penalty * counts.clamp(max=1)
        return logits

    def _processed(self, logits: Tensor, output_ids: list[int]) -> Tensor:
        assert self._params.logits_processor is not None
        shape, dtype = logits.shape, logits.dtype
        finite = logits.amax().isfinite()  # if not, the model is at fault, and the log-probs show it
        changed = self._params.logits_processor(self._prompt_ids, output_ids, logits)
        if not isinstance(changed, Tensor) or changed.shape != shape:
            what = f"shape {list(changed.shape)}" if isinstance(changed, Tensor) else short_repr(changed)
            raise SamplingError(f"logits_processor gave {what}; it must return logits of shape {list(shape)}")
        if finite and not changed.amax().isfinite():
            raise SamplingError("logits_processor gave logits that are NaN or infinite, or leave no token to choose")
        return changed.to(device=logits.device, dtype=dtype)


class RequestRng:
    """A request's own stream of random numbers: made from its seed and its sample number, one number a token.

    What else is in the batch, and the request's place in it, never move it.

    Args:
        seed: of the request.
        sample: its number among the n samples of one prompt.
    """

    def __init__(self, seed: int, sample: int = 0) -> None:
        digest = hashlib.sha256(f"{seed}:{sample}".encode()).digest()
        self._generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        self._ahead: deque[float] = deque()  # drawn, and not yet taken

    def __call__(self) -> float:
        """The next number in [0, 1)."""
        self.ahead(1)
        return self._ahead.popleft()

    def ahead(self, count: int) -> list[float]:
        """The next numbers, which stay the next ones."""
        while len(self._ahead) < count:
            number = torch.rand((), generator=self._generator, dtype=torch.float64, device="cpu").item()
            self._ahead.append(number)
        return list(self._ahead)[:count]
