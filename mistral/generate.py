"""Generation in three thin layers: ids (`Generation`), text as it appears (`stream`), results (`complete`).

`generate` keeps the meaning it has in Mistral's 2023 repository. Works with any model that steps
over a plan and any tokenizer that encodes and decodes; knows nothing about files or options.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mistral.cache import RollingBufferCache
from mistral.model import Transformer
from mistral.sampling import Sampler, Uniforms
from mistral.tokenizer import StreamDecoder, TokenizerLike, encode
from mistral.util import memory

Prompt = str | Sequence[int]
Finish = Literal["stop", "length"]
Progress = Callable[[int, int], None]

STEP_TOKENS = 2048  # prompt tokens a step takes in, over all rows, unless a chunk size is given
LOGIT_FLOATS = 1 << 24  # logits held at once while a prompt is scored: 64 MB
LESS = "lower --max_tokens, shorten the prompt, or use --dtype bfloat16"  # where keys and values do not fit


class GenerationError(ValueError):
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
        DoesNotFit: not even one row of cache fits the memory left.
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
            logprobs = self.model.logits(h[first : first + len(wanted)]).log_softmax(-1)
            found = logprobs.gather(-1, wanted[:, None]).squeeze(-1).tolist()
            for logprob in found:
                _check_number(logprob, sequence.index)
            sequence.prompt_logprobs += found

    def _choose(self, h: Tensor, ready: list[PromptState]) -> list[Token]:
        """Sample a token for each sequence and take note of those that end with it."""
        logits = self.model.logits(h)
        draws = [0.0] * len(ready) if self.sampler.greedy else [s.uniforms() for s in ready]
        chosen = self.sampler(logits, torch.tensor(draws, dtype=torch.float32, device=logits.device))
        logprobs = logits.log_softmax(-1)
        of_chosen = logprobs.gather(-1, chosen[:, None]).squeeze(-1)
        tokens = []
        for sequence, token, logprob, top in zip(
            ready, chosen.tolist(), of_chosen.tolist(), self._likeliest(logprobs), strict=True
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

    def _likeliest(self, logprobs: Tensor) -> list[dict[int, float]]:
        """The likeliest ids of each row and their log-probabilities, as many as asked for."""
        if not self.top_logprobs:
            return [{} for _ in logprobs]
        # A stable sort, because topk breaks ties anyhow.
        values, ids = (x[:, : self.top_logprobs].tolist() for x in logprobs.sort(dim=-1, descending=True, stable=True))
        return [dict(zip(i, v, strict=True)) for i, v in zip(ids, values, strict=True)]


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
        DoesNotFit: not even one.
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


@dataclass(frozen=True)
class Piece:
    """What one token, or the end of a sequence, adds.

    Args:
        index: which prompt it continues.
        text: text that is now certain; may be empty, never half a character.
        token: the token, None for text that was held back until the end.
        finish_reason: set on a sequence's last piece: "stop" (eos or a stop string) or "length".
    """

    index: int
    text: str
    token: Token | None
    finish_reason: Finish | None = None


@dataclass
class Completion:
    """A prompt's continuation.

    Args:
        text: continuation only, up to eos or the stop string.
        tokens: ids made, without eos; where a stop string ended it, the last of them spell what `text` leaves out.
        logprobs: of each token, natural log, untempered.
        top_logprobs: for each token the likeliest ids and their log-probabilities, as many as asked for.
        finish_reason: "stop" (eos or a stop string) or "length".
        prompt_tokens: ids of the prompt, bos included.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    finish_reason: Finish
    prompt_tokens: list[int]


