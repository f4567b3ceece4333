"""The engine: in any order of joins and leaves each request gets what it gets alone, and nothing is wasted."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistral.cache import RollingBufferCache
from mistral.engine import Engine
from mistral.model import Transformer
from mistral.request import GenerationError, Request
from mistral.sampling import RequestRng, sample
from mistral.sampling_params import SamplingParams
from mistral.util import memory
from mistral.util.memory import OutOfMemory
from tests.support.tiny import POISON, make_cache, poison_rows, tiny_args, tiny_model
from tests.text.test_generate import alphabet_model, metered

VOCAB = 61


@functools.cache
def model_of(window: Any) -> Transformer:
    """A random float64 model, so that no tie and no draw is decided by rounding."""
    return tiny_model(tiny_args(sliding_window=window, vocab_size=VOCAB), seed=5, scale=2.0).double()


def no_odd_ids(prompt_ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    """A processor: after a prompt of odd length only even ids, except as every third token."""
    if len(prompt_ids) % 2 and len(output_ids) % 3 != 2:
        logits[1::2] = -torch.inf
    return logits


@dataclass(frozen=True)
class Job:
    """A request, when it joins, and when it is stopped, in steps."""

    prompt: tuple[int, ...]
    params: SamplingParams
    eos_ids: frozenset[int]
    sample: int
    joins: int
    leaves: int | None


@functools.cache
def alone(
    window: Any, prompt: tuple[int, ...], params: SamplingParams, processed: bool, eos: frozenset[int], which: int
):
    """Tokens and finish of a request by itself: everything computed again for each token, without cache or engine."""
    model, rng, output = model_of(window), RequestRng(params.seed or 0, which), []
    while len(output) < params.max_tokens:
        ids = [*prompt, *output]
        with torch.no_grad():
            logits = model(torch.tensor(ids), [len(ids)])[-1]
        for token, bias in params.logit_bias:
            logits[token] += bias
        if processed:
            logits = no_odd_ids(list(prompt), output, logits)
        for token in set(ids):
            logits[token] *= params.repetition_penalty ** (-1 if logits[token] > 0 else 1)
        for token, count in Counter(output).items():
            logits[token] -= params.frequency_penalty * count + params.presence_penalty
        draw = 0.0 if params.temperature == 0 else rng()
        token = int(sample(logits[None], torch.tensor([draw]), params))
        if token in eos:
            return output, "stop"
        output.append(token)
    return output, "length"


some_params = st.builds(
    SamplingParams,
    max_tokens=st.integers(0, 9),
    temperature=st.sampled_from([0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.02]),
    seed=st.integers(0, 3),
    n=st.just(2),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.0, -0.4]),
    logit_bias=st.sampled_from([(), (), ((7, 4.0),)]),
    logits_processor=st.sampled_from([None, None, no_odd_ids]),
)
some_jobs = st.lists(
    st.builds(
        Job,
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=17).map(tuple),
        params=some_params,
        eos_ids=st.frozensets(st.integers(0, VOCAB - 1), max_size=12),
        sample=st.integers(0, 1),
        joins=st.integers(0, 9),
        leaves=st.one_of(st.none(), st.none(), st.integers(0, 16)),
    ),
    min_size=1,
    max_size=8,
)


def play(engine: Engine, jobs: Sequence[Job]) -> dict[Request, Job]:
    """Add and stop each request at its time, and step until all have ended, watching what is computed."""
    requests: dict[Request, Job] = {}
    output: dict[Request, list[int]] = {}
    time = 0
    with metered(engine.model) as meter:
        while len(requests) < len(jobs) or not engine.done:
            for job in (job for job in jobs if job.joins == time):
                request = engine.add(job.prompt, job.params, eos_ids=job.eos_ids, sample=job.sample)
                requests[request], output[request] = job, []
            for request, job in requests.items():
                if job.leaves is not None and job.leaves + job.joins == time:
                    engine.stop(request)
            before = {r: r.num_computed for r in requests}
            ended = [r for r in requests if r.finish]
            steps, rows = len(meter.steps), len(meter.rows)
            for token in engine.step():
                output[token.request].append(token.id)
            moved = {r: r.num_computed - n for r, n in before.items()}
            assert not any(moved[r] for r in ended)
            assert sum(map(sum, meter.steps[steps:])) == sum(moved.values())
            assert len(meter.steps) - steps <= any(moved.values())  # no step without a token
            if not engine.score_prompts:
                chosen = [r for r in requests if moved[r] and not r.prefilling and r.params.max_tokens]
                assert sum(meter.rows[rows:]) == len(chosen)
            time += 1
    assert {r: r.output_ids for r in requests} == output
    return requests


@pytest.mark.parametrize("window", [5, (None, 4)])
@given(
    jobs=some_jobs,
    rows=st.sampled_from([None, 1, 2, 3]),
    chunk_size=st.sampled_from([None, 1, 3, 6]),
    score_prompts=st.booleans(),
    positions=st.sampled_from([0, 0, 12, 40]),
)
def test_any_order_of_joins_and_leaves_gives_each_request_what_it_gets_alone(
    window: Any, jobs: list[Job], rows: int | None, chunk_size: int | None, score_prompts: bool, positions: int
) -> None:
    engine = Engine(
        model_of(window),
        eos_ids=(),
        rows=rows,
        chunk_size=chunk_size,
        score_prompts=score_prompts,
        positions=positions,
    )
    for request, job in play(engine, jobs).items():
        processed = job.params.logits_processor is not None
        want, finish = alone(window, job.prompt, job.params, processed, job.eos_ids, job.sample)
        left = job.leaves is not None and request.finish == "stop" and (request.output_ids, "stop") != (want, finish)
        assert request.output_ids == (want[: len(request.output_ids)] if left else want)
        assert request.finish == ("stop" if left else finish)
        if score_prompts and not left:
            assert len(request.prompt_logprobs) == len(job.prompt) - 1
        assert request.row is None
    assert engine.done
    assert engine.step() == []
    assert rows is None or engine.cache is None or len(engine.cache.lengths) <= rows


class Foresight:
    """A draft that knows what each request will generate, and errs where it is told to."""

    def __init__(self, right: Sequence[int], wrong: bool) -> None:
        self.right, self.wrong, self.step = right, wrong, 0
        self.truth: dict[Request, list[int]] = {}
        self.heard: list[tuple[int, int]] = []

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[list[int]]:
        self.step += 1
        right = self.right[self.step % len(self.right)]
        proposed = []
        for request in requests:
            assert not request.guesses
            done = len(request.output_ids)
            ids = self.truth[request][done : done + right]
            proposed.append(ids + [(request.output_ids[-1] + 1) % VOCAB] * 5 * self.wrong)
        return proposed

    def learn(self, requests: Sequence[Request], guessed: Sequence[int], right: Sequence[int], seconds: float) -> None:
        assert seconds > 0
        self.heard += zip(guessed, right, strict=True)


@pytest.mark.parametrize("window", [5, (None, 4), None])
@given(
    jobs=some_jobs,
    rows=st.sampled_from([1, 2, 3]),
    right=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    wrong=st.booleans(),
)
def test_a_draft_changes_no_token(window: Any, jobs: list[Job], rows: int, right: list[int], wrong: bool) -> None:
    model, draft = copy.copy(model_of(window)), Foresight(right, wrong)
    model.draft = lambda: draft
    engine = Engine(model, eos_ids=(), rows=rows)
    wants: dict[Request, tuple[list[int], str]] = {}
    for job in jobs:
        request = engine.add(job.prompt, job.params, eos_ids=job.eos_ids, sample=job.sample)
        processed = job.params.logits_processor is not None
        wants[request] = alone(window, job.prompt, job.params, processed, job.eos_ids, job.sample)
        draft.truth[request] = wants[request][0]
    got: dict[Request, list[int]] = {request: [] for request in wants}
    steps = 0
    while not engine.done:
        running = {request: row for row, request in enumerate(engine._rows) if request is not None}
        for token in engine.step():
            got[token.request].append(token.id)
        steps += 1
        for request, row in running.items():  # as after plain steps: all but the last token generated, or the end
            held = len(request.prompt_ids) + len(request.output_ids) - (request.finish != "stop")
            assert request.prefilling or request.num_computed == engine.cache.lengths[row] == held
    for request, (want, finish) in wants.items():
        assert got[request] == request.output_ids == want
        assert request.finish == finish
    if not wrong and draft.heard:
        assert all(guessed == right for guessed, right in draft.heard)
    if window is None and len(jobs) == 1 and right == [6] and not wrong:
        assert steps <= 1 + -(-len(got[request]) // 7) + (request.finish == "stop")


GREEDY = SamplingParams(max_tokens=4, temperature=0)


def test_a_request_that_was_stopped_while_it_waited_never_runs() -> None:
    model = alphabet_model(1)
    engine = Engine(model, eos_ids=())
    first, second, third = (engine.add([i], GREEDY) for i in (2, 9, 5))
    engine.stop(second)
    assert (second.finish, engine.done) == ("stop", False)
    with metered(model) as meter:
        while not engine.done:
            assert all(token.request is not second for token in engine.step())
    assert (second.output_ids, second.num_computed) == ([], 0)
    assert meter.fed == len(meter.steps) == 8
    assert [r.output_ids for r in (first, third)] == [[3, 4, 5, 6], [6, 7, 8, 9]]
    engine.stop(first)  # has ended: stays as it ended
    assert [r.finish for r in (first, second, third)] == ["length", "stop", "length"]


def test_a_request_that_is_stopped_leaves_its_row_to_one_that_waits() -> None:
    engine = Engine(alphabet_model(2), eos_ids=())
    requests = [engine.add([i], GREEDY) for i in (2, 9, 5)]
    assert [(t.index, t.id) for t in engine.step()] == [(0, 3), (1, 10)]
    engine.stop(requests[0])
    assert [(t.index, t.id) for t in engine.step()] == [(2, 6), (1, 11)]
    while not engine.done:
        engine.step()
    assert [r.finish for r in requests] == ["stop", "length", "length"]
    assert [r.output_ids for r in requests] == [[3], [10, 11, 12, 13], [6, 7, 8, 9]]


def test_short_prompts_do_not_wait_for_long_ones() -> None:
    """And equal ones are processed one after the other; the oldest goes on in every step."""
    engine = Engine(alphabet_model(5), eos_ids=(), step_tokens=8)
    asked = [engine.add([2] * n, SamplingParams(max_tokens=2, temperature=0)) for n in (40, 6, 6, 6)]
    firsts: dict[int, int] = {}
    progress = []
    for step in range(40):
        firsts |= {token.index: step for token in engine.step() if token.index not in firsts}
        progress.append(asked[0].prefill_progress[0])
    assert [firsts[i] for i in (1, 2, 3)] == [0, 1, 2]
    assert progress[:4] == [2, 4, 6, 14]
    assert firsts[0] == 7
    assert engine.done


def test_progress_of_a_prompt() -> None:
    engine = Engine(alphabet_model(), eos_ids=(), chunk_size=4)
    request = engine.add([2] * 10, GREEDY)
    seen = []
    while not engine.done:
        engine.step()
        seen.append(request.prefill_progress)
    assert seen == [(4, 10), (8, 10), *[(10, 10)] * 4]


# Rows, positions and memory.


def test_requests_that_join_later_get_rows_at_once() -> None:
    """Rows come as they are needed, at least twice as many each time; the storage seldom moves."""
    model = alphabet_model()
    engine = Engine(model, eos_ids=())
    requests, sizes = [], []
    for i in range(9):
        requests.append(engine.add([2 + i], replace(GREEDY, max_tokens=20)))
        engine.step()
        assert engine.cache is not None
        sizes.append(len(engine.cache.lengths))
    assert sizes == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    while not engine.done:
        engine.step()
    assert [r.output_ids for r in requests] == [list(range(3 + i, 23 + i)) for i in range(9)]


@pytest.mark.parametrize("window", [None, 5])
def test_positions_grow_for_longer_requests(window: int | None) -> None:
    model = model_of(window)
    engine = Engine(model, eos_ids=(), rows=2)
    short = engine.add([5] * 3, replace(GREEDY, max_tokens=30))
    engine.step()
    assert engine.cache is not None
    before = engine.cache.nbytes
    long = engine.add([6] * 40, replace(GREEDY, max_tokens=9))
    while not engine.done:
        engine.step()
    assert engine.cache.nbytes == 2 * model.args.cache_bytes(48, "float64")
    assert before == model.args.cache_bytes(32, "float64")
    for request in (short, long):
        assert request.output_ids == alone(window, tuple(request.prompt_ids), request.params, False, frozenset(), 0)[0]


def with_room(positions: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, Callable[[object], int]]:
    """An engine on a machine that has memory for so many positions of its cache, and what of that is left."""
    model = model_of(None)
    each = model.args.cache_bytes(1, "float64")
    engine = Engine(model, eos_ids=())

    def left(device: object) -> int:
        return positions * each - (0 if engine.cache is None else engine.cache.nbytes)

    monkeypatch.setattr(memory, "available", left)
    return engine, left


def test_whoever_does_not_fit_beside_others_waits_and_then_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, left = with_room(50, monkeypatch)
    first = engine.add([5] * 7, GREEDY)  # 10 positions
    engine.step()
    second = engine.add([6] * 37, GREEDY)  # 40: two rows of that do not fit
    third = engine.add([7] * 7, GREEDY)
    engine.step()
    assert (second.num_computed, third.num_computed) == (0, 0)  # in turn
    while first.finish is None:
        engine.step()
    engine.step()
    assert second.num_computed == 37
    while not engine.done:
        engine.step()
        assert left(None) >= 0
    for request in (first, second, third):
        assert request.output_ids == alone(None, tuple(request.prompt_ids), GREEDY, False, frozenset(), 0)[0]
    with pytest.raises(OutOfMemory, match="one sequence of 63 positions"):
        engine.add([5] * 60, GREEDY)
    assert engine.done


@pytest.mark.parametrize("beside", [True, False])
def test_memory_that_the_cache_has_already_is_not_asked_for_again(
    beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = with_room(50, monkeypatch)
    engine.add([5] * 27, GREEDY)  # 30 positions, so that 20 are left
    engine.step()
    while not (beside or engine.done):
        engine.step()
    longer = engine.add([6] * 37, GREEDY)  # 40: the cache's own and 10 more
    while not engine.done:
        engine.step()
    assert longer.output_ids == alone(None, tuple(longer.prompt_ids), GREEDY, False, frozenset(), 0)[0]


def test_a_cache_has_as_many_rows_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(None)
    each = model.args.cache_bytes(10, "float64")
    for left, rows in ((each, 1), (3 * each - 1, 2), (3 * each, 3), (9 * each, 4)):
        monkeypatch.setattr(memory, "available", lambda device, left=left: left)
        engine = Engine(model, eos_ids=())
        for _ in range(4):
            engine.add([5] * 7, GREEDY)  # 10 positions
        engine.step()
        assert engine.cache is not None
        assert len(engine.cache.lengths) == rows


def test_a_row_more_takes_no_more_than_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = with_room(50, monkeypatch)
    first = engine.add([5] * 17, GREEDY)  # 20 positions, so that 30 are left
    engine.step()
    second = engine.add([6] * 17, GREEDY)  # 40 for both: 20 more than there are
    engine.step()
    assert first.finish is None
    assert second.num_computed == 17


def test_rows_for_short_requests_are_as_long_as_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a cache have one length, so what more rows take is counted at the length of the longest."""
    engine, left = with_room(80, monkeypatch)
    engine.add([5] * 27, GREEDY)  # 30 positions: two such rows fit, and three do not
    engine.step()
    short = [engine.add([i], GREEDY) for i in (6, 7)]
    while not engine.done:
        engine.step()
        assert left(None) >= 0
    for request in short:
        assert request.output_ids == alone(None, tuple(request.prompt_ids), GREEDY, False, frozenset(), 0)[0]


