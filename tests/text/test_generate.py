"""Generation: batches, queues and chunks change nothing; ends, stop strings, streams, errors, and what it costs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import mistral.generate as generate_module
from mistral import engine
from mistral.engine import Engine
from mistral.generate import Completion, Piece, complete, generate, stream
from mistral.model import Transformer
from mistral.request import GenerationError
from mistral.sampling import RequestRng
from mistral.sampling_params import SamplingError, SamplingParams
from mistral.tokenizer import Tokenizer
from mistral.util.errors import MistralError
from tests.support.tiny import TOLERANCE, ragged, tiny_args, tiny_model
from tests.support.truth import truth

BUNDLED = Path(generate_module.__file__).parent / "bundled" / "tokenizer.model"
VOCAB = 61
W = 5  # tiny_args: tiles of 5 tokens, 9 slots
LENS = [1, 4, 17, 2, 5, 1, 9, 6]  # ragged: length 1, around W, and long enough to wrap the buffer twice
LIMITS = [9, 7, 10, 1, 12, 3, 8, 9]
CHUNKS = [None, 1, W - 1, W, W + 1, 100]
GREEDY: dict[str, Any] = {"temperature": 0}
SAMPLED: dict[str, Any] = {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 15}
MODES = [pytest.param(GREEDY, id="greedy"), pytest.param(SAMPLED, id="sampled")]


class Letters:
    """One id a character, from 2 on; bos and eos have no text."""

    bos_id = 0
    eos_id = 1
    characters = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?;:"

    def encode(self, s: str) -> list[int]:
        return [2 + self.characters.index(c) for c in s]

    def decode(self, t: list[int]) -> str:
        return "".join(self.characters[i - 2] for i in t if i > 1)


class Spaced(Letters):
    """A space before each character, but none at the start of a text: as SentencePiece does with words."""

    def decode(self, t: list[int]) -> str:
        return "".join(" " + self.characters[i - 2] for i in t if i > 1).removeprefix(" ")


class Spelled(Letters):
    """Id 2 + i has the i-th of the given texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def decode(self, t: list[int]) -> str:
        return "".join(self.texts[i - 2] for i in t if 2 <= i < 2 + len(self.texts))


def some_prompts(lens: Sequence[int] = LENS, seed: int = 1, vocab_size: int = VOCAB) -> list[list[int]]:
    return [p.tolist() for p in ragged(lens, vocab_size, seed)]


@functools.cache
def random_model(max_batch_size: int = 0, vocab_size: int = VOCAB) -> Transformer:
    """A random model that likes to make eos now and then. Shared: leave it as it is."""
    model = tiny_model(tiny_args(max_batch_size=max_batch_size, vocab_size=vocab_size), seed=3)
    with torch.no_grad():
        model.output.weight[Letters.eos_id] *= 4
    return model


def chain_model(follows: Callable[[int], int], max_batch_size: int = 0) -> Transformer:
    """A model that makes follows(t) after t, whatever came before, with a probability of 1 - 1e-9 or so."""
    model = tiny_model(tiny_args(dim=64, max_batch_size=max_batch_size))
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.wo.weight.zero_()
            layer.feed_forward.w2.weight.zero_()
        model.norm.weight.fill_(1)
        model.tok_embeddings.weight.copy_(torch.eye(VOCAB, 64))
        model.output.weight.zero_()
        for t in range(VOCAB):
            model.output.weight[follows(t) % VOCAB, t] = 4
    return model


def alphabet_model(max_batch_size: int = 0) -> Transformer:
    """Continues the characters of Letters in order, and begins with the first after bos or eos."""
    return chain_model(lambda t: 2 if t < 2 or t == VOCAB - 1 else t + 1, max_batch_size)


