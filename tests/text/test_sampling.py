"""Sampling: the distribution against its definition, the draw against the inverse CDF, and the edges of both."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from mistral import sampling
from mistral.logprobs import most_likely
from mistral.sampling import LogitChanges, RequestRng, distribution, sample, sample_each
from mistral.sampling_params import SamplingError, SamplingParams

BELOW_ONE = [0.99999997, 1 - 2**-24, 1.0]  # a float64 just below 1 becomes 1.0 in fp32


def logits_of(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([values], dtype=dtype)


def halves(*probs: float) -> Tensor:
    """Logits whose softmax is these probabilities but for rounding."""
    return logits_of(*(math.log(p) for p in probs))


def how(temperature: float = 0.7, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> SamplingParams:
    return SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)


def pick(params: SamplingParams, logits: Tensor, *uniforms: float) -> list[int]:
    """What each uniform number chooses from the one distribution."""
    return sample(logits.expand(len(uniforms), -1), torch.tensor(uniforms), params).tolist()


def defined(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[dict[int, float], float]:
    """The module's first paragraph, word by word: what is kept, likeliest first, and how close any decision was."""
    highest = max(logits)
    weights = [math.exp((x - highest) / temperature) for x in logits]
    total = math.fsum(weights)
    probs = [w / total for w in weights]
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))  # ties to the lowest id
    if top_k:
        order = order[:top_k]
    left = math.fsum(probs[i] for i in order)
    kept: dict[int, float] = {}
    margin = math.inf
    before = 0.0
    for i in order:
        if before:
            margin = min(margin, abs(before - top_p * left) if top_p < 1 else math.inf)
        if before <= top_p * left or top_p == 1:
            kept[i] = probs[i]
        before += probs[i]
    likeliest = probs[order[0]]
    for i in list(kept):
        if kept[i] != likeliest:
            margin = min(margin, abs(kept[i] - min_p * likeliest) if min_p else math.inf)
        if kept[i] < min_p * likeliest:
            del kept[i]
    return kept, margin


def got(params: SamplingParams, logits: Tensor) -> dict[int, float]:
    probs, ids = distribution(logits, params)
    assert probs.shape == ids.shape == logits.shape
    assert sorted(ids[0].tolist()) == list(range(logits.shape[1]))
    return {i: p for i, p in zip(ids[0].tolist(), probs[0].tolist(), strict=True) if p}


# Eighths, so that fp32 and float64 agree on what is a tie.
some_logits = st.one_of(
    st.lists(st.integers(-96, 96).map(lambda n: n / 8), min_size=1, max_size=40),
    st.lists(st.integers(-2, 2).map(float), min_size=1, max_size=40),  # full of ties
)
filters = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.05, 20),
        "top_k": st.one_of(st.just(0), st.integers(1, 45)),
        "top_p": st.one_of(st.just(1.0), st.just(0.0), st.floats(0, 1)),
        "min_p": st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1)),
    }
)


