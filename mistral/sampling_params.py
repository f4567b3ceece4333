"""How one prompt is continued: SamplingParams, checked on construction. Runs without torch.

Flags, help texts, ranges, defaults and the fields of saved conversations derive from this class.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from mistral.util.errors import UsageError, short_repr


class SamplingError(UsageError):
    """A sampling parameter of the wrong type or out of its range."""


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued. Each request has its own.

    Args:
        max_tokens: the most tokens to generate; 0 only scores the prompt
        temperature: 0 takes the most likely token; higher is more random
        top_p: sample from the most likely tokens whose probabilities sum to this; 1 keeps all
        top_k: sample from this many of the most likely tokens; 0 keeps all
        min_p: drop tokens less likely than this share of the most likely one
        seed: the same seed gives the same text for the same prompt; default: random
        stop: text that ends the continuation; not printed
        top_logprobs: report this many of the most likely tokens at each position

    Raises:
        SamplingError: a value has the wrong type or is out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "top_logprobs"):
            _check(name, getattr(self, name), int, 0, 2**63 - 1)
        _check("temperature", self.temperature, float, 0, sys.float_info.max)
        for name in ("top_p", "min_p"):
            _check(name, getattr(self, name), float, 0, 1)
        if self.seed is not None:
            _check("seed", self.seed, int, -sys.maxsize, sys.maxsize)
        given: object = self.stop
        stop = (given,) if isinstance(given, str) else tuple(self.stop or ())
        if not all(isinstance(s, str) for s in stop):
            raise SamplingError(f"stop is {short_repr(self.stop)}; it must be strings")
        if "" in stop:
            raise SamplingError("an empty stop string would stop everything at once")
        object.__setattr__(self, "stop", stop)

    @property
    def greedy(self) -> bool:
        """Whether no random number is used."""
        return self.temperature == 0


def _check(name: str, value: object, kind: type, least: float, most: float) -> None:
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise SamplingError(f"{name} is {short_repr(value)}; it must be a {'whole ' if kind is int else ''}number")
    if not value >= least:  # this way round, NaN is refused too
        raise SamplingError(f"{name} is {short_repr(value)}; it must be at least {least:g}")
    if value > most:
        raise SamplingError(f"{name} is {short_repr(value)}; it must be at most {most:g}")