class Meter:
    """What a model was asked to do."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, ...]] = []  # tokens that each row brought
        self.rows: list[int] = []  # rows that went into the output matrix, product by product

    @property
    def fed(self) -> int:
        return sum(map(sum, self.steps))


@contextlib.contextmanager
def metered(model: Transformer) -> Iterator[Meter]:
    meter, step = Meter(), model.step

    def counting(input_ids: torch.Tensor, plan: Any, cache: Any) -> torch.Tensor:
        assert len(input_ids) == sum(plan.seqlens)
        meter.steps.append(plan.seqlens)
        return step(input_ids, plan, cache)

    hook = model.output.register_forward_hook(lambda _m, args, _o: meter.rows.append(len(args[0])))
    model.step = counting  # type: ignore[method-assign]
    try:
        yield meter
    finally:
        del model.step
        hook.remove()


def true_logprobs(model: Transformer, ids: Sequence[int]) -> np.ndarray:
    return truth(model.state_dict(), model.args, torch.tensor(ids))[0]


def chosen_by_hand(logprobs: np.ndarray, uniform: Callable[[], float], mode: dict[str, Any]) -> int:
    """One token, straight from what the sampling module says of itself, in float64."""
    if mode["temperature"] == 0:
        return int(logprobs.argmax())
    weights = np.exp((logprobs - logprobs.max()) / mode["temperature"])
    weights = weights / weights.sum()
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))[: mode["top_k"]]
    total, before, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if before <= mode["top_p"] * total and weights[i] >= mode["min_p"] * weights[order[0]]:
            kept.append(i)
        before += weights[i]
    target = uniform() * sum(weights[i] for i in kept)
    for i in kept:
        target -= weights[i]
        if target < 0:
            return i
    return kept[-1]


def by_hand(
    model: Transformer, prompt: Sequence[int], limit: int, mode: dict[str, Any]
) -> tuple[list[int], list[float], str]:
    """Ids, log-probs and finish reason, recomputing everything for each token in float64, one prompt at a time."""
    uniform = RequestRng(mode.get("seed", 0))
    made: list[int] = []
    logprobs: list[float] = []
    while len(made) < limit:
        row = true_logprobs(model, [*prompt, *made])[-1]
        token = chosen_by_hand(row, uniform, mode)
        if token == Letters.eos_id:
            return made, logprobs, "stop"
        made.append(token)
        logprobs.append(float(row[token]))
    return made, logprobs, "length"


@functools.cache
def expected(sampled: bool) -> list[tuple[list[int], list[float], str]]:
    model, mode = random_model(), SAMPLED if sampled else GREEDY
    return [by_hand(model, p, n, mode) for p, n in zip(some_prompts(), LIMITS, strict=True)]


def assert_close(got: Sequence[float], want: Sequence[float]) -> None:
    assert len(got) == len(want)
    assert np.allclose(got, want, rtol=0, atol=TOLERANCE), (got, want)


def assert_same(got: Completion, want: tuple[list[int], list[float], str]) -> None:
    assert (got.tokens, got.finish_reason) == (want[0], want[2])
    assert_close(got.logprobs, want[1])


# What a prompt is continued with depends on the prompt, its parameters and the seed alone.


@pytest.mark.parametrize("sampled", [False, True])
def test_the_reference_is_worth_comparing_with(sampled: bool) -> None:
    results = expected(sampled)
    assert {reason for _, _, reason in results} == {"stop", "length"}
    assert any(len(p) + len(r[0]) > 2 * W + W for p, r in zip(some_prompts(), results, strict=True))
    assert len({i for made, _, _ in results for i in made}) > 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("max_batch_size", [0, 1, 3])
def test_batch_and_queue_match_float64_one_by_one(
    max_batch_size: int, chunk_size: int | None, mode: dict[str, Any]
) -> None:
    model = random_model(max_batch_size)
    done = complete(some_prompts(), model, Letters(), max_tokens=LIMITS, chunk_size=chunk_size, **mode)
    assert len(done) == len(LENS)
    for got, want in zip(done, expected(mode is SAMPLED), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_alone_and_in_another_order(mode: dict[str, Any]) -> None:
    prompts, model, want = some_prompts(), random_model(2), expected(mode is SAMPLED)
    for i, limit in enumerate(LIMITS):
        assert_same(complete([prompts[i]], model, Letters(), max_tokens=limit, **mode)[0], want[i])
        order = random.Random(i).sample(range(len(prompts)), len(prompts))
        mixed = complete(
            [prompts[j] for j in order], model, Letters(), max_tokens=[LIMITS[j] for j in order], chunk_size=3, **mode
        )
        for got, j in zip(mixed, order, strict=True):
            assert_same(got, want[j])


def test_a_seed_belongs_to_a_request() -> None:
    """The same seed, the same text for the same prompt; other seeds, samples and no seed give others."""
    model, prompt = random_model(), some_prompts()[2]
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "top_p": 1.0}
    same = complete([prompt] * 3, model, Letters(), seed=0, **options)
    assert len({tuple(c.tokens) for c in same}) == 1
    drawn = [c for seed in (0, 1) for c in complete([prompt], model, Letters(), seed=seed, n=4, **options)]
    assert len({tuple(c.tokens) for c in drawn}) == 8
    assert [c.sample for c in drawn] == [0, 1, 2, 3] * 2
    assert drawn[0].tokens == same[0].tokens
    assert len({tuple(c.tokens) for c in complete([prompt] * 4, model, Letters(), **options)}) == 4
    assert len({tuple(c.tokens) for c in complete([prompt], model, Letters(), n=4, **options)}) == 4


def test_samples_of_several_prompts_come_in_order() -> None:
    """Each sample is what it is alone, in whatever rows and steps the others are."""
    model, prompts = random_model(2), some_prompts()[:3]
    each = [SamplingParams(n=n, seed=5, max_tokens=4 + n, temperature=1.5, top_p=1.0) for n in (2, 1, 3)]
    done = complete(prompts, model, Letters(), params=each)
    assert [(c.prompt_tokens, c.sample) for c in done] == [
        (prompt, sample) for prompt, one in zip(prompts, each, strict=True) for sample in range(one.n)
    ]
    alone = [
        c for prompt, one in zip(prompts, each, strict=True) for c in complete([prompt], model, Letters(), params=one)
    ]
    assert [c.tokens for c in done] == [c.tokens for c in alone]
    pieces = list(stream(prompts, model, Letters(), params=each))
    assert {(p.index, p.sample) for p in pieces} == {(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)}
    for c, index in zip(done, (0, 0, 1, 2, 2, 2), strict=True):
        mine = [p for p in pieces if (p.index, p.sample) == (index, c.sample)]
        assert "".join(p.text for p in mine) == c.text
        assert [p.token.id for p in mine if p.token] == c.tokens
        assert [p.finish_reason for p in mine if p.finish_reason] == [c.finish_reason]


def test_params_for_all_one_each_and_by_name() -> None:
    model, prompts = alphabet_model(), ["a", "b"]

    def texts(**options: Any) -> list[str]:
        return [c.text for c in complete(prompts, model, Letters(), **options)]

    one = SamplingParams(max_tokens=2, temperature=0)
    assert texts(params=one) == ["bc", "cd"]
    assert texts(params=one, max_tokens=3) == ["bcd", "cde"]
    assert texts(params=one, max_tokens=[3, 1]) == ["bcd", "c"]
    each = [one, SamplingParams(max_tokens=4, temperature=0, stop="e")]
    assert texts(params=each) == ["bc", "cd"]
    assert texts(params=each, max_tokens=1) == ["b", "c"]
    assert texts(params=each, max_tokens=(5, 1)) == ["bcdef", "c"]
    assert texts(params=each, stop="z") == ["bc", "cdef"]
    assert [c.text for c in complete(iter(prompts), model, Letters(), max_tokens=[1, 2], temperature=0)] == ["b", "cd"]
    for wrong, message in (
        ({"params": [one]}, "1 value of params for 2 prompts"),
        ({"params": [one, None]}, "params is"),
        ({"params": "greedy"}, "params is 'greedy'"),
    ):
        with pytest.raises(MistralError, match=message):
            texts(**wrong)
    with pytest.raises(TypeError, match="tempurature"):
        texts(tempurature=1)


def test_each_prompt_has_its_own_stop_strings_and_top_logprobs() -> None:
    each = [
        SamplingParams(max_tokens=5, temperature=0, stop="d", top_logprobs=2),
        SamplingParams(max_tokens=5, temperature=0),
        SamplingParams(max_tokens=5, temperature=0, stop=("gh", "x"), top_logprobs=1),
    ]
    done = complete(["a", "b", "e"], alphabet_model(2), Letters(), params=each)
    assert [c.text for c in done] == ["bc", "cdefg", "f"]
    assert [{len(top) for top in c.top_logprobs} for c in done] == [{2}, {0}, {1}]


class Several(Letters):
    eos_ids = (4, 9)


def test_a_tokenizer_with_several_ends() -> None:
    """`eos_ids` are the ends where a tokenizer has them, and the caller's are where given."""
    done = complete([[2], [5], [10]], alphabet_model(), Several(), max_tokens=6, **GREEDY)
    assert [c.tokens for c in done] == [[3], [6, 7, 8], [11, 12, 13, 14, 15, 16]]
    assert [c.finish_reason for c in done] == ["stop", "stop", "length"]
    done = complete([[2], [5]], alphabet_model(), Several(), max_tokens=6, eos_ids=[7], **GREEDY)
    assert [c.tokens for c in done] == [[3, 4, 5, 6], [6]]