@given(logits=some_logits, options=filters)
@pytest.mark.parametrize(("dtype", "margin"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_distribution_is_what_the_module_says(
    dtype: torch.dtype, margin: float, logits: list[float], options: dict[str, Any]
) -> None:
    want, closest = defined(logits, **options)
    assume(closest > margin)  # where rounding decides, either is right
    kept = got(how(**options), torch.tensor([logits], dtype=dtype))
    assert list(kept) == [i for i in want if i in kept]  # same order
    # What fp32 rounds to zero is gone with or without a filter.
    assert all(want[i] < 1e-37 for i in want if i not in kept)
    for i, p in kept.items():
        assert p == pytest.approx(want[i], rel=margin * 10, abs=1e-37)


@given(
    logits=some_logits, options=filters, uniforms=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=9)
)
def test_the_draw_is_the_inverse_cumulative_distribution(
    logits: list[float], options: dict[str, Any], uniforms: list[float]
) -> None:
    kept, closest = defined(logits, **options)
    assume(closest > 1e-12)
    total = math.fsum(kept.values())
    params, x = how(**options), torch.tensor([logits], dtype=torch.float64)
    for u in uniforms:
        (token,) = sample(x, torch.tensor([u], dtype=torch.float64), params).tolist()
        ids = list(kept)
        below = math.fsum(kept[i] for i in ids[: ids.index(token)])
        assert below - 1e-12 <= u * total <= below + kept[token] + 1e-12


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [1, 3, 0, 2]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 0]),
        ({"top_k": 9}, [1, 3, 0, 2]),
        ({"top_k": 2**63 - 1}, [1, 3, 0, 2]),
        ({"top_p": 0.0}, [1]),
        ({"top_p": 0.49}, [1]),
        ({"top_p": 0.51}, [1, 3]),
        ({"top_p": 0.74}, [1, 3]),
        ({"top_p": 0.76}, [1, 3, 0]),
        ({"top_p": 0.99}, [1, 3, 0, 2]),
        ({"min_p": 0.6}, [1]),
        ({"min_p": 0.4}, [1, 3]),
        ({"min_p": 0.26}, [1, 3]),
        ({"min_p": 0.24}, [1, 3, 0, 2]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 2, "top_p": 0.7}, [1, 3]),  # p of what top_k left: 0.5 of 0.75 is less than 0.7
        ({"top_k": 2, "top_p": 0.6}, [1]),  # 0.5 of 0.75 is more than 0.6; of 1 it would be less
        ({"top_p": 0.76, "min_p": 0.3}, [1, 3]),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.4}, [1, 3]),
        ({"temperature": 0.5, "top_p": 0.7}, [1]),  # tempered first: 0.5 becomes 0.73
        ({"temperature": 0.5, "min_p": 0.3}, [1]),
    ],
)
def test_filters_by_hand(options: dict[str, Any], kept: list[int]) -> None:
    logits = halves(0.125, 0.5, 0.125, 0.25)
    assert list(got(how(**{"temperature": 1.0, **options}), logits)) == kept


def test_at_most_p_and_at_least_p_times_include_equality() -> None:
    logits = logits_of(0, 0, 0, 0)  # 0.25 each, exactly
    assert list(got(how(1.0, top_p=0.5), logits)) == [0, 1, 2]
    assert list(got(how(1.0, top_p=0.49), logits)) == [0, 1]
    assert list(got(how(1.0, top_k=2, top_p=0.5), logits)) == [0, 1]  # 0.25 is half of what top_k left
    assert list(got(how(1.0, top_k=2, top_p=0.49), logits)) == [0]
    assert list(got(how(1.0, min_p=1.0), logits)) == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [8, 64, 1024])
def test_frequencies_over_a_grid_are_exact(steps: int, dtype: torch.dtype) -> None:
    logits = halves(0.125, 0.5, 0.125, 0.25).to(dtype)
    grid = [(i + 0.5) / steps for i in range(steps)]
    counts = Counter(pick(how(1.0), logits, *grid))
    assert counts == {0: steps // 8, 1: steps // 2, 2: steps // 8, 3: steps // 4}
    nucleus = Counter(pick(how(1.0, top_p=0.6), logits, *grid))  # two thirds and one third
    assert nucleus == {1: round(steps * 2 / 3), 3: round(steps / 3)}


def test_the_intervals_are_closed_below_and_open_above() -> None:
    assert pick(how(1.0), logits_of(0, 0, 0, 0), 0, 0.2499, 0.25, 0.4999, 0.5, 0.75) == [0, 0, 1, 1, 2, 3]


@given(logits=some_logits, options=filters)
def test_frequencies_follow_the_distribution(logits: list[float], options: dict[str, Any]) -> None:
    """A grid of N gives each kept token N p tokens, give or take one, in the order of likelihood."""
    n, params = 500, how(**options)
    x = torch.tensor([logits])
    kept = got(params, x)
    chosen = pick(params, x, *((i + 0.5) / n for i in range(n)))
    order = list(kept)
    assert [order.index(i) for i in chosen] == sorted(order.index(i) for i in chosen)
    total = math.fsum(kept.values())
    for i, p in kept.items():
        assert abs(chosen.count(i) - n * p / total) <= 1 + 1e-3


# Greedy.


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=300), st.booleans())
def test_greedy_takes_the_likeliest_and_of_those_the_lowest_id(values: list[int], wide: bool) -> None:
    logits = torch.tensor([values], dtype=torch.float64 if wide else torch.float32)
    assert pick(how(0), logits, 0.99) == [values.index(max(values))]
    assert how(0).greedy
    assert not how(1e-30).greedy