# A cache of the caller's.


def test_a_row_is_continued_from_what_it_holds() -> None:
    model = model_of(5)
    cache = make_cache(model, 3)
    prompt, other = list(range(3, 20)), [9, 4, 9]
    with torch.inference_mode():
        model(torch.tensor(prompt[:11]), [0, 11, 0], cache)
    engine = Engine(model, eos_ids=(), cache=cache)
    held, free = engine.add(prompt, GREEDY, row=1), engine.add(other, GREEDY)
    assert held.prefill_progress == (11, 17)
    with metered(model) as meter:
        while not engine.done:
            engine.step()
    assert meter.steps[0] == (3, 6, 0)
    for request, ids in ((held, prompt), (free, other)):
        assert request.output_ids == alone(5, tuple(ids), GREEDY, False, frozenset(), 0)[0]
    assert cache.lengths == [6, 20, 0]
    # What a request leaves in its row can be continued in turn.
    longer = [*prompt, *held.output_ids, 8]
    again = engine.add(longer, GREEDY, row=1)
    assert again.num_computed == 20
    while not engine.done:
        engine.step()
    assert again.output_ids == alone(5, tuple(longer), GREEDY, False, frozenset(), 0)[0]


def test_rows_that_cannot_be_continued() -> None:
    model = model_of(5)
    cache = make_cache(model, 2)
    engine = Engine(model, eos_ids=(), cache=cache)
    with torch.inference_mode():
        model(torch.arange(5), [5], cache)
    for row, prompt, message in (
        (2, [1, 2], "no row 2"),
        (-1, [1, 2], "no row -1"),
        (0, [0, 1, 2, 3, 4], "holds 5 tokens of prompt 7, which has 5: rewind it"),
    ):
        with pytest.raises(GenerationError, match=message):
            engine.add(prompt, GREEDY, row=row, index=7)
    engine.add([1, 2], GREEDY, row=1)
    with pytest.raises(GenerationError, match="row 1 is taken"):
        engine.add([1, 2], GREEDY, row=1)
    with pytest.raises(GenerationError, match="no row 0 for prompt 0"):
        Engine(model, eos_ids=()).add([1, 2], GREEDY, row=0)