def test_shared_steps_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "STEP_TOKENS", 8)
    model = random_model(3)
    with metered(model) as meter:
        done = complete(some_prompts(), model, Letters(), max_tokens=LIMITS, **GREEDY)
    for got, want in zip(done, expected(False), strict=True):
        assert_same(got, want)
    assert max(sum(step) for step in meter.steps) <= 8 + 2
    assert any(1 in step and max(step) > 1 for step in meter.steps)  # some decode while others take in their prompts


@pytest.mark.parametrize("chunk_size", [0, 1, 2, 3])
def test_a_row_is_taken_over_when_its_sequence_ends(chunk_size: int) -> None:
    """A queue may not take the steps of the prompts one after the other, nor wait for the whole batch."""
    prompts, limits = [[2]] * 4, [9, 1, 1, 6]
    model = alphabet_model(2)
    with metered(model) as meter:
        complete(prompts, model, Letters(), max_tokens=limits, chunk_size=chunk_size or None, **GREEDY)
    assert len(meter.steps) == 9  # row 0: 9 tokens; row 1: 1 + 1 + 6
    assert meter.fed == sum(limits)


# Log-probabilities of prompts, and generate().


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("max_batch_size", [0, 2])
def test_prompts_are_scored_like_the_truth(max_batch_size: int, chunk_size: int | None) -> None:
    prompts, model = some_prompts(), random_model(max_batch_size)
    texts, scores = generate(prompts, model, Letters(), max_tokens=0, chunk_size=chunk_size)
    assert texts == []
    assert [len(s) for s in scores] == [n - 1 for n in LENS]
    for prompt, got in zip(prompts, scores, strict=True):
        table = true_logprobs(model, prompt)
        assert_close(got, [table[i, prompt[i + 1]] for i in range(len(prompt) - 1)])


def test_generate_scores_prompt_and_continuation() -> None:
    prompts, model, tokenizer = some_prompts(), random_model(3), Letters()
    texts, scores = generate(prompts, model, tokenizer, max_tokens=6, chunk_size=4, temperature=0)
    done = complete(prompts, model, tokenizer, max_tokens=6, **GREEDY)
    assert {c.finish_reason for c in done} == {"stop", "length"}
    for prompt, text, got, c in zip(prompts, texts, scores, done, strict=True):
        whole = [*prompt, *c.tokens]
        assert text == tokenizer.decode(whole)
        table = true_logprobs(model, whole)
        assert_close(got, [table[i, whole[i + 1]] for i in range(len(whole) - 1)])


def test_generate_samples_as_complete_does() -> None:
    prompts, model, tokenizer = some_prompts(), random_model(), Letters()
    texts, _ = generate(prompts, model, tokenizer, max_tokens=9, temperature=1.5, top_p=0.95, seed=5)
    done = complete(prompts, model, tokenizer, max_tokens=9, temperature=1.5, top_p=0.95, seed=5)
    assert texts == [tokenizer.decode(p) + c.text for p, c in zip(prompts, done, strict=True)]
    others, _ = generate(prompts, model, tokenizer, max_tokens=9, temperature=1.5, top_p=0.95, seed=6)
    assert texts != others


def test_long_prompts_are_scored_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, model = some_prompts(), random_model()
    _, want = generate(prompts, model, Letters(), max_tokens=0)
    monkeypatch.setattr(engine, "LOGIT_FLOATS", 3 * VOCAB + 1)
    with metered(model) as meter:
        _, got = generate(prompts, model, Letters(), max_tokens=0)
    assert max(meter.rows) == 3
    assert sum(meter.rows) == sum(LENS) - len(LENS)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


# Ends.