def test_greedy_ties_at_the_size_of_a_vocabulary() -> None:
    logits = torch.zeros(3, 32_000)
    logits[1, 777:] = 1
    logits[2, [31_999, 12_345]] = 1
    assert sample(logits, torch.zeros(3), how(0)).tolist() == [0, 777, 12_345]


# Edges.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-46, 5e-324])
def test_a_tiny_temperature_is_greedy_but_for_ties(temperature: float, dtype: torch.dtype) -> None:
    logits = logits_of(3e4, -3e4, 3e4 + 1, 0, 3e4 + 1, -math.inf, dtype=dtype)
    assert got(how(temperature), logits) == {2: 0.5, 4: 0.5}
    assert pick(how(temperature), logits, 0, 0.49, 0.5, *BELOW_ONE) == [2, 2, 4, 4, 4, 4]
    assert pick(how(temperature, top_p=0.3, min_p=0.1), logits, 0, *BELOW_ONE) == [2, 2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e30, 1e38, 1e39, 1e300, 1.7e308, 10**30, 10**300])
def test_a_huge_temperature_is_uniform(temperature: float, dtype: torch.dtype) -> None:
    logits = logits_of(5, -5, 0, -math.inf, 7, dtype=dtype)
    assert got(how(temperature), logits) == {0: 0.25, 1: 0.25, 2: 0.25, 4: 0.25}
    assert pick(how(temperature), logits, 0.1, 0.3, 0.6, 0.9) == [0, 1, 2, 4]


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_k": 5}, {"top_p": 0.0}, {"top_p": 0.5}, {"min_p": 1.0}])
@pytest.mark.parametrize("temperature", [0, 1e-30, 1, 1e30])
def test_a_vocabulary_of_one(temperature: float, options: dict[str, Any]) -> None:
    for logit in (0.0, -1e30, 3e38):
        logits = logits_of(logit, dtype=torch.float32)
        assert pick(how(temperature, **options), logits, 0, 0.5, *BELOW_ONE) == [0] * 5


@given(
    logits=st.lists(st.one_of(st.floats(-90, 90, width=32), st.just(-math.inf)), min_size=2, max_size=200),
    options=filters,
)
def test_the_ends_of_the_unit_interval_pick_only_what_is_kept(logits: list[float], options: dict[str, Any]) -> None:
    assume(any(x > -math.inf for x in logits))
    x = torch.tensor([logits])
    kept = list(got(how(**options), x))
    assert all(logits[i] > -math.inf for i in kept)
    chosen = pick(how(**options), x, 0, *BELOW_ONE)
    assert chosen[0] == kept[0]
    assert set(chosen) <= set(kept)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.999}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05}])
