"""Steps of many tokens by the kernels: products in bf16, attention, norms, rotation and gates equal the plain path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mistral.args import QueryScaling
from mistral.attention import eager
from mistral.cache import RollingBufferCache
from mistral.engine import Engine
from mistral.fast import prompt
from mistral.fast.decode import FastTransformer
from mistral.fast.kernels import KernelsUnavailable, library
from mistral.fast.linear import FEW, stored, use_kernels
from mistral.fast.tiles import product_many
from mistral.loader.load import load
from mistral.loader.options import OptionError
from mistral.model import RMSNorm, Transformer
from mistral.rope import rotate
from mistral.sampling_params import SamplingParams
from mistral.window import visible
from tests.support.commands import Command, in_process
from tests.support.folders import make_folder, random_state
from tests.support.threads import threads
from tests.support.tiny import (
    TOLERANCE,
    at_random,
    distance,
    make_cache,
    play,
    ragged,
    tiny_args,
    tiny_model,
    true_logprobs,
)

try:
    library()
except KernelsUnavailable as reason:
    pytest.skip(f"no kernels here: {reason}", allow_module_level=True)

DEPTH = 256  # columns whose products are summed before the sums are
UNIT = 2.0**-24  # half of fp32's epsilon


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def times(weight: Tensor, x: Tensor, rounds: bool = True) -> Tensor:
    matrix = stored(weight)
    assert matrix is not None
    return product_many(matrix, x, rounds)


# --- products


KINDS = [(torch.float32, False), (torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)]


@pytest.mark.parametrize(("dtype", "rounds"), KINDS)
@settings(max_examples=40)
@given(n=st.integers(1, 150), k=st.integers(1, 700), rows=st.integers(0, 40), seed=st.integers(0, 2**20))
def test_products_of_any_shape_err_by_their_roundings_at_most(
    dtype: torch.dtype, rounds: bool, n: int, k: int, rows: int, seed: int
) -> None:
    weight, x = uniform(n, k, seed=seed).to(dtype), uniform(rows, k, seed=seed + 1)
    y = times(weight, x, rounds)
    assert y.shape == (rows, n)
    inputs = x.bfloat16().double() if rounds else x.double()
    want, size = inputs @ weight.double().T, inputs.abs() @ weight.double().abs().T
    # A product is rounded once as it is added to others, of DEPTH columns at most; then such sums are added up.
    roundings = min(k + 1, DEPTH) + -(-k // DEPTH)
    assert ((y - want).abs() <= 1.01 * roundings * UNIT * size + 1e-30).all()


@pytest.mark.parametrize(("dtype", "rounds"), KINDS)
def test_a_row_has_the_same_bits_whatever_the_rows_threads_and_company(dtype: torch.dtype, rounds: bool) -> None:
    weight, x = uniform(70, 1300).to(dtype), uniform(1100, 1300, seed=1)
    with threads(1):
        want = times(weight, x, rounds)
    for n in (1, 2, 3):
        with threads(n):
            for first, last in ((0, 1), (3, 20), (500, 513), (1, 1100)):
                assert torch.equal(times(weight, x[first:last], rounds), want[first:last])
    assert torch.equal(times(weight[:5], x[:9], rounds), want[:9, :5])


def test_only_weights_in_bfloat16_are_for_rounded_inputs() -> None:
    with pytest.raises(ValueError, match="rounded for bfloat16"):
        times(uniform(3, 4), uniform(2, 4))


def test_inputs_are_rounded_as_pytorch_rounds_them() -> None:
    bits = torch.randint(-(2**31), 2**31, (64, 64), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = bits.view(torch.float32)
    ties = (bits & -0x10000 | 0x8000).view(torch.float32)  # halfway between two neighbours
    for numbers in (x, ties):
        usual = (numbers.abs() > 1e-37) & (numbers.abs() < 1e38)
        numbers = torch.where(usual, numbers, 1.0)
        assert torch.equal(times(torch.eye(64).bfloat16(), numbers), numbers.bfloat16().float())
    odd = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [0.0]])
    odd = torch.cat([odd, torch.tensor([[0x7F800001], [-1]], dtype=torch.int32).view(torch.float32)])  # other NaN
    for rounds in (True, False):
        got = times(torch.ones(1, 1).bfloat16(), odd, rounds)
        assert torch.equal(got.isnan(), odd.isnan())
        assert torch.equal(got[1:4], odd[1:4])


# --- attention, norms, rotation, gates


@settings(max_examples=60)
@given(
    heads=st.sampled_from([(4, 2), (6, 1), (3, 3), (9, 3)]),
    d=st.sampled_from([2, 8, 20, 64, 80]),
    n=st.integers(1, 90),
    before=st.integers(0, 200),
    window=st.one_of(st.none(), st.integers(1, 150)),
    rows=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_attention_of_many_queries(
    heads: tuple[int, int], d: int, n: int, before: int, window: int | None, rows: int, seed: int
) -> None:
    H, K = heads
    size = before + n + seed % 7  # slots, some of them empty
    q = 4 * uniform(rows, n + 3, H, d, seed=seed)[:, 3:]  # a view, as a tile is
    k, v = (uniform(rows, size + 2, K, d, seed=seed + i)[:, :size] for i in (1, 2))
    q_pos = torch.arange(before, before + n).expand(rows, n)
    turned = torch.arange(size).roll(seed % size)  # a buffer that has wrapped
    k_pos = torch.where(turned < before + n, turned, -1).expand(rows, size)
    mask = visible(q_pos, k_pos, window)
    got = prompt.attend(q, k, v, mask)
    want = eager(q.double(), k.double(), v.double(), mask)
    assert got.shape == want.shape
    # Scores of up to 16 sqrt(D) are off by some roundings of their terms, and weights by as much of themselves.
    assert (got - want).abs().max() <= 64 * d**0.5 * UNIT * 16


def test_a_query_that_sees_nothing_yields_0_and_one_that_is_nan_yields_nan() -> None:
    q, k, v = uniform(1, 9, 2, 8), uniform(1, 70, 1, 8, seed=1), uniform(1, 70, 1, 8, seed=2)
    mask = torch.ones(1, 9, 70, dtype=torch.bool)
    mask[0, 4] = False
    q[0, 6, 1] = float("nan")
    out = prompt.attend(q, k, v, mask)
    assert (out[0, 4] == 0).all()
    assert out[0, 6, 1].isnan().all()
    assert not out[0, 6, 0].isnan().any()
    assert not out[0, [0, 5, 8]].isnan().any()


def test_queries_have_the_same_bits_in_any_tile_and_with_keys_they_do_not_see() -> None:
    q, k, v = uniform(1, 130, 6, 24), uniform(1, 300, 2, 24, seed=1), uniform(1, 300, 2, 24, seed=2)
    mask = visible(torch.arange(130)[None], torch.arange(300)[None], 40)
    want = prompt.attend(q, k, v, mask)
    for n in (1, 3):
        with threads(n):
            for first, last in ((0, 1), (5, 12), (60, 130)):
                part = prompt.attend(q[:, first:last], k[:, :last], v[:, :last], mask[:, first:last, :last])
                assert torch.equal(part, want[:, first:last])


@settings(max_examples=30)
@given(rows=st.integers(1, 40), half=st.integers(1, 50), heads=st.integers(1, 4), seed=st.integers(0, 2**20))
def test_what_is_done_row_by_row(rows: int, half: int, heads: int, seed: int) -> None:
    x, other = 3 * uniform(rows, heads, 2 * half, seed=seed), uniform(rows, heads, 2 * half, seed=seed + 1)
    angles = uniform(rows, half, seed=seed + 2)
    turned = prompt.turn(x.clone(), angles.cos(), angles.sin())
    assert torch.equal(turned, rotate(x, angles.cos(), angles.sin()))
    want = torch.nn.functional.silu(x.double()) * other
    assert ((prompt.gate(x.clone(), other) - want).abs() <= 16 * UNIT * want.abs() + 1e-30).all()
    flat = x.flatten(1)
    norm = RMSNorm(flat.shape[1], 1e-5)
    norm.weight.data = uniform(flat.shape[1], seed=seed + 3)
    wide = flat.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert ((prompt.norm(flat, norm) - want).abs() <= (flat.shape[1] + 8) * UNIT * want.abs() + 1e-30).all()


# --- steps


def fast_model(model: Transformer, dtype: torch.dtype = torch.bfloat16, rounds: bool = False) -> FastTransformer:
    """A fast model with the numbers of another, which are rounded there too."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype).float()
    with torch.device("meta"):
        fast = FastTransformer(model.args)
    fast.load_state_dict({name: w.to(dtype) for name, w in model.state_dict().items()}, assign=True)
    use_kernels(fast)
    fast.rounds_prompts = rounds
    return fast


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of each step that `prompt.step` took, the tokens, and whether some were rounded."""
    taken: list[tuple[int, bool]] = []
    usual = prompt.step

    def spy(model: Any, ids: Tensor, plan: Any, cache: Any, rounds: bool = False) -> Tensor:
        taken.append((len(ids), any(rounded for _, rounded in prompt.parts_of(plan, rounds))))
        return usual(model, ids, plan, cache, rounds)

    monkeypatch.setattr(prompt, "step", spy)
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5, (3, None), 40])
@pytest.mark.parametrize("grows", [None, QueryScaling(5, 0.7)])
def test_steps_of_many_tokens_equal_the_plain_model(
    window: Any, dtype: torch.dtype, grows: QueryScaling | None, steps: list[Any]
) -> None:
    plain = tiny_model(tiny_args(sliding_window=window, llama_4_scaling=grows))
    fast = fast_model(plain, dtype)
    prompts = ragged((70, 1, 33, 90), plain.args.vocab_size)
    truth = true_logprobs(plain, prompts)
    with torch.inference_mode():
        for seed in range(4):
            cache = make_cache(fast, len(prompts))
            got = play(fast, prompts, at_random([len(p) for p in prompts], seed), cache)
            assert distance(got, truth) <= TOLERANCE
        got = play(fast, prompts, [[len(p) for p in prompts]], None)
    assert distance(got, truth) <= TOLERANCE
    assert max(n for n, _ in steps) > FEW
    assert not any(rounded for _, rounded in steps)


def test_hooks_gradients_and_other_modules_take_the_plain_way(steps: list[Any]) -> None:
    fast = fast_model(tiny_model(tiny_args()), torch.float32)
    (ids,) = ragged((30,), fast.args.vocab_size)
    fast.forward(ids, [30]).sum().backward()
    assert fast.layers[0].attention.wq.weight.grad is not None
    seen = []
    with torch.no_grad():
        handle = fast.layers[1].attention.register_forward_hook(lambda *_: seen.append(1))
        fast.forward(ids, [30])
        handle.remove()
        assert seen == [1]
        assert not steps
        fast.forward(ids, [30])
    assert steps == [(30, False)]


def caches_after(fast: FastTransformer, prompts: list[Tensor], schedule: list[list[int]]) -> RollingBufferCache:
    """The cache once prompts, in row 0 and after, have been processed as the schedule says."""
    cache = make_cache(fast, len(prompts), positions=max(len(p) for p in prompts))
    done = [0] * len(prompts)
    with torch.inference_mode():
        for lens in schedule:
            plan = replace(cache.plan(lens), prompts=frozenset({0, 1}))
            ids = [p[d : d + n] for p, d, n in zip(prompts, done, lens, strict=True)]
            fast.step(torch.cat(ids), plan, cache)
            cache.commit(plan)
            done = [d + n for d, n in zip(done, lens, strict=True)]
    return cache


@pytest.mark.parametrize("window", [None, 7])
def test_prompts_that_are_rounded_have_the_same_bits_however_they_are_divided(window: int | None) -> None:
    plain = tiny_model(tiny_args(sliding_window=window, n_layers=3))
    fast = fast_model(plain, rounds=True)
    prompts = ragged((75, 31, 40), plain.args.vocab_size)  # row 2 is no prompt
    whole = caches_after(fast, prompts, [[75, 31, 40]])
    parts: list[list[list[int]]] = [
        *([[1, 0, 0]] * 75 + [[0, 31, 40]], [[75, 0, 1], [0, 31, 39]], [[17, 16, 0], [58, 15, 40]]),
        at_random([75, 31, 40], 5),
    ]
    for n, schedule in enumerate(parts):
        with threads(1 + n % 2):
            again = caches_after(fast, prompts, schedule)
        for layer, other in zip(whole.layers, again.layers, strict=True):
            for row, length in ((0, 75), (1, 31)):
                used = min(layer.capacity, length)
                assert torch.equal(layer.k[row, :used], other.k[row, :used])
                assert torch.equal(layer.v[row, :used], other.v[row, :used])


def test_only_prompts_are_rounded_and_only_where_the_model_was_loaded_for_it() -> None:
    plain = tiny_model(tiny_args(sliding_window=None))
    prompts = ragged((75, 31, 40), plain.args.vocab_size)
    lens = [75, 31, 40]
    exact = caches_after(fast_model(plain), prompts, [lens])
    rounded = caches_after(fast_model(plain, rounds=True), prompts, [lens])
    reference = caches_after(fast_model(plain, torch.float32), prompts, [lens])
    for a, b, c in zip(exact.layers, rounded.layers, reference.layers, strict=True):
        assert (a.v - c.v)[:, :31].abs().max() < 1e-5
        assert (b.v[2, :40] - c.v[2, :40]).abs().max() < 1e-5
        error = (b.v[:2, :31] - c.v[:2, :31]).abs().max()
        assert 1e-5 < error < 2e-2


def test_the_engine_names_prompts_and_not_those_that_are_scored(steps: list[tuple[int, bool]]) -> None:
    plain = tiny_model(tiny_args(sliding_window=6))
    fast = fast_model(plain, rounds=True)
    ids = ragged((40,), plain.args.vocab_size)[0].tolist()
    exact = Engine(fast_model(plain), eos_ids=[], score_prompts=True)
    scored = Engine(fast, eos_ids=[], score_prompts=True)
    requests = [engine.add(ids, SamplingParams(max_tokens=0)) for engine in (exact, scored)]
    for engine in (exact, scored):
        while not engine.done:
            engine.step()
    assert requests[0].prompt_logprobs == requests[1].prompt_logprobs
    assert not any(rounded for _, rounded in steps)
    steps.clear()
    texts = []
    for chunk in (None, 1, 7):
        engine = Engine(fast, eos_ids=[], chunk_size=chunk)
        wanted = [engine.add(ids[n:], SamplingParams(max_tokens=5, temperature=0)) for n in (0, 11)]
        while not engine.done:
            engine.step()
        texts.append([r.output_ids for r in wanted])
    assert texts[0] == texts[1] == texts[2]
    assert [n for n, rounded in steps if rounded][:2] == [69, 2]


# --- loading


def test_the_option(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path, random_state(dtype=torch.bfloat16))
    loaded = load(folder, device="cpu", prompt_dtype="bf16")
    assert loaded.model.rounds_prompts
    assert "products of prompts round inputs to bfloat16" in loaded.describe()
    for none in (None, "auto", "float32"):
        other = load(folder, device="cpu", prompt_dtype=none)
        assert not other.model.rounds_prompts
        assert "round" not in other.describe()
    cli: Command = in_process(capfd)
    words = ("complete", folder, "The king", "--max_tokens", 3)
    assert "products of prompts round inputs to bfloat16" in cli(*words, "--prompt_dtype", "bfloat16").err
    assert "prompt_dtype" in cli("perplexity", folder, __file__, "--prompt_dtype", "bfloat16").error


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"execution": "eager"}, "execution is eager"),
        ({"execution": "bitwise"}, "execution is bitwise"),
        ({"dtype": "bfloat16"}, "dtype is bfloat16"),
        ({"attention": "eager"}, "attention backend"),
        ({"quant": "int8"}, "int8"),
    ],
)
def test_where_nothing_would_be_rounded_it_is_refused(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, random_state(dtype=torch.bfloat16))
    with pytest.raises(OptionError, match=why):
        load(folder, device="cpu", prompt_dtype="bfloat16", **options)


def test_weights_in_float32_are_not_for_it(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="weights are in float32"):
        load(make_folder(tmp_path), device="cpu", prompt_dtype="bfloat16")
    with pytest.raises(OptionError, match="prompt_dtype 'float16' is not one of"):
        load(prompt_dtype="float16")
