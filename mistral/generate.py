"""Text in, text out, on top of the engine: as it is generated (`stream`), or when it has ended (`complete`).

`generate` keeps the meaning it has in Mistral's 2023 repository. Works with any model that steps
over a plan and any tokenizer that encodes and decodes; knows nothing about files or load options.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from mistral.cache import RollingBufferCache
from mistral.detokenizer import StopStrings
from mistral.engine import Engine, Progress
from mistral.model import Transformer
from mistral.request import Finish, GenerationError, Request, Token, ids_of
from mistral.sampling_params import SamplingParams
from mistral.thinking import ThoughtIds, ThoughtReader
from mistral.tokenizer import NO_TOKENIZER, NoText, TokenizerError, TokenizerLike, encode, outside, require_tokenizer
from mistral.util.arguments import require_kind
from mistral.util.english import counted
from mistral.util.errors import short_repr
from mistral.util.flat import flat

Prompt = str | Sequence[int]
R = TypeVar("R")
DEFAULT = SamplingParams()


@dataclass(frozen=True)
class Piece:
    """What one token, or the end of a sequence, adds.

    Args:
        index: which prompt it continues.
        text: text that is now certain; may be empty, never half a character.
        token: the token, None for text that was held back until the end.
        finish_reason: set on a sequence's last piece: "stop" (eos or a stop string) or "length".
        sample: which of the prompt's n samples it belongs to.
        thought: whether the text is what a model thinks before it answers.
        scores: on the last piece of a prompt that is only scored (`score`), the log-probabilities of its tokens
            from the second on.
        score_tops: for each of them the most likely ids and their log-probabilities, as many as requested.
    """

    index: int
    text: str
    token: Token | None
    finish_reason: Finish | None = None
    sample: int = 0
    thought: bool = False
    scores: Sequence[float] = ()
    score_tops: Sequence[dict[int, float]] = ()


@dataclass
class Completion:
    """A prompt's continuation.

    Args:
        text: continuation only, up to eos or the stop string.
        tokens: generated ids, without eos; where a stop string ended it, the last of them spell what `text` omits.
        logprobs: of each token, natural log, of the logits as the model gave them.
        top_logprobs: for each token the most likely ids and their log-probabilities, as many as requested.
        finish_reason: "stop" (eos or a stop string) or "length".
        prompt_tokens: ids of the prompt, bos included; the `StoredIds` that were given.
        sample: which of the prompt's n samples it is.
        thinking: what the model thought, which is no part of the text; "" without `thoughts`.
        prompt_logprobs: of `prompt_tokens[1:]`, where the prompt was only scored (`score`, and max_tokens is 0).
        prompt_top_logprobs: for each of them what `top_logprobs` has for tokens.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    finish_reason: Finish
    prompt_tokens: Sequence[int]
    sample: int = 0
    thinking: str = ""
    prompt_logprobs: Sequence[float] = ()
    prompt_top_logprobs: Sequence[dict[int, float]] = ()


def encode_prompts(prompts: Sequence[Prompt], tokenizer: TokenizerLike | None) -> list[Sequence[int]]:
    """Ids of each prompt: strings get bos in front, lists of ids are taken as they are."""
    prompts = _prompt_list(prompts)
    return [
        encode(require_tokenizer(tokenizer), p) if isinstance(p, str) else ids_of(p, i, "a string or a list of ids")
        for i, p in enumerate(prompts)
    ]