def test_the_end_of_a_long_cumulative_sum(options: dict[str, Any]) -> None:
    """Over 32,000 tokens an fp32 sum ends somewhat off 1; the last token kept is the last that can be drawn."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(4, 32_000, generator=generator) * 30
    logits[:, ::7] = -math.inf
    params = how(1.0, **options)
    probs, ids = distribution(logits, params)
    for u in BELOW_ONE:
        chosen = sample(logits, torch.full((4,), u), params)
        place = (ids == chosen[:, None]).int().argmax(-1)
        assert (probs.gather(-1, place[:, None]) > 0).all()
        assert (logits.gather(-1, chosen[:, None]) > -math.inf).all()


def test_minus_infinity_is_never_drawn() -> None:
    inf = math.inf
    logits = logits_of(-inf, 1, -inf, 1, -inf, dtype=torch.float32)
    for options in ({}, {"top_k": 4}, {"top_p": 1.0}, {"top_p": 0.9}, {"min_p": 0.0}):
        assert set(pick(how(1.0, **options), logits, 0, 0.3, 0.7, *BELOW_ONE)) == {1, 3}
    only = logits_of(-inf, -inf, -1e30, -inf, dtype=torch.float32)
    for temperature in (0, 0.7, 1e30):
        assert pick(how(temperature), only, 0, 0.5, *BELOW_ONE) == [2] * 5


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_still_give_an_id(bad: float, temperature: float) -> None:
    """Whoever asked sees them in the log-probabilities; an index outside the vocabulary would hide that."""
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 3.0, 1.0]])
    chosen = sample(logits, torch.zeros(2), how(temperature, top_k=1)).tolist()
    assert 0 <= chosen[0] < 3
    assert chosen[1] == 1


@given(
    rows=st.lists(st.lists(st.integers(-9, 9), min_size=12, max_size=12), min_size=2, max_size=6),
    uniforms=st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=6, max_size=6),
    options=filters,
)
def test_rows_are_independent(rows: list[list[int]], uniforms: list[float], options: dict[str, Any]) -> None:
    logits = torch.tensor(rows, dtype=torch.float32)
    before = logits.clone()
    for params in (how(**options), how(0)):
        together = sample(logits, torch.tensor(uniforms[: len(rows)]), params).tolist()
        assert together == [pick(params, logits[i : i + 1], uniforms[i])[0] for i in range(len(rows))]
    assert torch.equal(logits, before)  # logits are the caller's: log-probs are taken from them afterwards


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1e-9}, "temperature is -1e-09"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 10**400}, "temperature is 1000.*; it must be at most"),
        ({"temperature": -math.inf}, "temperature is -inf"),
        ({"top_p": -0.01}, "top_p is -0.01"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": -0.01}, "min_p is -0.01"),
        ({"min_p": 1.01}, "min_p is 1.01"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"top_k": -1}, "top_k is -1"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        how(**options)
    assert issubclass(SamplingError, ValueError)


# Uniform numbers.


def test_random_numbers_depend_on_seed_and_sample_alone() -> None:
    state = torch.get_rng_state()
    streams = {(s, i): RequestRng(s, i) for s in (0, 1, 11, 2**62, -3) for i in (0, 1, 11, 111)}
    interleaved: dict[tuple[int, int], list[float]] = {key: [] for key in streams}
    for _ in range(5):
        for key, stream in streams.items():
            interleaved[key].append(stream())
    for (seed, index), drawn in interleaved.items():
        again = RequestRng(seed, index)
        assert [again() for _ in drawn] == drawn
    assert len({u for drawn in interleaved.values() for u in drawn}) == 5 * len(streams)
    assert torch.equal(torch.get_rng_state(), state)


def test_uniforms_are_uniform() -> None:
    """Over one stream, and over the first numbers of neighbouring streams: Kolmogorov-Smirnov at 0.1%."""
    stream, n = RequestRng(5, 0), 2000
    for drawn in (
        [stream() for _ in range(n)],
        [RequestRng(5, i)() for i in range(n)],
        [RequestRng(s, 0)() for s in range(n)],
    ):
        assert all(0 <= u < 1 for u in drawn)
        ranked = sorted(drawn)
        assert max(max(u - Fraction(i, n), Fraction(i + 1, n) - u) for i, u in enumerate(map(Fraction, ranked))) < (
            1.95 / math.sqrt(n)
        )


# Logits that are changed first.

IDS = st.lists(st.integers(0, 11), max_size=9)
penalties = st.fixed_dictionaries(
    {
        "repetition_penalty": st.one_of(st.just(1.0), st.floats(0.1, 5)),
        "frequency_penalty": st.one_of(st.just(0.0), st.floats(-2, 2)),
        "presence_penalty": st.one_of(st.just(0.0), st.floats(-2, 2)),
        "logit_bias": st.dictionaries(st.integers(0, 11), st.floats(-100, 100), max_size=3),
    }
)


@given(
    values=st.lists(st.floats(-30, 30), min_size=12, max_size=12),
    prompt=IDS.filter(bool),
    output=IDS,
    options=penalties,
    doubled=st.booleans(),
)
def test_logits_are_changed_as_vllm_defines(
    values: list[float], prompt: list[int], output: list[int], options: dict[str, Any], doubled: bool
) -> None:
    """Repetition counts prompt and output, the others the output alone; a bias and a processor come before."""
    seen: list[tuple[list[int], list[int]]] = []

    def double(prompt_ids: list[int], output_ids: list[int], logits: Tensor) -> Tensor:
        seen.append((prompt_ids, output_ids))
        return logits * 2

    params = SamplingParams(**options, logits_processor=double if doubled else None)
    change = LogitChanges(params, prompt, 12, "cpu")
    logits = torch.tensor(values, dtype=torch.float64)
    for n in sorted({0, len(output) // 2, len(output)}):  # what was counted before is not counted again
        want = []
        for i, value in enumerate(values):
            x = value + options["logit_bias"].get(i, 0)
            x = 2 * x if doubled else x
            if i in prompt or i in output[:n]:
                x = x / options["repetition_penalty"] if x > 0 else x * options["repetition_penalty"]
            x -= options["frequency_penalty"] * output[:n].count(i)
            want.append(x - options["presence_penalty"] * (i in output[:n]))
        got = change(logits, output[:n])
        assert got.dtype == torch.float64
        assert got.tolist() == pytest.approx(want, rel=1e-12, abs=1e-12)
    assert logits.tolist() == values
    assert all(ids == (prompt, output[: len(ids[1])]) for ids in seen)
    assert bool(seen) == doubled


def test_default_params_change_nothing() -> None:
    assert not SamplingParams().changes_logits
    for change in ({"repetition_penalty": 1.1}, {"frequency_penalty": 0.1}, {"presence_penalty": -0.1}):
        assert SamplingParams(**change).penalized
    assert SamplingParams(logit_bias={1: 1}).changes_logits
    assert SamplingParams(logits_processor=lambda prompt, output, logits: logits).changes_logits


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "gave None; it must return logits of shape"),
        (torch.zeros(3), r"gave shape \[3\]; it must return logits of shape \[12\]"),
        (torch.full((12,), -math.inf), "leave no token"),
        (torch.full((12,), math.nan), "NaN"),
    ],
)
def test_what_a_processor_may_return(result: Any, message: str) -> None:
    change = LogitChanges(SamplingParams(logits_processor=lambda *_: result), [1], 12, "cpu")
    with pytest.raises(SamplingError, match=message):
        change(torch.zeros(12), [])


@given(
    rows=st.lists(
        st.tuples(filters, st.booleans(), st.floats(0, 1, exclude_max=True, width=32)), min_size=1, max_size=9
    ),
    seed=st.integers(0, 9),
)
def test_rows_with_their_own_params_get_what_they_get_alone(
    rows: list[tuple[dict[str, Any], bool, float]], seed: int
) -> None:
    rows = [rows[i % 3] if i % 4 == 3 and len(rows) > 3 else row for i, row in enumerate(rows)]  # some alike
    each = [how(**{**options, "temperature": 0} if greedy else options) for options, greedy, _ in rows]
    logits = torch.rand(len(rows), 30, generator=torch.Generator().manual_seed(seed)) * 9
    uniform = torch.tensor([u for _, _, u in rows])
    alone = [sample(logits[i : i + 1], uniform[i : i + 1], params).item() for i, params in enumerate(each)]
    assert sample_each(logits, uniform, each).tolist() == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 1.5}, "n is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty is nan"),
        ({"frequency_penalty": 2.1}, "frequency_penalty is 2.1; it must be at most 2"),
        ({"presence_penalty": -2.1}, "presence_penalty is -2.1; it must be at least -2"),
        ({"logit_bias": {-1: 1}}, "id of logit_bias is -1"),
        ({"logit_bias": {"1": 1}}, "id of logit_bias is '1'"),
        ({"logit_bias": {1: 101}}, "logit_bias of 1 is 101"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of 1 is nan"),
        ({"logit_bias": [(1, 2), (1, 3)]}, "twice"),
        ({"logit_bias": [1, 2]}, "logit_bias is"),
        ({"logit_bias": 5}, "logit_bias is 5"),
        ({"logits_processor": "f"}, "logits_processor is 'f'"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"seed": 2**63}, "seed is"),
        ({"stop": 3}, "stop is 3"),
    ],
)
def test_params_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        SamplingParams(**options)


def test_params_are_plain_and_comparable() -> None:
    params = SamplingParams(logit_bias={7: 1, 3: -2.5}, max_tokens=np.int64(4), temperature=np.float32(0.5), stop=["a"])
    assert params.logit_bias == ((3, -2.5), (7, 1.0))
    assert [type(x) for x in (params.max_tokens, params.temperature)] == [int, float]
    assert params == SamplingParams(logit_bias=((7, 1), (3, -2.5)), max_tokens=4, temperature=0.5, stop=("a",))
    assert pickle.loads(pickle.dumps(params)) == params
    assert hash(params) == hash(replace(params, logits_processor=print))
    assert replace(params, logits_processor=print) == params  # a function cannot be compared
    assert "logits_processor" not in repr(params)


def test_a_seeds_numbers_never_change() -> None:
    """The same seed must give the same text in every version."""
    draw = RequestRng(1, 2)
    assert [round(draw(), 12) for _ in range(3)] == [0.100653253838, 0.087048694703, 0.268377093061]


def test_a_default_device_does_not_reach_the_random_streams() -> None:
    with torch.device("meta"):
        assert 0 <= RequestRng(1, 1)() < 1


def test_greedy_needs_no_random_numbers_of_a_valid_type() -> None:
    assert SamplingParams(temperature=0).greedy
    with pytest.raises(SamplingError, match="temperature"):
        SamplingParams(temperature=True)


# --- large vocabularies: a token is looked for among the most likely ones first

LARGE = sampling.MANY * sampling.HEAD
SHAPES = {
    "ordinary": lambda g: torch.randn(4, LARGE, generator=g) * 4,
    "flat": lambda g: torch.randn(4, LARGE, generator=g) * 0.3,
    "ties": lambda g: (torch.randn(4, LARGE, generator=g) * 3).round(),
    "all equal": lambda g: torch.zeros(4, LARGE),
    "sharp": lambda g: torch.randn(4, LARGE, generator=g) * 60,
    "two tokens": lambda g: torch.full((4, LARGE), -math.inf).index_fill(1, torch.tensor([5, 9]), 1.0),
    "NaN": lambda g: torch.full((4, LARGE), math.nan),
}
FILTERS = [how(), how(top_p=0.8), how(top_k=40), how(top_k=1000), how(min_p=0.05), how(0.7, 0.9, 5, 0.1), how(top_p=0)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_vocabulary_need_not_be_sorted(shape: str) -> None:
    """The token is that of all of it, sorted: also of ties, and where the head is not enough."""
    generator = torch.Generator().manual_seed(1)
    for params in FILTERS:
        for temperature in (0.1, 1.0, 3.0):
            its = replace(params, temperature=temperature)
            logits, uniform = SHAPES[shape](generator), torch.rand(4, generator=generator)
            uniform[0], uniform[1] = 0.0, BELOW_ONE[1]
            want = sampling._draw(*distribution(logits, its), uniform)
            assert torch.equal(sample(logits, uniform, its), want), its


def test_most_tokens_are_found_without_sorting() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, uniform = torch.randn(200, LARGE, generator=generator) * 4, torch.rand(200, generator=generator)
    for params in (how(), how(top_p=0.8), how(top_k=40)):
        _, known = sampling._draw_from_head(sampling._tempered(logits, params), uniform, params)
        assert known.float().mean() > 0.9, params


@pytest.mark.parametrize("shape", SHAPES)
def test_the_most_likely_are_those_of_a_stable_sort(shape: str) -> None:
    logits = SHAPES[shape](torch.Generator().manual_seed(3))
    want = logits.argsort(dim=-1, descending=True, stable=True)
    for count in (1, 5, 20):
        found = most_likely(logits, [count] * 4)
        assert [list(top) for top in found] == want[:, :count].tolist()
