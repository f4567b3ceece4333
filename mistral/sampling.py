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
    probs, ids = distribution(logits, params)
    cumulative = probs.cumsum(-1)
    target = uniform[:, None].to(probs.dtype) * cumulative[:, -1:]
    # Count what lies below the target; rounding must not carry it past the last token kept.
    place = torch.minimum((cumulative <= target).sum(-1), (probs > 0).sum(-1) - 1)
    place = place.clamp(min=0)  # logits that are NaN keep no token; the caller sees it in the log-probs
    return ids.gather(-1, place[:, None]).squeeze(-1)


def distribution(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The filtered probabilities, most likely first and not renormalised, and their ids: two [R, V]."""
    # Subtracting the maximum first keeps a tiny temperature from overflowing; one beyond the dtype
    # would become 0 or inf, and 0 / 0 and inf / inf are NaN.
    limits = torch.finfo(logits.dtype)
    temperature = float(min(max(params.temperature, limits.tiny), limits.max))
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    probs, ids = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if 0 < params.top_k < probs.shape[-1]:
        probs[:, params.top_k :] = 0
    if params.top_p < 1:
        # The total is the last of the sums: sum() adds up in another order for other rows and threads.
        cumulative = probs.cumsum(-1)
        probs = probs.masked_fill(cumulative - probs > params.top_p * cumulative[:, -1:], 0)
    if params.min_p > 0:
        probs = probs.masked_fill(probs < params.min_p * probs[:, :1], 0)
    return probs, ids


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
