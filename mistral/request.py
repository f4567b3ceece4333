"""One prompt on its way through a model: what was asked for, what was generated, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from mistral.sampling import LogitChanges, RequestRng
from mistral.sampling_params import SamplingParams
from mistral.stored_ids import StoredIds
from mistral.util.arguments import whole_numbers
from mistral.util.errors import UsageError, short_repr

Finish = Literal["stop", "length", "error"]
PREFIX_BLOCK = 4096  # ids that are compared at once
# What an engine asks of a model; any that has these will do.
NEEDED = ("args", "step", "logits", "make_cache", "cache_bytes")


class GenerationError(UsageError):
    """A prompt or a number that cannot be generated from."""


class BrokenLogits(GenerationError):
    """The model gave logits that are NaN: the weights or the dtype are at fault, not what was asked."""


@dataclass(eq=False)
class Request:
    """One prompt on its way through the model, and what was generated from it so far.

    Args:
        index: the caller's number for its prompt.
        prompt_ids: ids of the prompt.
        params: how it is continued.
        eos_ids: ids that end it when they are generated.
        rng: its random numbers; None where none are drawn.
        sample: which of the `params.n` samples of its prompt it is.
        row: the row of the cache that it has; None while it waits, and once it has ended.
        num_computed: how many of prompt_ids + output_ids the model has processed.
        output_ids: generated ids, without the one that ended it.
        guesses: ids that may follow the output; the model processes them together with the last token.
        score: whether log-probabilities of its prompt's tokens are kept.
        prompt_logprobs: of prompt_ids[1:], as far as they are known, if `score`.
        prompt_top: for each of them the most likely tokens and their log-probabilities, `params.top_logprobs` of them.
        finish: "stop" (an eos id, or stopped from outside), "length" or "error"; None until it has ended.
        error: why it could not go on.
        changes: what it changes in its logits; made with its first token, None once it has ended.
        adapter: the name of the one that it is computed with; "" is none.
        arrived: how many requests its engine had been given before.
    """

    index: int
    prompt_ids: Sequence[int]
    params: SamplingParams
    eos_ids: frozenset[int]
    rng: RequestRng | None
    sample: int = 0
    row: int | None = None
    num_computed: int = 0
    output_ids: list[int] = field(default_factory=list)
    guesses: list[int] = field(default_factory=list)
    score: bool = False
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top: list[dict[int, float]] = field(default_factory=list)
    finish: Finish | None = None
    error: GenerationError | None = None
    changes: LogitChanges | None = field(default=None, repr=False)
    adapter: str = ""
    arrived: int = 0

    @property
    def positions(self) -> int:
        """Positions that it may need: the last token generated is never processed."""
        return len(self.prompt_ids) + max(self.params.max_tokens - 1, 0)

    @property
    def prefilling(self) -> bool:
        """Whether some of its prompt is still to be processed."""
        return self.num_computed < len(self.prompt_ids)

    @property
    def prefill_progress(self) -> tuple[int, int]:
        """Tokens of the prompt that the model has processed, and all of them."""
        return min(self.num_computed, len(self.prompt_ids)), len(self.prompt_ids)

    def next_ids(self, chunk: int) -> list[int]:
        """What the model processes next: a chunk of the prompt, or the last token generated and what may follow it."""
        if self.prefilling:
            return list(self.prompt_ids[self.num_computed : self.num_computed + chunk])
        return self.output_ids[-1:] + self.guesses


@dataclass(frozen=True)
class Token:
    """One generated token.

    Args:
        request: the request that it continues; not compared.
        id: the token.
        logprob: natural log of its probability under the softmax of the logits as the model gave them.
        top: the most likely tokens and their log-probabilities, most likely first, as many as requested.
    """

    request: Request = field(repr=False, compare=False)
    id: int
    logprob: float
    top: dict[int, float]

    @property
    def index(self) -> int:
        """The caller's number for the prompt that it continues."""
        return self.request.index