def test_eos_ends_each_row_by_itself_and_is_neither_returned_nor_counted() -> None:
    """Letters up to e, then eos; after eos the model would go on with a."""
    model = chain_model(lambda t: 1 if t == 6 else 2 if t < 2 else t + 1, max_batch_size=2)
    tokenizer = Letters()
    prompts = ["a", "d", "e", "f"]
    with metered(model) as meter:
        done = complete(prompts, model, tokenizer, max_tokens=4, **GREEDY)
    assert [c.text for c in done] == ["bcde", "e", "", "ghij"]
    assert [c.tokens for c in done] == [tokenizer.encode(text) for text in ("bcde", "e", "", "ghij")]
    assert [len(c.logprobs) for c in done] == [len(c.top_logprobs) for c in done] == [4, 1, 0, 4]
    # "a" has its 4 tokens before eos would come.
    assert [c.finish_reason for c in done] == ["length", "stop", "stop", "length"]
    assert len(meter.steps) == 2 + 1 + 4  # the rows that d and e leave are taken over
    texts, scores = generate(prompts, model, tokenizer, max_tokens=5, temperature=0)
    assert texts == ["abcde", "de", "e", "fghijk"]
    assert [len(s) for s in scores] == [1 + 4, 1 + 1, 1, 1 + 5]
    assert complete(["a"], model, tokenizer, max_tokens=5, **GREEDY)[0].finish_reason == "stop"


def test_a_row_of_the_output_matrix_forces_eos() -> None:
    model = tiny_model(tiny_args(), seed=4)
    with torch.no_grad():
        model.norm.weight[0], model.tok_embeddings.weight[:, 0] = 1, 50
        model.output.weight[:, 0] = 0
        model.output.weight[Letters.eos_id] = torch.eye(24)[0] * 50  # reads only the first channel, which is large
    for mode in (GREEDY, SAMPLED):
        for c in complete(some_prompts(), model, Letters(), max_tokens=5, **mode):
            assert (c.text, c.tokens, c.logprobs, c.finish_reason) == ("", [], [], "stop")


def test_eos_inside_a_prompt_stops_nothing() -> None:
    prompts = [[0, 5, 1, 6], [0, 5, 1], [1], [1, 1, 9]]
    for chunk_size in (None, 1, 2):
        done = complete(prompts, alphabet_model(), Letters(), max_tokens=3, chunk_size=chunk_size, **GREEDY)
        assert [c.text for c in done] == ["fgh", "abc", "abc", "ijk"]
        assert [c.prompt_tokens for c in done] == prompts
    _, scores = generate(prompts, alphabet_model(), Letters(), max_tokens=0)
    assert [len(s) for s in scores] == [3, 2, 0, 2]


def test_without_an_eos_id_nothing_stops() -> None:
    tokenizer = Letters()
    tokenizer.eos_id = None  # type: ignore[assignment]
    (c,) = complete([[6]], chain_model(lambda t: 1), tokenizer, max_tokens=4, **GREEDY)
    assert (c.tokens, c.finish_reason) == ([1, 1, 1, 1], "length")


def test_each_prompt_has_its_own_max_tokens() -> None:
    prompts, limits = ["a", "b", "c", "d", "e"], [3, 0, 1, 0, 2]
    for max_batch_size in (0, 1, 2):
        model = alphabet_model(max_batch_size)
        with metered(model) as meter:
            done = complete(prompts, model, Letters(), max_tokens=limits, **GREEDY)
        assert [c.text for c in done] == ["bcd", "", "d", "", "fg"]
        assert {c.finish_reason for c in done} == {"length"}
        assert done[1] == Completion("", [], [], [], "length", [0, 3])
        assert meter.fed == 2 * 3 + (3 - 1) + (1 - 1) + (2 - 1)  # nothing of the prompts that ask for nothing


def test_max_tokens_0_for_all_runs_nothing() -> None:
    model = alphabet_model()
    with metered(model) as meter:
        assert list(stream(["a", "b"], model, Letters(), max_tokens=0)) == [
            Piece(0, "", None, "length"),
            Piece(1, "", None, "length"),
        ]
    assert meter.steps == []


# Prompts and tokenizers.


def test_strings_get_bos_and_ids_are_taken_as_they_are() -> None:
    model, tokenizer = alphabet_model(), Letters()
    prompts: list[Any] = ["ab", [2, 3], (2, 3), torch.tensor([2, 3]), np.array([2, 3]), range(2, 4), ""]
    done = complete(prompts, model, tokenizer, max_tokens=2, **GREEDY)
    assert [c.prompt_tokens for c in done] == [[0, 2, 3], *[[2, 3]] * 5, [0]]
    assert [c.text for c in done] == [*["cd"] * 6, "ab"]
    assert all(type(i) is int for c in done for i in c.prompt_tokens + c.tokens)
    _, scores = generate(prompts, model, tokenizer, max_tokens=0)
    assert [len(s) for s in scores] == [2, 1, 1, 1, 1, 1, 0]


class WithBos(Letters):
    def encode(self, s: str, bos: bool = False) -> list[int]:
        return [self.bos_id] * bos + super().encode(s)


class WithBosAndEos(Letters):
    """As mistral-common's: both switches must be given."""

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        return [self.bos_id] * bos + super().encode(s) + [self.eos_id] * eos


class WithEos(Letters):
    def encode(self, s: str, *, eos: bool = True) -> list[int]:
        return super().encode(s) + [self.eos_id] * eos


@pytest.mark.parametrize("kind", [Letters, WithBos, WithBosAndEos, WithEos])
def test_any_tokenizer_gets_one_bos_and_no_eos(kind: type[Letters]) -> None:
    (c,) = complete(["ab"], alphabet_model(), kind(), max_tokens=2, **GREEDY)
    assert (c.prompt_tokens, c.text) == ([0, 2, 3], "cd")
    assert generate(["ab"], alphabet_model(), kind(), max_tokens=2, temperature=0)[0] == ["abcd"]