def test_a_cache_grows_and_keeps_what_it_holds() -> None:
    model = model_of((None, 4))
    ids = torch.arange(20)
    cache, roomy = make_cache(model, 1, positions=13), make_cache(model, 4, positions=60)
    with torch.inference_mode():
        model(ids[:13], [13], cache)
        model(ids[:13], [13], roomy)
        cache.grow(4, 60)
        poison_rows(cache, 2)
        for step in ([7, 0, 3, 0], [1, 2, 1, 1]):
            more = torch.arange(sum(step))
            assert torch.equal(model(more, step, cache), model(more, step, roomy))
    assert cache.lengths == roomy.lengths == [21, 2, 4, 1]
    assert cache.nbytes == roomy.nbytes
    assert POISON in cache.layers[0].k[2]


# What cannot be.


@pytest.mark.parametrize(
    ("prompt", "changes", "named", "message"),
    [
        ([], {}, {}, "prompt 0 has no tokens"),
        ([2, VOCAB], {}, {}, f"id {VOCAB}, outside"),
        ([2], {"top_logprobs": VOCAB + 1}, {}, "top_logprobs is 62"),
        ([2], {"logit_bias": {VOCAB: 1}}, {}, "logit_bias has the id 61"),
        ([2], {"n": 2}, {"sample": 2}, "sample is 2"),
        ([2], {}, {"sample": 1}, "sample is 1"),
    ],
)
def test_requests_that_are_refused(prompt: list[int], changes: dict, named: dict, message: str) -> None:
    engine = Engine(model_of(5), eos_ids=())
    with pytest.raises(GenerationError, match=message):
        engine.add(prompt, replace(GREEDY, **changes), **named)
    assert engine.done


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"rows": 1.5}, {"chunk_size": 0}, {"positions": -1}])
def test_numbers_out_of_range(wrong: dict) -> None:
    with pytest.raises(GenerationError, match=next(iter(wrong))):
        Engine(model_of(5), eos_ids=(), **wrong)