def _prompt_list(prompts: Iterable[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        raise GenerationError("prompts is one string; give a list of them")
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes | Mapping):
        raise GenerationError(f"prompts is {short_repr(prompts)}; it must be a list of strings or of lists of ids")
    several = list(prompts)
    if not several:
        raise GenerationError("no prompts: give at least one")
    return several


def eos_of(tokenizer: TokenizerLike) -> frozenset[int]:
    """The ids that end a sequence: `eos_ids` of a tokenizer that has several, else its `eos_id`; None is none."""
    several = getattr(require_tokenizer(tokenizer), "eos_ids", None)
    if several is not None:
        return frozenset(several)
    return frozenset() if tokenizer.eos_id is None else frozenset((tokenizer.eos_id,))


def sampled(function: Callable[..., R]) -> Callable[..., R]:
    """Give a function that takes prompts first, and `params`, the fields of SamplingParams as keyword arguments.

    `params` may be one for all prompts, or a list, one a prompt; so may `max_tokens`. The function gets either.
    """
    shown = flat(params=DEFAULT)(function)
    names = [field.name for field in fields(SamplingParams)]

    @functools.wraps(shown)
    def call(prompts: Sequence[Prompt], *given: Any, **named: Any) -> R:
        if _is_list(named.get("params")) or _is_list(named.get("max_tokens")):
            prompts = _prompt_list(prompts)
            params = _one_each("params", named.pop("params", DEFAULT), len(prompts))
            for one in params:
                require_kind("params", one, SamplingParams)
            changes = [{name: named.pop(name) for name in names if name in named and name != "max_tokens"}] * len(
                params
            )
            if "max_tokens" in named:
                limits = _one_each("max_tokens", named.pop("max_tokens"), len(prompts))
                changes = [{**each, "max_tokens": most} for each, most in zip(changes, limits, strict=True)]
            each = [replace(one, **its) for one, its in zip(params, changes, strict=True)]
            return function(prompts, *given, params=each, **named)
        return shown(prompts, *given, **named)

    return call


def _is_list(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | Mapping)


def _one_each(name: str, given: Any, count: int) -> list[Any]:
    each = list(given) if _is_list(given) else [given] * count
    if len(each) != count:
        raise GenerationError(f"{counted(len(each), 'value')} of {name} for {counted(count, 'prompt')}")
    return each


@dataclass(frozen=True)
class _Batch:
    """Prompts that were added to an engine: their ids, and their requests, n a prompt, in order."""

    engine: Engine
    ids: list[Sequence[int]]
    requests: list[Request]


def _start(
    prompts: Sequence[Prompt],
    tokenizer: TokenizerLike,
    engine: Engine,
    params: SamplingParams | list[SamplingParams],
    adapter: str | Sequence[str | None] | None = None,
    score: bool = False,
) -> _Batch:
    """Add each prompt to the engine; in a cache that was given, prompt i continues row i."""
    ids = encode_prompts(prompts, tokenizer)
    each, adapters = _one_each("params", params, len(ids)), _one_each("adapter", adapter, len(ids))
    for one in each:
        require_kind("params", one, SamplingParams, "SamplingParams(..), or a list of them", GenerationError)
    rows: list[int | None] = [None] * len(ids)
    if engine.cache is not None:
        if len(ids) > len(engine.cache.lengths):
            raise GenerationError(f"{len(ids)} prompts for a cache of {len(engine.cache.lengths)} rows")
        if any(one.n > 1 for one in each):
            raise GenerationError("a cache has one row for each prompt: n must be 1")
        rows = list(range(len(ids)))
    for index, prompt in enumerate(ids):  # the engine finds them too, and knows no names of tokens
        what = outside(prompt, tokenizer, engine.model.args.vocab_size) if isinstance(prompt, list) else None
        if what is not None:
            raise GenerationError(f"prompt {index} has {what}")
    requests = [
        engine.add(
            prompt, one, row, index=index, sample=sample, score=(score and not one.max_tokens) or None, adapter=name
        )
        for index, (prompt, one, row, name) in enumerate(zip(ids, each, rows, adapters, strict=True))
        for sample in range(one.n)
    ]
    return _Batch(engine, ids, requests)


def _words(tokenizer: TokenizerLike | None, params: SamplingParams | list[SamplingParams]) -> TokenizerLike:
    """The tokenizer, or what takes its place where there is none: ids need none, stop strings do."""
    if tokenizer is not None:
        return require_tokenizer(tokenizer)
    if any(one.stop for one in (params if isinstance(params, list) else [params])):
        raise TokenizerError(f"stop strings are text, and {NO_TOKENIZER}")
    return NoText()


@sampled
def stream(
    prompts: Sequence[Prompt],
    model: Transformer,
    tokenizer: TokenizerLike | None,
    *,
    params: SamplingParams | list[SamplingParams],
    eos_ids: Collection[int] | None = None,
    chunk_size: int | None = None,
    cache: RollingBufferCache | None = None,
    progress: Progress | None = None,
    adapter: str | Sequence[str | None] | None = None,
    thoughts: ThoughtIds | None = None,
    score: bool = False,
) -> Iterator[Piece]:
    """Continue prompts, handing out text as it is generated.

    Args:
        prompts: strings (bos is put in front) or lists of ids (taken as they are), any number.
        tokenizer: of the text; None where prompts are ids and what is wanted are ids: texts are empty then, and
            nothing but `eos_ids` ends a continuation before `max_tokens`.
        params: how to continue them: one for all, or a list, one a prompt. Its fields may also be given by name
            (`temperature=0`), and `max_tokens` then as a list, one a prompt. Without a seed each request takes one
            from PyTorch's default generator, so `torch.manual_seed` decides.
        eos_ids: ids that end a continuation; None: those of the tokenizer.
        chunk_size: the most prompt tokens of a sequence in a step; changes rounding only.
        cache: one that holds the beginnings of the prompts, prompt i in row i; they are not processed again.
        progress: called between steps with the prompt tokens processed so far and in all. What it
            raises ends the generation there, with the cache whole.
        adapter: which of the adapters beside the weights: a name for all prompts, or a list, one a prompt; "" is none
            of them. None: the only one, and none where there are several.
        thoughts: ids between which the model thinks (`Template.thought_ids`); such pieces have `thought`.
        score: whether prompts whose max_tokens is 0 are scored; else nothing of them is computed.

    Yields:
        Pieces, at least one a request; a sequence's last one carries its finish reason.

    Raises:
        ValueError: a subclass that names the argument; before anything is computed.
    """
    words = _words(tokenizer, params)
    require_kind("progress", progress, Callable | None, "a function of two numbers", GenerationError)
    require_kind("thoughts", thoughts, ThoughtIds | None, "what template.thought_ids is", GenerationError)
    ends = eos_of(words) if eos_ids is None else eos_ids
    engine = Engine(model, eos_ids=ends, chunk_size=chunk_size, cache=cache)
    batch = _start(prompts, words, engine, params, adapter, score)
    return _pieces(batch, words, progress, thoughts)


def _pieces(
    batch: _Batch, tokenizer: TokenizerLike, progress: Progress | None, thoughts: ThoughtIds | None
) -> Iterator[Piece]:
    engine, requests = batch.engine, batch.requests
    texts = {r: StopStrings(tokenizer, r.prompt_ids, r.params.stop) for r in requests}
    readers = {r: ThoughtReader(thoughts, r.prompt_ids) for r in requests}
    marks = () if thoughts is None else (thoughts.begin, thoughts.end)
    stopped: set[Request] = set()
    running = list(requests)
    while running:
        if progress is not None:
            done, total = zip(*(r.prefill_progress for r in requests), strict=True)
            progress(sum(done), sum(total))
        for token in engine.step():
            request = token.request
            text = texts[request]
            if request in stopped:
                continue  # the same step gave more, behind the stop string
            shown = text.flush() if token.id in marks else text.push(token.id)
            if text.stopped:
                stopped.add(request)
                engine.stop(request)
            thought = readers[request].take(token.id)
            yield Piece(request.index, shown, token, sample=request.sample, thought=thought)
        ended = [r for r in running if r.finish]
        if ended:
            running = [r for r in running if not r.finish]
        for request in ended:
            if request.error is not None:
                raise request.error
            text = texts.pop(request)
            rest = text.flush()
            thought = readers.pop(request).inside
            reason = "stop" if text.stopped else request.finish
            scores = (request.prompt_logprobs, request.prompt_top) if request.score else ((), ())
            yield Piece(request.index, rest, None, reason, request.sample, thought, *scores)


@sampled
def completions(
    prompts: Sequence[Prompt],
    model: Transformer,
    tokenizer: TokenizerLike | None,
    *,
    params: SamplingParams | list[SamplingParams],
    eos_ids: Collection[int] | None = None,
    chunk_size: int | None = None,
    cache: RollingBufferCache | None = None,
    progress: Progress | None = None,
    adapter: str | Sequence[str | None] | None = None,
    thoughts: ThoughtIds | None = None,
    score: bool = False,
) -> Iterator[tuple[int, Completion]]:
    """Continue prompts, handing out each request's prompt index and result when it has ended; see `stream`."""
    ids = encode_prompts(prompts, tokenizer)
    results: dict[tuple[int, int], Completion] = {}
    for piece in stream(
        ids,
        model,
        tokenizer,
        params=params,
        eos_ids=eos_ids,
        chunk_size=chunk_size,
        cache=cache,
        progress=progress,
        adapter=adapter,
        thoughts=thoughts,
        score=score,
    ):
        key = piece.index, piece.sample
        if key not in results:
            results[key] = Completion("", [], [], [], "length", ids[piece.index], piece.sample)
        result = results[key]
        if piece.thought:
            result.thinking += piece.text
        else:
            result.text += piece.text
        if piece.token:
            result.tokens.append(piece.token.id)
            result.logprobs.append(piece.token.logprob)
            result.top_logprobs.append(piece.token.top)
        if piece.finish_reason:
            result.finish_reason = piece.finish_reason
            result.prompt_logprobs, result.prompt_top_logprobs = piece.scores, piece.score_tops
            yield piece.index, results.pop(key)


@sampled
def complete(
    prompts: Sequence[Prompt],
    model: Transformer,
    tokenizer: TokenizerLike | None,
    *,
    params: SamplingParams | list[SamplingParams],
    eos_ids: Collection[int] | None = None,
    chunk_size: int | None = None,
    cache: RollingBufferCache | None = None,
    progress: Progress | None = None,
    adapter: str | Sequence[str | None] | None = None,
    thoughts: ThoughtIds | None = None,
    score: bool = False,
) -> list[Completion]:
    """Continue prompts and return when all have ended; takes what `stream` takes.

    Returns:
        The completions, n of each prompt, in the order of the prompts.
    """
    results = completions(
        prompts,
        model,
        tokenizer,
        params=params,
        eos_ids=eos_ids,
        chunk_size=chunk_size,
        cache=cache,
        progress=progress,
        adapter=adapter,
        thoughts=thoughts,
        score=score,
    )
    return [result for _, result in sorted(results, key=lambda found: (found[0], found[1].sample))]


def generate(
    prompts: Sequence[Prompt],
    model: Transformer,
    tokenizer: TokenizerLike | None,
    *,
    max_tokens: int | Sequence[int],
    chunk_size: int | None = None,
    temperature: float = DEFAULT.temperature,
    top_p: float = DEFAULT.top_p,
    seed: int | None = None,
) -> tuple[list[str], list[list[float]]]:
    """Continue prompts; the interface of Mistral's 2023 repository.

    Args:
        prompts: strings (bos is put in front) or lists of ids (taken as they are).
        max_tokens: the most tokens to generate, one number or one a prompt; 0 scores the prompts.
        chunk_size, temperature, top_p, seed: see `stream` and `SamplingParams`.

    Returns:
        The texts, prompt included (an empty list if max_tokens is 0), and for each prompt the
        log-probabilities of its tokens from the second on, then those of the generated tokens.

    Raises:
        ValueError: a subclass that names the argument.
    """
    one = SamplingParams(temperature=temperature, top_p=top_p, seed=seed)
    ids = encode_prompts(prompts, tokenizer)
    params = [replace(one, max_tokens=most) for most in _one_each("max_tokens", max_tokens, len(ids))]
    words = require_tokenizer(tokenizer) if any(each.max_tokens for each in params) else _words(tokenizer, params)
    engine = Engine(model, eos_ids=eos_of(words), chunk_size=chunk_size, score_prompts=True)
    requests = _start(ids, words, engine, params).requests
    generated: dict[Request, list[float]] = {request: [] for request in requests}
    while not engine.done:
        for token in engine.step():
            generated[token.request].append(token.logprob)
        for request in requests:
            if request.error is not None:
                raise request.error
    logprobs = [request.prompt_logprobs + more for request, more in generated.items()]
    if not any(each.max_tokens for each in params):
        return [], logprobs
    return [words.decode([*request.prompt_ids, *request.output_ids]) for request in requests], logprobs