# Stop strings.


@pytest.mark.parametrize(
    ("stop", "text", "made", "reason"),
    [
        ((), "bcdefghi", 8, "length"),
        (["e"], "bcd", 4, "stop"),
        (["def"], "bc", 5, "stop"),  # split across three tokens
        (["bc"], "", 2, "stop"),  # at the beginning
        (["b"], "", 1, "stop"),
        (["ab"], "bcdefghi", 8, "length"),  # begins in the prompt: not seen
        (["xyz"], "bcdefghi", 8, "length"),
        (["hij"], "bcdefghi", 8, "length"),  # its beginning is held back and comes out in the end
        (["ghi"], "bcdef", 8, "stop"),  # complete with the last token
        (["zz", "gh", "efghi", "dx"], "bcdef", 7, "stop"),  # gh is complete first; ef was held back for efghi
        (["fg", "efg"], "bcd", 6, "stop"),  # both complete at once: the earlier one cuts
        ("de", "bc", 4, "stop"),  # one string is one stop string
    ],
)
def test_stop_strings(stop: Any, text: str, made: int, reason: str) -> None:
    model = alphabet_model()
    with metered(model) as meter:
        (c,) = complete(["a"], model, Letters(), max_tokens=8, stop=stop, **GREEDY)
    assert (c.text, c.finish_reason) == (text, reason)
    assert c.tokens == Letters().encode("bcdefghi"[:made])
    assert len(c.logprobs) == made
    assert len(meter.steps) == made  # the model stops too


def test_a_stop_string_ends_one_row_and_leaves_the_others() -> None:
    prompts = ["a", "d", "g", "l"]
    for max_batch_size in (0, 1, 2):
        model = alphabet_model(max_batch_size)
        done = complete(prompts, model, Letters(), max_tokens=5, stop=["hi", "fg"], **GREEDY)
        assert [c.text for c in done] == ["bcde" + "f", "e", "", "mnopq"]
        assert [c.finish_reason for c in done] == ["length", "stop", "stop", "length"]


@functools.cache
def counting_model() -> Transformer:
    return alphabet_model()