def test_logprobs_are_those_of_the_logits_as_the_model_gave_them() -> None:
    """Whatever changes the choice, temperature, penalties or biases, the log-probabilities are the model's."""
    model = model_of(5)
    params = SamplingParams(
        max_tokens=6, temperature=1.5, seed=1, top_logprobs=VOCAB, repetition_penalty=3.0, logit_bias={7: 9.0}
    )
    engine = Engine(model, eos_ids=())
    request = engine.add([4, 9, 9, 30], params)
    tokens = []
    while not engine.done:
        tokens += engine.step()
    ids = [*request.prompt_ids, *request.output_ids]
    with torch.no_grad():
        want = model(torch.tensor(ids), [len(ids)]).log_softmax(-1)[3:]
    for token, row in zip(tokens, want, strict=False):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-9)
        assert token.top[7] == pytest.approx(row[7].item(), abs=1e-9)


def test_a_given_cache_is_used() -> None:
    model = model_of(5)
    cache = RollingBufferCache(model.args, 2, dtype=model.dtype)
    engine = Engine(model, eos_ids=(), cache=cache)
    requests = [engine.add([i], GREEDY) for i in (4, 5, 6)]
    while not engine.done:
        engine.step()
    assert engine.cache is cache
    assert len(cache.lengths) == 2
    assert all(len(r.output_ids) == 4 for r in requests)
