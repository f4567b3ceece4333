"""From one distribution to one token.

Filters, in this order, on the tempered probabilities: top_k keeps the k most likely tokens; top_p
(nucleus sampling, arXiv 1904.09751) keeps a token if the more likely ones kept so far sum to at
most p of what top_k left; min_p keeps those at least p times as likely as the likeliest. Ties go to
the lowest id. The draw is by inverse cumulative distribution from one uniform number, so it is the
same on every device up to rounding.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral.sampling_params import SamplingError
from mistral.util.errors import short_repr


@dataclass(frozen=True)
class Sampler:
    """How to choose a token.

    Args:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_p: in [0, 1]; 1 keeps all.
        top_k: 0 keeps all.
        min_p: in [0, 1]; 0 keeps all.

    Raises:
        SamplingError: a value is out of its range.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "top_k", "min_p"):
            kind = int if name == "top_k" else int | float
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), kind):
                raise SamplingError(f"{name} is {short_repr(getattr(self, name))}; it must be a number")
        if not 0 <= self.temperature <= sys.float_info.max:
            raise SamplingError(f"temperature is {short_repr(self.temperature)}; it must be finite and at least 0")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise SamplingError(f"{name} is {short_repr(value)}; it must be between 0 and 1")
        if self.top_k < 0:
            raise SamplingError(f"top_k is {short_repr(self.top_k)}; it must be at least 1, or 0 for no limit")

    @property
    def greedy(self) -> bool:
        """Whether no random number is used."""
        return self.temperature == 0

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Choose a token for each row.

        Args:
            logits: [R, V] fp32 or float64.
            uniform: [R] numbers in [0, 1), one a row, on the same device; not read if greedy.

        Returns:
            [R] int64.
        """
        if self.greedy:
            return logits.argmax(-1)
        probs, ids = self.distribution(logits)
        cumulative = probs.cumsum(-1)
        target = uniform[:, None].to(probs.dtype) * cumulative[:, -1:]
        # Count what lies below the target; rounding must not carry it past the last token kept.
        place = torch.minimum((cumulative <= target).sum(-1), (probs > 0).sum(-1) - 1)
        place = place.clamp(min=0)  # logits that are not numbers keep no token; the caller sees it in the log-probs
        return ids.gather(-1, place[:, None]).squeeze(-1)

    def distribution(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The filtered probabilities, likeliest first and not renormalised, and their ids: two [R, V]."""
        # Subtracting the maximum first keeps a tiny temperature from overflowing; one beyond the dtype
        # would become 0 or inf, and 0 / 0 and inf / inf are not numbers.
        limits = torch.finfo(logits.dtype)
        temperature = float(min(max(self.temperature, limits.tiny), limits.max))
        scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
        probs, ids = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
        if 0 < self.top_k < probs.shape[-1]:
            probs[:, self.top_k :] = 0
        if self.top_p < 1:
            # The total is the last of the sums: sum() adds up in another order for other rows and threads.
            cumulative = probs.cumsum(-1)
            probs = probs.masked_fill(cumulative - probs > self.top_p * cumulative[:, -1:], 0)
        if self.min_p > 0:
            probs = probs.masked_fill(probs < self.min_p * probs[:, :1], 0)
        return probs, ids


class Uniforms:
    """A prompt's own stream of random numbers: made from (seed, index), one a token.

    What else is in the batch never moves it.
    """

    def __init__(self, seed: int, index: int) -> None:
        digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
        self._generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def __call__(self) -> float:
        """The next number in [0, 1)."""
        return torch.rand((), generator=self._generator, dtype=torch.float64, device="cpu").item()