@example(texts=["a", "a", "a", "b"], stops=["aab"])  # a longer beginning is held back, not a shorter one
@example(texts=["ab", "ab", "b"], stops=["abb", "ba"])
@given(
    texts=st.lists(st.text("ab", max_size=3), min_size=1, max_size=9),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_of_any_shape(texts: list[str], stops: list[str]) -> None:
    """Cut at the first stop string to be complete; what is shown before is all that no stop string can claim."""
    pieces = list(
        stream([[0]], counting_model(), Spelled(texts), max_tokens=len(texts), stop=stops, top_logprobs=1, **GREEDY)
    )
    shown = whole = ""
    for n, text in enumerate(texts, 1):
        whole += text
        shown += pieces[n - 1].text
        found = [whole.find(s) for s in stops if s in whole]
        if found:
            assert (shown, len(pieces), pieces[-1].text) == (whole[: min(found)], n + 1, "")
            assert pieces[-1].finish_reason == "stop"
            return
        claimed = max((k for s in stops for k in range(len(s)) if whole.endswith(s[:k])), default=0)
        assert shown == whole[: len(whole) - claimed]
    assert shown + pieces[-1].text == whole
    assert (len(pieces), pieces[-1].finish_reason) == (len(texts) + 1, "length")


def test_a_stop_string_in_what_was_held_back_until_the_end() -> None:
    """U+FFFD at the end may be half a character, so only the end shows that it is the stop string."""
    (c,) = complete([[0]], counting_model(), Spelled(["a", "b\ufffd"]), max_tokens=2, stop=["\ufffd"], temperature=0)
    assert (c.text, c.tokens, c.finish_reason) == ("ab", [2, 3], "stop")
    (c,) = complete([[0]], counting_model(), Spelled(["a", "b\ufffd"]), max_tokens=2, stop=["x"], temperature=0)
    assert (c.text, c.tokens, c.finish_reason) == ("ab\ufffd", [2, 3], "length")


# Top log-probs, streams.


def test_top_logprobs_are_the_truths() -> None:
    prompts, model = some_prompts(), random_model(3)
    done = complete(prompts, model, Letters(), max_tokens=LIMITS, top_logprobs=4, **SAMPLED)
    plain = complete(prompts, model, Letters(), max_tokens=LIMITS, **SAMPLED)
    assert [c.tokens for c in done] == [c.tokens for c in plain]
    assert any(c.tokens for c in done)
    for prompt, c, without in zip(prompts, done, plain, strict=True):
        assert without.top_logprobs == [{}] * len(c.tokens)
        assert len(c.top_logprobs) == len(c.tokens)
        for n, (token, logprob, top) in enumerate(zip(c.tokens, c.logprobs, c.top_logprobs, strict=True)):
            row = true_logprobs(model, [*prompt, *c.tokens[:n]])[-1]
            assert list(top) == np.argsort(-row)[:4].tolist()
            assert_close(list(top.values()), [row[i] for i in top])
            assert token not in top or top[token] == logprob


def test_all_top_logprobs_sum_to_one_and_the_first_is_the_greedy_one() -> None:
    (c,) = complete([[5, 9]], random_model(), Letters(), max_tokens=3, top_logprobs=VOCAB, **GREEDY)
    for token, logprob, top in zip(c.tokens, c.logprobs, c.top_logprobs, strict=True):
        assert next(iter(top.items())) == (token, logprob)
        assert sorted(top) == list(range(VOCAB))
        assert math.fsum(map(math.exp, top.values())) == pytest.approx(1, abs=1e-5)


def test_top_logprobs_break_ties_as_greedy_does() -> None:
    model = tiny_model(tiny_args())
    with torch.no_grad():
        model.output.weight.zero_()
    (c,) = complete([[5, 9]], model, Letters(), max_tokens=2, top_logprobs=3, **GREEDY)
    assert c.tokens == [0, 0]
    assert [list(top) for top in c.top_logprobs] == [[0, 1, 2]] * 2


@functools.cache
def text_model(max_batch_size: int) -> tuple[Transformer, Tokenizer]:
    tokenizer = Tokenizer(BUNDLED)
    return tiny_model(tiny_args(max_batch_size=max_batch_size, vocab_size=tokenizer.n_words), seed=8), tokenizer


@pytest.mark.parametrize("max_batch_size", [0, 2])
def test_pieces_join_to_the_text_and_the_text_to_the_ids(max_batch_size: int) -> None:
    """Random ids of a real tokenizer: bytes that are no characters, control ids, leading spaces."""
    model, tokenizer = text_model(max_batch_size)
    prompts: list[Any] = ["Once upon", "", [1, 2, 2, 1], [300, 300], "déjà 🙂", [2] * 12]
    options: dict[str, Any] = {"max_tokens": [30, 25, 0, 40, 8, 30], "temperature": 1.5, "top_p": 1.0, "seed": 2}
    done = complete(prompts, model, tokenizer, **options)
    made = [i for c in done for i in c.tokens]
    assert any(3 <= i < 259 for i in made), "no byte was drawn: choose another seed"
    joined = [""] * len(prompts)
    tokens: list[list[int]] = [[] for _ in prompts]
    ended: dict[int, str] = {}
    for piece in stream(prompts, model, tokenizer, **options):
        assert piece.index not in ended, "a piece after the last one"
        joined[piece.index] += piece.text
        if piece.token is not None:
            assert piece.token.index == piece.index
            assert not piece.text.endswith("\ufffd")
            tokens[piece.index].append(piece.token.id)
        if piece.finish_reason:
            ended[piece.index] = piece.finish_reason
    assert [ended[i] for i in range(len(prompts))] == [c.finish_reason for c in done]
    for c, text, ids in zip(done, joined, tokens, strict=True):
        assert (c.text, c.tokens) == (text, ids)
        assert text == tokenizer.decode(c.prompt_tokens + ids)[len(tokenizer.decode(c.prompt_tokens)) :]
    texts, _ = generate(prompts, model, tokenizer, max_tokens=20, temperature=1.5, top_p=1.0, seed=2)
    short = complete(prompts, model, tokenizer, max_tokens=20, temperature=1.5, top_p=1.0, seed=2)
    assert texts == [tokenizer.decode(c.prompt_tokens) + c.text for c in short]


def test_the_text_goes_on_where_the_prompt_ends() -> None:
    prompts = ["a", "", [5, 1, 9], [5, *[1] * 9, 9], [1] * 9]
    done = complete(prompts, alphabet_model(), Spaced(), max_tokens=3, **GREEDY)
    assert [c.text for c in done] == [" b c d", "a b c", " i j k", " i j k", "a b c"]
    done = complete([[5, *[1] * 20]], alphabet_model(), Spaced(), max_tokens=3, **GREEDY)
    assert [c.text for c in done] == [" a b c"]
    texts, _ = generate(prompts, alphabet_model(), Spaced(), max_tokens=3, temperature=0)
    assert texts == ["a b c d", "a b c", "d h i j k", "d h i j k", "a b c"]


def test_a_stream_hands_out_each_token_when_it_is_made() -> None:
    model = alphabet_model()
    with metered(model) as meter:
        pieces = stream(["a", "k"], model, Letters(), max_tokens=3, **GREEDY)
        assert meter.steps == []
        seen = []
        for piece in pieces:
            seen.append((piece.index, piece.text, len(meter.steps), piece.finish_reason))
    assert seen == [
        (0, "b", 1, None),
        (1, "l", 1, None),
        (0, "c", 2, None),
        (1, "m", 2, None),
        (0, "d", 3, None),
        (1, "n", 3, None),
        (0, "", 3, "length"),
        (1, "", 3, "length"),
    ]


def test_closing_a_stream_early() -> None:
    prompts, model = some_prompts(), random_model(2)
    with metered(model) as meter:
        pieces = stream(prompts, model, Letters(), max_tokens=LIMITS, **SAMPLED)
        next(pieces)
        steps = len(meter.steps)
        pieces.close()  # type: ignore[attr-defined]
        assert list(pieces) == []
        assert len(meter.steps) == steps == 1
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    for got, want in zip(
        complete(prompts, model, Letters(), max_tokens=LIMITS, **SAMPLED), expected(True), strict=True
    ):
        assert_same(got, want)


def test_two_streams_side_by_side() -> None:
    prompts, model = some_prompts(), random_model(2)
    first = stream(prompts, model, Letters(), max_tokens=LIMITS, **SAMPLED)
    second = stream(prompts, model, Letters(), max_tokens=LIMITS, **SAMPLED)
    for one, other in zip(first, second, strict=True):
        assert one == other


# Seeds and global state.


def all_state() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        [name, keys.tolist(), *rest],
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    ]