class Draft(Protocol):
    """What guesses the next tokens of requests, so that a step may give several. No output depends on it.

    A guess that turns out as the token that the request generates anyhow saves it a step; the others are forgotten.
    """

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[list[int]]:
        """Ids that may follow the output of each of the requests that decode next, at most so many; or none."""

    def learn(self, requests: Sequence[Request], guessed: Sequence[int], right: Sequence[int], seconds: float) -> None:
        """What came of it: of each request the tokens guessed and those that were right, and how long the step took."""


def shares(waiting: Sequence[Request], room: int) -> dict[Request, int]:
    """How much of its prompt each request processes in a step that holds `room` tokens of them.

    Where it does not hold all, those with the least left come first: a short prompt does not wait for a long one, and
    of equal ones the first is soon through. The oldest has a quarter of the step in any case.
    """
    left = {request: len(request.prompt_ids) - request.num_computed for request in waiting}
    found = dict.fromkeys(waiting, 0)
    if waiting:
        oldest = min(waiting, key=lambda request: request.arrived)
        found[oldest] = min(left[oldest], max(1, room // 4))
    for request in sorted(waiting, key=lambda request: (left[request], request.arrived)):
        found[request] += min(left[request] - found[request], room - sum(found.values()))
    return found


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common at the beginning."""
    most = min(len(a), len(b))
    for first in range(0, most, PREFIX_BLOCK):  # lists are compared much faster as a whole than in a loop
        one, two = (list(ids[first : min(first + PREFIX_BLOCK, most)]) for ids in (a, b))
        if one != two:
            return first + next(i for i, (x, y) in enumerate(zip(one, two, strict=True)) if x != y)
    return most


def changed_logits(logits: Tensor, ready: Sequence[Request]) -> Tensor:
    """The logits that requests choose from: [R, V], of which some rows differ from what the model gave."""
    rows = [row for row, request in enumerate(ready) if request.params.changes_logits]
    if not rows:
        return logits
    changed = logits.clone()
    for row in rows:
        request = ready[row]
        if request.changes is None:
            request.changes = LogitChanges(request.params, request.prompt_ids, logits.shape[-1], logits.device)
        changed[row] = request.changes(logits[row], request.output_ids)
    return changed


def require_model(model: object) -> None:
    """Refuse what is no model.

    Raises:
        GenerationError: it is something else.
    """
    if lacking := [name for name in NEEDED if not hasattr(model, name)]:
        what = f"{type(model).__name__} is no model that can be used: it lacks {', '.join(lacking)}"
        raise GenerationError(f"{what}; of what load() gives take .model")


def ids_of(prompt: object, index: int, what: str = "a list of ids") -> Sequence[int]:
    """The ids of a prompt: a list of them as it is, not a copy (of a million it would be 40 MB), and `StoredIds`.

    Args:
        what: was asked for, to end a refusal.

    Raises:
        GenerationError: it holds something else, such as text or numbers with a fraction.
    """
    if isinstance(prompt, StoredIds):
        return prompt
    return whole_numbers(f"prompt {index}", prompt, GenerationError, what)


def check_request(ids: Sequence[int], params: SamplingParams, index: int, sample: int, vocab_size: int) -> None:
    """Refuse what cannot be generated from."""
    if not ids:
        raise GenerationError(f"prompt {index} has no tokens")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(t for t in ids if not 0 <= t < vocab_size)
        raise GenerationError(f"prompt {index} has the id {wrong}, outside the vocabulary of {vocab_size}")
    if not isinstance(sample, int) or not 0 <= sample < params.n:
        raise GenerationError(f"sample is {short_repr(sample)}; it must be at least 0 and less than n, {params.n}")
    check_params(params, vocab_size)


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Refuse sampling parameters that a vocabulary has no tokens for, whatever the prompt.

    Raises:
        GenerationError: an id of `logit_bias` that is not there, or more `top_logprobs` than tokens.
    """
    if params.top_logprobs > vocab_size:
        raise GenerationError(f"top_logprobs is {params.top_logprobs}; the vocabulary has only {vocab_size} tokens")
    if params.logit_bias and params.logit_bias[-1][0] >= vocab_size:
        wrong = params.logit_bias[-1][0]
        raise GenerationError(f"logit_bias has the id {wrong}, outside the vocabulary of {vocab_size}")
