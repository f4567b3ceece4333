"""Generation in three thin layers: ids (`Generation`), text as it appears (`stream`), results (`complete`).

`generate` keeps the meaning it has in Mistral's 2023 repository. Works with any model that steps
over a plan and any tokenizer that encodes and decodes; knows nothing about files or options.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from mistral.cache import RollingBufferCache
from mistral.detokenizer import StopStrings
from mistral.engine import Finish, Generation, GenerationError, Progress, Token
from mistral.model import Transformer
from mistral.sampling import Sampler
from mistral.tokenizer import TokenizerLike, encode

Prompt = str | Sequence[int]


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
    return _pieces(running, [StopStrings(tokenizer, prompt, stops) for prompt in ids], progress)


def _pieces(running: Generation, texts: list[StopStrings], progress: Progress | None) -> Iterator[Piece]:
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


class _CallableModule(ModuleType):
    """`from mistral import generate` gives the function, or this module once it was imported: both can be called."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        return generate(*given, **named)


sys.modules[__name__].__class__ = _CallableModule