def test_global_state_is_left_alone() -> None:
    """At temperature 0, and with a seed; without one, a number a request is drawn, and nothing else moves."""
    model = random_model()
    before = all_state()
    complete(some_prompts(), model, Letters(), max_tokens=3, **GREEDY)
    generate(some_prompts(), model, Letters(), max_tokens=3, temperature=0)
    generate(some_prompts(), model, Letters(), max_tokens=3, seed=0)
    complete(some_prompts(), model, Letters(), max_tokens=3, **SAMPLED)
    assert all_state() == before
    with torch.random.fork_rng():
        complete(some_prompts(), model, Letters(), max_tokens=3, temperature=1)
        after = all_state()
        assert after[0] != before[0]
        assert after[1:] == before[1:]


def test_without_a_seed_torch_manual_seed_decides() -> None:
    model, prompts = random_model(), some_prompts()

    def tokens() -> list[list[int]]:
        done = complete(prompts, model, Letters(), max_tokens=8, temperature=1.5, top_p=1.0)
        return [c.tokens for c in done]

    with torch.random.fork_rng():
        torch.manual_seed(11)
        first, second = tokens(), tokens()
        torch.manual_seed(11)
        assert tokens() == first
        assert second != first
        torch.manual_seed(12)
        assert tokens() != first
        torch.manual_seed(11)
        one, _ = generate(prompts, model, Letters(), max_tokens=8, temperature=1.5)
        torch.manual_seed(11)
        assert generate(prompts, model, Letters(), max_tokens=8, temperature=1.5)[0] == one


def test_seed_0_is_a_seed() -> None:
    model = random_model()
    with torch.random.fork_rng():
        made = []
        for global_seed in (1, 2):
            torch.manual_seed(global_seed)
            made.append(complete(some_prompts(), model, Letters(), max_tokens=8, temperature=1.5, seed=0))
    assert made[0] == made[1]


# Errors.

BAD: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "no prompts"),
    ((), {}, "no prompts"),
    ("a plain string", {}, "one string"),
    ([[]], {}, "prompt 0 has no tokens"),
    ([[2], []], {}, "prompt 1 has no tokens"),
    ([[2], [3, VOCAB]], {}, f"prompt 1 has the id {VOCAB}"),
    ([[2, -1]], {}, "id -1"),
    ([2, 3], {}, "prompt 0 is 2; it must be a string or a list of ids"),
    ([[2], [3, 4.5]], {}, r"prompt 1 is \[3, 4.5\]"),
    ([["2"]], {}, "prompt 0 is"),
    ([[2]], {"max_tokens": 2.5}, "max_tokens is 2.5"),
    ([[2]], {"max_tokens": [2.5]}, "whole number"),
    ([[2]], {"max_tokens": None}, "max_tokens is None"),
    ([[2]], {"max_tokens": -1}, "max_tokens is -1"),
    ([[2], [3]], {"max_tokens": [4, -2]}, "max_tokens is -2"),
    ([[2], [3]], {"max_tokens": [4]}, "1 value of max_tokens for 2 prompts"),
    ([[2]], {"max_tokens": [4, 4]}, "2 values of max_tokens for 1 prompt"),
    ([[2]], {"chunk_size": 0}, "chunk_size is 0"),
    ([[2]], {"chunk_size": -3}, "chunk_size is -3"),
    ([[2]], {"temperature": -0.1}, "temperature is -0.1"),
    ([[2]], {"temperature": math.nan}, "temperature is nan"),
    ([[2]], {"temperature": math.inf}, "temperature is inf"),
    ([[2]], {"top_p": -0.1}, "top_p is -0.1"),
    ([[2]], {"top_p": 1.1}, "top_p is 1.1"),
    ([[2]], {"top_p": math.nan}, "top_p is nan"),
    ([[2]], {"top_k": -1}, "top_k is -1"),
    ([[2]], {"min_p": 1.5}, "min_p is 1.5"),
    ([[2]], {"stop": [""]}, "stop has an empty text"),
    ([[2]], {"stop": ""}, "stop has an empty text"),
    ([[2]], {"stop": ["x", ""]}, "stop has an empty text"),
    ([[2]], {"top_logprobs": -1}, "top_logprobs is -1"),
    ([[2]], {"top_logprobs": VOCAB + 1}, f"top_logprobs is {VOCAB + 1}"),
]


@pytest.mark.parametrize(("prompts", "options", "message"), BAD)
def test_errors_come_before_anything_is_computed(prompts: Any, options: dict[str, Any], message: str) -> None:
    model = random_model()
    with metered(model) as meter:
        with pytest.raises(ValueError, match=message):
            stream(prompts, model, Letters(), **options)  # not even iterated
        with pytest.raises(ValueError, match=message):
            complete(prompts, model, Letters(), **options)
        if not options.keys() - {"max_tokens", "chunk_size", "temperature", "top_p"}:
            with pytest.raises(ValueError, match=message):
                generate(prompts, model, Letters(), **{"max_tokens": 3, **options})
    assert meter.steps == []


@pytest.mark.parametrize("mode", MODES)
def test_logits_that_are_not_numbers_are_named(mode: dict[str, Any]) -> None:
    model = tiny_model(tiny_args())
    with torch.no_grad():
        model.tok_embeddings.weight[9] = math.nan
    prompts = [[2, 3, 4], [5, 9, 6]]
    assert len(complete(prompts[:1], model, Letters(), max_tokens=1, **mode)) == 1
    with pytest.raises(GenerationError, match="logits for prompt 1 are NaN"):
        complete(prompts, model, Letters(), max_tokens=2, **mode)
    with pytest.raises(GenerationError, match="1 are NaN: the weights are broken: 24 of .* of tok_embeddings.weight"):
        generate(prompts, model, Letters(), max_tokens=0)
    with torch.no_grad():
        model.tok_embeddings.weight[9] = 1
        model.output.weight.fill_(math.inf)
    with pytest.raises(GenerationError, match="logits for prompt 0 are NaN"):
        complete(prompts, model, Letters(), max_tokens=2, **mode)


