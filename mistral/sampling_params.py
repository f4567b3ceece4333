"""How one prompt is continued: SamplingParams, checked on construction. Runs without torch.

Flags, help texts, ranges, defaults and the fields of saved conversations derive from this class.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from mistral.util.errors import UsageError, short_repr

if TYPE_CHECKING:
    from torch import Tensor

# Prompt ids, output ids and the logits [V] of the next token, to logits [V].
LogitsProcessor = Callable[[list[int], list[int], "Tensor"], "Tensor"]

LARGEST = 2**63 - 1
# Whole numbers, then others: the least and the most of each. Those of the penalties and biases are vLLM's, whose
# repetition penalty has no upper limit; this one keeps any fp32 logit finite.
COUNTS = {"max_tokens": (0, LARGEST), "top_k": (0, LARGEST), "n": (1, 2**31 - 1), "top_logprobs": (0, LARGEST)}
NUMBERS = {
    "temperature": (0, sys.float_info.max),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
}
LARGEST_BIAS = 100


class SamplingError(UsageError):
    """A sampling parameter of the wrong type or out of its range."""


@dataclass(frozen=True)
class SamplingParams:
    """How one prompt is continued. Each request has its own. Names and penalties are those of vLLM.

    Args:
        max_tokens: the most tokens to generate; 0 generates none (`complete --json` scores the prompt)
        temperature: 0 takes the most likely token; higher is more random
        top_p: sample from the most likely tokens whose probabilities sum to this; 1 keeps all
        top_k: sample from this many of the most likely tokens; 0 keeps all
        min_p: drop tokens less likely than this share of the most likely one
        repetition_penalty: above 1, tokens of the prompt and the output so far become less likely
        frequency_penalty: above 0, a token becomes less likely each time that it is generated
        presence_penalty: above 0, tokens that were generated become less likely
        seed: the same seed gives the same text for the same prompt; default: random
        n: how many continuations to sample of each prompt; they differ, unless temperature is 0
        stop: text that ends the continuation; not printed
        top_logprobs: report this many of the most likely tokens at each position
        logit_bias: what to add to the logits of some tokens, by id, from -100 to 100
        logits_processor: a function that changes the logits: (prompt_ids, output_ids, logits) -> logits

    Two instances that differ in `logits_processor` only are equal: a function cannot be compared, nor saved.

    Raises:
        SamplingError: a value has the wrong type or is out of its range.
    """

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logits_processor: LogitsProcessor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, (least, most) in COUNTS.items():
            object.__setattr__(self, name, _number(name, getattr(self, name), int, least, most))
        for name, limits in NUMBERS.items():
            object.__setattr__(self, name, _number(name, getattr(self, name), float, *limits))
        if self.seed is not None:
            object.__setattr__(self, "seed", _number("seed", self.seed, int, -LARGEST, LARGEST))
        object.__setattr__(self, "stop", _stop(self.stop))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise SamplingError(f"logits_processor is {short_repr(self.logits_processor)}; it must be a function")

    @property
    def greedy(self) -> bool:
        """Whether no random number is used."""
        return self.temperature == 0

    @property
    def penalized(self) -> bool:
        """Whether tokens that were seen before are treated differently."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before a token is chosen from them."""
        return self.penalized or bool(self.logit_bias) or self.logits_processor is not None

    @property
    def filters(self) -> tuple[float, ...]:
        """What decides how a token is chosen from logits: requests that have these alike are sampled together."""
        return () if self.temperature == 0 else (self.temperature, self.top_p, self.top_k, self.min_p)


def _number(name: str, value: Any, kind: type, least: float, most: float) -> int | float:
    """The value, as a plain number; NumPy's are accepted too."""
    kinds: Any = Integral if kind is int else Real
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise SamplingError(f"{name} is {short_repr(value)}; it must be a {'whole ' if kind is int else ''}number")
    number: int | float = value if isinstance(value, int | float) else kind(value)
    if isinstance(number, float) and not math.isfinite(number):
        raise SamplingError(f"{name} is {number}; it must be a finite number")
    if number < least:
        raise SamplingError(f"{name} is {short_repr(value)}; it must be at least {_limit(least)}")
    if number > most:
        raise SamplingError(f"{name} is {short_repr(value)}; it must be at most {_limit(most)}")
    return number


def _limit(number: float) -> str:
    """A limit as somebody would write it."""
    return {LARGEST: "2**63 - 1", -LARGEST: "-(2**63 - 1)"}.get(int(number), f"{number:g}")


def _stop(given: object) -> tuple[str, ...]:
    stop = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    if given is None:
        return ()
    if not all(isinstance(text, str) for text in stop):
        raise SamplingError(f"stop is {short_repr(given)}; it must be strings")
    if "" in stop:
        raise SamplingError("stop has an empty text, which would stop everything at once")
    return stop


def _biases(given: object) -> tuple[tuple[int, float], ...]:
    """Pairs of id and bias, by id, of a mapping or of pairs."""
    pairs = given.items() if isinstance(given, Mapping) else given or ()
    try:
        biases = [(token, bias) for token, bias in pairs]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise SamplingError(f"logit_bias is {short_repr(given)}; it must map ids to numbers") from None
    checked = {
        int(_number("an id of logit_bias", token, int, 0, LARGEST)): float(
            _number(f"logit_bias of {short_repr(token)}", bias, float, -LARGEST_BIAS, LARGEST_BIAS)
        )
        for token, bias in biases
    }
    if len(checked) != len(biases):
        raise SamplingError("logit_bias has an id twice")
    return tuple(sorted(checked.items()))