class _Text:
    """A sequence's text so far, and what of it may be shown: not the beginning of a stop string."""

    def __init__(self, tokenizer: TokenizerLike, prompt: list[int], stop: tuple[str, ...]) -> None:
        self._decoder = StreamDecoder(tokenizer, prompt)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        return self._show(self._decoder.push(token), ended=False)

    def flush(self) -> str:
        return "" if self.stopped else self._show(self._decoder.flush(), ended=True)

    def _show(self, new: str, ended: bool) -> str:
        text = self._held + new
        found = [at for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if ended else max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def encode_prompts(prompts: Sequence[Prompt], tokenizer: TokenizerLike) -> list[list[int]]:
    """Ids of each prompt: strings get bos in front, lists of ids are taken as they are."""
    if isinstance(prompts, str):
        raise GenerationError("prompts is one string; give a list of them")
    if not isinstance(prompts, Iterable):
        raise GenerationError(f"prompts is {prompts!r}; it must be a list of strings or of lists of ids")
    return [encode(tokenizer, p) if isinstance(p, str) else _ids(p, i) for i, p in enumerate(prompts)]


def _ids(prompt: Sequence[int], i: int) -> list[int]:
    try:
        if isinstance(prompt, bytes):
            raise TypeError
        if type(prompt) is list and all(type(t) is int for t in prompt):
            return prompt  # a prompt of a million ids is 40 MB
        return [operator.index(t) for t in prompt]  # not int(): that would take 2.7, or "2"
    except TypeError:
        raise GenerationError(f"prompt {i} is {prompt!r:.60}; it must be a string or a list of ids") from None


def stream(
    prompts: Sequence[Prompt],
    model: Transformer,
    tokenizer: TokenizerLike,
    *,
    max_tokens: int | Sequence[int] = 256,
    temperature: float = 0.7,
    top_p: float = 0.8,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    chunk_size: int | None = None,
    top_logprobs: int = 0,
    cache: RollingBufferCache | None = None,
    progress: Progress | None = None,
) -> Iterator[Piece]:
    """Continue prompts, handing out text as it is made.

    Args:
        prompts: strings (bos is put in front) or lists of ids (taken as they are), any number.
        max_tokens: most tokens to make, one number or one a prompt.
        temperature, top_p, top_k, min_p: see `sampling`; temperature 0 is greedy.
        seed: same seed, same random draws for the same prompt index; None takes one from PyTorch's
            default generator, so `torch.manual_seed` decides.
        stop: strings that end a continuation; neither they nor what follows is shown.
        chunk_size: most prompt tokens a sequence takes in at a step; changes no number.
        top_logprobs: how many of the likeliest tokens to report with each token.
        cache: one that holds the beginnings of the prompts; see `Generation`.
        progress: called between steps with the tokens of the prompts taken in so far and in all. What it
            raises ends the generation there, with the cache whole.

    Yields:
        Pieces, at least one a prompt; a sequence's last one carries its finish reason.

    Raises:
        ValueError: a subclass that names the argument; before anything is computed.
    """
    sampler = Sampler(temperature, top_p, top_k, min_p)
    stops = _check_stop(stop)
    ids = encode_prompts(prompts, tokenizer)
    running = Generation(
        ids,
        model,
        max_tokens=max_tokens,
        eos_id=tokenizer.eos_id,
        sampler=sampler,
        seed=_seed(seed, sampler, max_tokens),
        chunk_size=chunk_size,
        top_logprobs=top_logprobs,
        cache=cache,
    )
    return _pieces(running, [_Text(tokenizer, prompt, stops) for prompt in ids], progress)


def _pieces(running: Generation, texts: list[_Text], progress: Progress | None) -> Iterator[Piece]:
    open_ = {s.index: s for s in running.sequences}
    while open_:
        if progress is not None:
            progress(*running.taken)
        for token in [] if running.done else running.step():
            text = texts[token.index]
            shown = text.push(token.id)
            if text.stopped:
                running.stop(token.index)
            yield Piece(token.index, shown, token)
        for sequence in [s for s in open_.values() if s.finish]:
            del open_[sequence.index]
            text = texts[sequence.index]
            rest = text.flush()
            yield Piece(sequence.index, rest, None, "stop" if text.stopped else sequence.finish)


def _check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not all(isinstance(s, str) for s in stops):
        raise GenerationError(f"stop is {stop!r}; it must be strings")
    if "" in stops:
        raise GenerationError("an empty stop string would stop everything at once")
    return stops


def _seed(seed: int | None, sampler: Sampler, max_tokens: int | Sequence[int]) -> int:
    if seed is not None or sampler.greedy or not max_tokens:
        return seed or 0
    return int(torch.randint(2**62, (), device="cpu"))


def completions(
    prompts: Sequence[Prompt], model: Transformer, tokenizer: TokenizerLike, **options: object
) -> Iterator[tuple[int, Completion]]:
    """Continue prompts, handing out each one's index and result when it has ended; takes what `stream` takes."""
    ids = encode_prompts(prompts, tokenizer)
    results = [Completion("", [], [], [], "length", prompt) for prompt in ids]
    for piece in stream(ids, model, tokenizer, **options):  # type: ignore[arg-type]
        result = results[piece.index]
        result.text += piece.text
        if piece.token:
            result.tokens.append(piece.token.id)
            result.logprobs.append(piece.token.logprob)
            result.top_logprobs.append(piece.token.top)
        if piece.finish_reason:
            result.finish_reason = piece.finish_reason
            yield piece.index, result


def complete(
    prompts: Sequence[Prompt], model: Transformer, tokenizer: TokenizerLike, **options: object
) -> list[Completion]:
    """Continue prompts and return when all have ended; takes what `stream` takes.

    Returns:
        One Completion a prompt, in order.
    """
    results = dict(completions(prompts, model, tokenizer, **options))
    return [results[i] for i in range(len(results))]


def generate(
    prompts: Sequence[Prompt],
    model: Transformer,
    tokenizer: TokenizerLike,
    *,
    max_tokens: int,
    chunk_size: int | None = None,
    temperature: float = 0.7,
    top_p: float = 0.8,
    seed: int | None = None,
) -> tuple[list[str], list[list[float]]]:
    """Continue prompts; the interface of Mistral's 2023 repository.

    Args:
        prompts: strings (bos is put in front) or lists of ids (taken as they are).
        max_tokens: most tokens to make; 0 scores the prompts.
        chunk_size, temperature, top_p, seed: see `stream`.

    Returns:
        The texts, prompt included (an empty list if max_tokens is 0), and for each prompt the
        log-probabilities of its tokens from the second on, then those of the tokens made.

    Raises:
        ValueError: a subclass that names the argument.
    """
    sampler = Sampler(temperature, top_p)
    ids = encode_prompts(prompts, tokenizer)
    running = Generation(
        ids,
        model,
        max_tokens=max_tokens,
        eos_id=tokenizer.eos_id,
        sampler=sampler,
        seed=_seed(seed, sampler, max_tokens),
        chunk_size=chunk_size,
        score_prompts=True,
    )
    made: list[list[float]] = [[] for _ in ids]
    while not running.done:
        for token in running.step():
            made[token.index].append(token.logprob)
    logprobs = [s.prompt_logprobs + more for s, more in zip(running.sequences, made, strict=True)]
    wanted = any(s.max_tokens for s in running.sequences)
    texts = [tokenizer.decode(s.prompt + s.made) for s in running.sequences] if wanted else []
    return texts, logprobs