# What it costs.


@pytest.mark.parametrize("made", [1, 2, 7])
@pytest.mark.parametrize(("chunk_size", "chunks"), [(None, 1), (1, 11), (4, 3), (11, 1), (12, 1)])
def test_one_forward_a_token_and_the_last_is_not_fed(chunk_size: int | None, chunks: int, made: int) -> None:
    model, prompt = alphabet_model(), some_prompts([11])
    with metered(model) as meter:
        complete(prompt, model, Letters(), max_tokens=made, chunk_size=chunk_size, **GREEDY)
    assert len(meter.steps) == chunks + made - 1
    assert meter.fed == 11 + made - 1
    assert meter.rows == [1] * made  # the output matrix sees one row a token, none of the prompt's other rows
    with metered(model) as meter:
        generate(prompt, model, Letters(), max_tokens=made, chunk_size=chunk_size, temperature=0)
    assert len(meter.steps) == chunks + made - 1
    assert meter.fed == 11 + made - 1
    assert sum(meter.rows) == 10 + made


def test_rows_that_ended_bring_nothing() -> None:
    model, limits = alphabet_model(), [5, 1, 3]
    with metered(model) as meter:
        complete([[2, 3], [2], [2, 3, 4]], model, Letters(), max_tokens=limits, **GREEDY)
    assert meter.steps == [(2, 1, 3), (1, 0, 1), (1, 0, 1), (1, 0, 0), (1, 0, 0)]
    assert meter.rows == [3, 2, 2, 1, 1]


@pytest.mark.parametrize("window", [None, W])
@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_storage_is_allocated_once(window: int | None, max_tokens: int) -> None:
    """What the cache was made for is what is fed: it neither moves nor has room to spare."""
    for n in (1, 3, 8, 9, 10, 30):
        running = Engine(tiny_model(tiny_args(sliding_window=window)), eos_ids=(), score_prompts=True)
        for prompt in some_prompts([n, 1]):
            running.add(prompt, SamplingParams(max_tokens=max_tokens, temperature=0))
        running.step()
        assert running.cache is not None
        made = [layer.k.data_ptr() for layer in running.cache.layers]
        while not running.done:
            running.step()
        assert [layer.k.data_ptr() for layer in running.cache.layers] == made
        fed = n + max(max_tokens - 1, 0)
        assert {layer.capacity for layer in running.cache.layers} == {fed if window is None else min(fed, 2 * W - 1)}


class Pieces:
    """Ids from 2 on are byte strings that split characters anywhere, as tekken's do."""

    bos_id = 0
    eos_id = 1
    pieces = (b"a", b"b", b"X\xe6", b"\xbc", b"\xa2!", b"c", b"\xf0\x9f", b"\x99\x82d", b"e\xe6")

    def encode(self, s: str) -> list[int]:
        return [2 + self.pieces.index(s.encode())]

    def decode(self, t: list[int]) -> str:
        known = [i - 2 for i in t if 2 <= i < 2 + len(self.pieces)]
        return b"".join(self.pieces[i] for i in known).decode("utf-8", errors="replace")


def test_defaults_are_the_originals() -> None:
    parameters = inspect.signature(generate).parameters
    defaults = {name: parameters[name].default for name in ("temperature", "top_p", "chunk_size", "seed")}
    assert defaults == {"temperature": 0.7, "top_p": 0.8, "chunk_size": None, "seed": None}
    assert inspect.signature(stream).parameters["top_p"].default == 0.8


def test_a_stop_string_that_overlaps_itself() -> None:
    """Letter by letter, "aab" ends what "aaab" begins."""

    class Repeats(Letters):
        characters = "aaabcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?"

    (result,) = complete([[60]], alphabet_model(), Repeats(), max_tokens=10, temperature=0, stop=["aab"])
    whole = complete([[60]], alphabet_model(), Repeats(), max_tokens=10, temperature=0)[0].text
    assert "aaab" in whole
    assert result.text == whole[: whole.index("aab")]
    assert result.finish_reason == "stop"


@pytest.mark.parametrize(
    ("stop", "max_tokens", "text", "reason"),
    [
        ((), 8, "bX漢!c🙂de\ufffd", "length"),  # what never became a character comes out as it stands
        (("X",), 8, "b", "stop"),  # nothing of the half character after the stop string
        (("\ufffd",), 8, "bX漢!c🙂de", "stop"),  # found in what was held back until the end
        (("d",), 7, "bX漢!c🙂", "stop"),  # with the last token: it stops, whatever the length
        (("漢!",), 8, "bX", "stop"),
    ],
)
def test_tokens_of_text_and_half_a_character(stop: Any, max_tokens: int, text: str, reason: str) -> None:
    shown = list(stream(["a"], alphabet_model(), Pieces(), max_tokens=max_tokens, temperature=0, stop=stop))
    assert "".join(piece.text for piece in shown) == text
    assert not any("\ufffd" in piece.text for piece in shown if piece.token)
    assert shown[-1].finish_reason == reason


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"top_k": 2.5}, "top_k"),
        ({"temperature": "1"}, "temperature"),
        ({"chunk_size": 2.5}, "chunk_size"),
        ({"top_logprobs": 1.5}, "top_logprobs"),
        ({"stop": [3]}, "stop"),
    ],
)
def test_wrong_types_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises((GenerationError, SamplingError), match=name):
        stream([[5]], alphabet_model(), Letters(), **options)


def test_wrong_prompts_are_named() -> None:
    for prompts in (None, [b"ab"], [None]):
        with pytest.raises(GenerationError, match="prompt"):
            stream(prompts, alphabet_model(), Letters())  # type: ignore[arg-type]
