"""Ids in, ids out: a batch of requests, one step at a time. Knows nothing about text, files or options."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mistral.cache import RollingBufferCache
from mistral.logprobs import logprobs
from mistral.model import Transformer
from mistral.sampling import Sampler, Uniforms
from mistral.util import memory
from mistral.util.errors import UsageError

Finish = Literal["stop", "length"]
Progress = Callable[[int, int], None]
STEP_TOKENS = 2048  # prompt tokens a step takes in, over all rows, unless a chunk size is given
LOGIT_FLOATS = 1 << 24  # logits held at once while a prompt is scored: 64 MB
LESS = "lower --max_tokens, shorten the prompt, or use --dtype bfloat16"  # where keys and values do not fit


class GenerationError(UsageError):
    """A prompt or a number that cannot be generated from."""


@dataclass(frozen=True)
class Token:
    """One generated token.

    Args:
        index: which prompt it continues.
        id: the token.
        logprob: natural log of its probability under the untempered softmax.
        top: the likeliest tokens and their log-probabilities, likeliest first, as many as asked for.
    """

    index: int
    id: int
    logprob: float
    top: dict[int, float]


@dataclass
class PromptState:
    """Host-side state of one prompt being continued.

    Args:
        index: its place among the prompts.
        prompt: its ids.
        max_tokens: most tokens to make.
        fed: how many of prompt + made the model has taken in.
        made: generated ids, without eos.
        prompt_logprobs: of prompt[1:], as far as they are known.
        finish: why it ended; None while it runs.
    """

    index: int
    prompt: list[int]
    max_tokens: int
    uniforms: Uniforms
    fed: int = 0
    made: list[int] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None

    def next_ids(self, chunk: int) -> list[int]:
        """What the model takes in next: a chunk of the prompt, or the last token made."""
        if self.fed < len(self.prompt):
            return self.prompt[self.fed : self.fed + chunk]
        return self.made[-1:]


class Generation:
    """Prompts on their way through a model, one step at a time.

    Prompts beyond the rows of the cache wait and take over a row when its sequence ends. In one step
    some rows may take in prompt chunks while others decode.

    Args:
        prompts: ids of each prompt, at least one each; lists are not copied: leave them alone until the end.
        model: the model; `args.max_batch_size` bounds the rows.
        max_tokens: most tokens to make, one number or one a prompt.
        eos_id: ends a sequence when generated; None never does.
        sampler: how tokens are chosen.
        seed: of the prompts' random streams.
        chunk_size: most prompt tokens a sequence takes in at a step; None shares STEP_TOKENS.
        score_prompts: also keep the log-probabilities of the prompts' tokens.
        top_logprobs: how many of the likeliest tokens to report with each token.
        cache: one to go on from, with a row for each prompt, whose row b holds the first `lengths[b]`
            tokens of prompt b: they are not taken in again (nor scored). None makes one.

    Raises:
        GenerationError: an empty prompt, an id outside the vocabulary, or a number out of range; a cache
            that has too few rows, or holds all of a prompt.
        OutOfMemory: not even one row of cache fits the memory left.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        model: Transformer,
        *,
        max_tokens: int | Sequence[int],
        eos_id: int | None,
        sampler: Sampler,
        seed: int,
        chunk_size: int | None = None,
        score_prompts: bool = False,
        top_logprobs: int = 0,
        cache: RollingBufferCache | None = None,
    ) -> None:
        limits = _check(prompts, model.args.vocab_size, max_tokens, chunk_size, top_logprobs)
        self.model = model
        self.eos_id = eos_id
        self.sampler = sampler
        self.chunk_size = chunk_size
        self.score_prompts = score_prompts
        self.top_logprobs = top_logprobs
        self.sequences = [
            PromptState(i, prompt if isinstance(prompt, list) else list(prompt), limit, Uniforms(seed, i))
            for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        ]
        for s in self.sequences:
            if not s.max_tokens and not score_prompts:
                s.finish = "length"  # nothing to make and nothing to score
        self._waiting = deque(s for s in self.sequences if s.finish is None)
        # The last token made is never fed back; a prompt that is only scored goes in whole.
        positions = max((len(s.prompt) + max(s.max_tokens - 1, 0) for s in self._waiting), default=0)
        self._rows: list[PromptState | None]
        if cache is not None:
            self.cache = cache
            self._rows = self._go_on(cache, positions)
            self._waiting.clear()
            return
        rows = rows_that_fit(model, len(self._waiting), positions)
        self.cache = RollingBufferCache(
            model.args, max(rows, 1), device=model.device, dtype=model.dtype, positions=positions
        )
        self._rows = [None] * rows

    def _go_on(self, cache: RollingBufferCache, positions: int) -> list[PromptState | None]:
        """Each prompt in its own row, with what the row holds already taken in."""
        if len(cache.lengths) < len(self.sequences):
            raise GenerationError(f"{len(self.sequences)} prompts for a cache of {len(cache.lengths)} rows")
        for s, held in zip(self.sequences, cache.lengths, strict=False):
            if held >= len(s.prompt):
                raise GenerationError(
                    f"the cache holds {held} tokens of prompt {s.index}, which has {len(s.prompt)}: rewind it"
                )
            s.fed = held
        grown = len(cache.lengths) * self.model.args.cache_bytes(positions, self.model.dtype.itemsize) - cache.nbytes
        memory.require(max(0, grown), self.model.device, f"{positions} positions in the cache", LESS)
        return [s if s.finish is None else None for s in self.sequences]

    @property
    def done(self) -> bool:
        """Whether every sequence has ended."""
        return not self._waiting and not any(self._rows)

    @property
    def taken(self) -> tuple[int, int]:
        """Tokens of the prompts that the model has taken in, and all there are."""
        return sum(min(s.fed, len(s.prompt)) for s in self.sequences), sum(len(s.prompt) for s in self.sequences)

    def stop(self, index: int) -> None:
        """End a sequence from outside, as if it had made eos."""
        self._end(self.sequences[index], "stop")

    def _end(self, sequence: PromptState, finish: Finish) -> None:
        sequence.finish = finish
        for row, held in enumerate(self._rows):
            if held is sequence:
                self._rows[row] = None

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Run one forward; return the tokens made by rows that have their whole prompt in, in row order.

        A sequence that has just ended has its `finish` set; eos itself is not among the tokens.
        """
        for row, held in enumerate(self._rows):
            if held is None and self._waiting:
                self.cache.reset(row)
                self._rows[row] = self._waiting.popleft()
        fed = self._next_inputs()
        ids = torch.tensor([i for piece in fed for i in piece], device=self.model.device)
        plan = self.cache.plan([len(piece) for piece in fed])
        h = self.model.step(ids, plan, self.cache)
        self.cache.commit(plan)

        last_rows: list[int] = []
        ready: list[PromptState] = []
        end = 0
        for sequence, piece in zip(list(self._rows), fed, strict=True):
            begin, end = end, end + len(piece)
            if sequence is None:
                continue
            if self.score_prompts and sequence.fed < len(sequence.prompt):
                self._score(sequence, h[begin:end])
            sequence.fed += len(piece)
            if sequence.fed < len(sequence.prompt):
                continue
            if sequence.max_tokens:
                last_rows.append(end - 1)
                ready.append(sequence)
            else:
                self._end(sequence, "length")
        return self._choose(h[last_rows], ready) if ready else []

    def _next_inputs(self) -> list[list[int]]:
        """The ids each row takes in at this step."""
        prefilling = sum(s is not None and s.fed < len(s.prompt) for s in self._rows)
        chunk = self.chunk_size or max(1, STEP_TOKENS // max(1, prefilling))
        return [s.next_ids(chunk) if s is not None else [] for s in self._rows]

    def _score(self, sequence: PromptState, h: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow the ones just taken in."""
        targets = sequence.prompt[sequence.fed + 1 : sequence.fed + 1 + len(h)]
        rows = max(1, LOGIT_FLOATS // self.model.args.vocab_size)
        for first in range(0, len(targets), rows):
            wanted = torch.tensor(targets[first : first + rows], device=h.device)
            logits = self.model.logits(h[first : first + len(wanted)])
            found = logprobs(logits, wanted[:, None]).squeeze(-1).tolist()
            for logprob in found:
                _check_number(logprob, sequence.index)
            sequence.prompt_logprobs += found

    def _choose(self, h: Tensor, ready: list[PromptState]) -> list[Token]:
        """Sample a token for each sequence and take note of those that end with it."""
        logits = self.model.logits(h)
        draws = [0.0] * len(ready) if self.sampler.greedy else [s.uniforms() for s in ready]
        chosen = self.sampler(logits, torch.tensor(draws, dtype=torch.float32, device=logits.device))
        of_chosen = logprobs(logits, chosen[:, None]).squeeze(-1)
        tokens = []
        for sequence, token, logprob, top in zip(
            ready, chosen.tolist(), of_chosen.tolist(), self._likeliest(logits), strict=True
        ):
            _check_number(logprob, sequence.index)
            if token == self.eos_id:
                self._end(sequence, "stop")
                continue
            sequence.made.append(token)
            tokens.append(Token(sequence.index, token, logprob, top))
            if len(sequence.made) == sequence.max_tokens:
                self._end(sequence, "length")
        return tokens

    def _likeliest(self, logits: Tensor) -> list[dict[int, float]]:
        """The likeliest ids of each row and their log-probabilities, as many as asked for."""
        if not self.top_logprobs:
            return [{} for _ in logits]
        # A stable sort, because topk breaks ties anyhow.
        ids = logits.argsort(dim=-1, descending=True, stable=True)[:, : self.top_logprobs]
        values = logprobs(logits, ids)
        return [dict(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]


def _check_number(logprob: float, index: int) -> None:
    """Refuse what a model whose logits are not numbers makes."""
    if logprob != logprob:
        raise GenerationError(
            f"the model's logits for prompt {index} are not numbers: "
            "the weights are broken, or too large for the dtype (try --dtype float32)"
        )


def rows_that_fit(model: Transformer, prompts: int, positions: int) -> int:
    """Rows for a cache of sequences of up to `positions`: as many as prompts, the batch limit and memory allow.

    Raises:
        OutOfMemory: not even one.
    """
    args = model.args
    needed = args.cache_bytes(positions, model.dtype.itemsize)
    rows = min(prompts, args.max_batch_size or prompts)
    if rows:
        memory.require(
            needed,
            model.device,
            f"keys and values of one sequence of {positions} positions",
            LESS,
        )
    left = memory.available(model.device)
    return rows if left is None or not needed else min(rows, left // needed)


def _check(
    prompts: Sequence[Sequence[int]],
    vocab_size: int,
    max_tokens: int | Sequence[int],
    chunk_size: int | None,
    top_logprobs: int,
) -> list[int]:
    """Refuse what cannot be generated from; return max_tokens for each prompt."""
    if not len(prompts):
        raise GenerationError("no prompts: give at least one")
    each = max_tokens if isinstance(max_tokens, Iterable) else [max_tokens] * len(prompts)
    try:
        limits = [operator.index(n) for n in each]
    except TypeError:
        raise GenerationError(f"max_tokens is {max_tokens!r}; it must be a whole number, or one a prompt") from None
    if len(limits) != len(prompts):
        raise GenerationError(f"{len(limits)} values of max_tokens for {len(prompts)} prompts")
    for limit in limits:
        if limit < 0:
            raise GenerationError(f"max_tokens is {limit}; it must be at least 0")
    for name, number in (("chunk_size", chunk_size), ("top_logprobs", top_logprobs)):
        if number is not None and not isinstance(number, int):
            raise GenerationError(f"{name} is {number!r}; it must be a whole number")
    if chunk_size is not None and chunk_size < 1:
        raise GenerationError(f"chunk_size is {chunk_size}; it must be at least 1")
    if not 0 <= top_logprobs <= vocab_size:
        raise GenerationError(f"top_logprobs is {top_logprobs}; it must be between 0 and the vocabulary's {vocab_size}")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise GenerationError(f"prompt {i} has no tokens")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            wrong = next(t for t in prompt if not 0 <= t < vocab_size)
            raise GenerationError(f"prompt {i} has the id {wrong}, outside the vocabulary of {vocab_size}")
    return limits
