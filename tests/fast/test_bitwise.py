"""The bitwise mode: a sequence has the same bits in any batch, chunks and queue, on any number of threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mistral.args import ModelArgs, QueryScaling, Yarn
from mistral.cache import RollingBufferCache
from mistral.engine import Engine
from mistral.fast import bitwise
from mistral.fast.bitwise import BitwiseTransformer, NotDeterministic, aligned_angles, groups, self_test
from mistral.fast.kernels import KernelsUnavailable, library
from mistral.fast.linear import use_kernels
from mistral.linear import Linear
from mistral.loader.load import load
from mistral.loader.options import OptionError
from mistral.parameters import parameters
from mistral.quant import put_quantized, quantize
from mistral.request import Request, Token
from mistral.rope import Angles, Rope
from mistral.sampling import distribution
from mistral.sampling_params import SamplingParams
from tests.support.folders import make_folder
from tests.support.threads import threads
from tests.support.tiny import (
    TOLERANCE,
    Schedule,
    at_random,
    distance,
    in_chunks,
    make_cache,
    play,
    prefill_then_decode,
    ragged,
    tiny_args,
    tiny_model,
    true_logprobs,
    whole,
)

try:
    library()
except KernelsUnavailable as reason:
    pytest.skip(f"no kernels here: {reason}", allow_module_level=True)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = (*DTYPES, "int8", "int4")
WINDOWS: tuple[Any, ...] = (None, 1, 3, 17, 50, (None, 4), (6, 2))


def make_model(args: ModelArgs, kind: str = "float32", seed: int = 0) -> BitwiseTransformer:
    state = tiny_model(args, seed).state_dict()
    with torch.device("meta"):
        model = BitwiseTransformer(args)
    if kind in DTYPES:
        state = {name: tensor.to(DTYPES[kind]) for name, tensor in state.items()}
    else:
        few = {n: quantize(p, state[n], kind) for n, p in parameters(args).items() if p.quantized}
        state = {n: t for n, t in state.items() if n not in few} | put_quantized(model, few)
    model.load_state_dict(state, assign=True)
    use_kernels(model)
    return model


def alone(model: BitwiseTransformer, prompts: list[Tensor], start: int = 0) -> list[Tensor]:
    """Logits of each prompt by itself, one token a step, on one thread."""
    with threads(1):
        return [
            play(model, [p], in_chunks([len(p)], 1), make_cache(model, 1, positions=len(p), start=start))[0]
            for p in prompts
        ]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    assert [g.shape for g in got] == [w.shape for w in want]
    return all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


# --- the model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", WINDOWS)
def test_any_mix_any_chunks(kind: str, window: Any) -> None:
    args = tiny_args(sliding_window=window, n_heads=6, n_kv_heads=2, hidden_dim=50)
    model = make_model(args, kind, seed=4)
    prompts = ragged([80, 1, 33, 47, 2], args.vocab_size)
    lens = [len(p) for p in prompts]
    want = alone(model, prompts)
    schedules = prefill_then_decode(lens, 30), in_chunks(lens, 19), at_random(lens, 7)
    for n, schedule in enumerate(schedules):
        with threads(1 + n % 2):
            assert same(play(model, prompts, schedule, make_cache(model, len(prompts))), want)
    with threads(2):
        assert same(whole(model, prompts), want)


def test_queries_that_grow() -> None:
    grows = {"llama_4_scaling": QueryScaling(5, 0.7), "yarn": Yarn(4, 8)}
    args = tiny_args(sliding_window=17, n_heads=6, n_kv_heads=2, hidden_dim=50, **grows)
    model, lens = make_model(args, "bfloat16", seed=4), [80, 1, 33]
    prompts = ragged(lens, args.vocab_size)
    want = alone(model, prompts)
    for schedule in (prefill_then_decode(lens, 30), in_chunks(lens, 19), at_random(lens, 7)):
        assert same(play(model, prompts, schedule, make_cache(model, 3)), want)
    assert same(whole(model, prompts), want)


@pytest.mark.long
@settings(max_examples=60)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3), (8, 1), (5, 5)]),
    head_dim=st.sampled_from([2, 6, 8, 16, 20, 34, 128, 150]),
    dim=st.integers(3, 70),
    hidden=st.integers(1, 90),
    window=st.sampled_from([*WINDOWS[:4], 40]),
    start=st.sampled_from([0, 5, 1000]),
    lens=st.lists(st.integers(1, 90), min_size=1, max_size=7),
    steps=st.integers(0, 2**20),
    positions=st.sampled_from([0, 1, 40, 90, 300]),
    workers=st.integers(1, 3),
    kind=st.sampled_from(KINDS),
)
def test_any_shape(
    heads: tuple[int, int],
    head_dim: int,
    dim: int,
    hidden: int,
    window: int | None,
    start: int,
    lens: list[int],
    steps: int,
    positions: int,
    workers: int,
    kind: str,
) -> None:
    shape: dict[str, Any] = {"dim": dim, "hidden_dim": hidden, "head_dim": head_dim, "sliding_window": window}
    args = tiny_args(**shape, n_heads=heads[0], n_kv_heads=heads[1])
    model = make_model(args, kind, seed=dim)
    prompts = ragged(lens, args.vocab_size, seed=hidden)
    schedule: Schedule = at_random(lens, steps)
    want = alone(model, prompts, start)
    with threads(workers):
        got = play(model, prompts, schedule, make_cache(model, len(lens), positions=positions, start=start))
    assert same(got, want)


@pytest.mark.parametrize("window", WINDOWS)
def test_the_numbers_are_those_of_the_contract(window: Any) -> None:
    args = tiny_args(sliding_window=window)
    model = make_model(args)
    prompts = ragged([150, 3, 40], args.vocab_size)
    assert distance(whole(model, prompts), true_logprobs(model, prompts)) <= TOLERANCE


def test_a_row_that_is_taken_over_leaves_nothing() -> None:
    args = tiny_args(sliding_window=6)
    model = make_model(args)
    prompts = ragged([40, 30], args.vocab_size)
    want = alone(model, prompts)
    cache = make_cache(model, 1)
    for prompt, logits in zip(prompts, want, strict=True):
        cache.reset(0)
        assert same(play(model, [prompt], in_chunks([len(prompt)], 7), cache), [logits])


def test_steps_of_nothing() -> None:
    args = tiny_args()
    model = make_model(args)
    cache = make_cache(model, 2)
    none = torch.empty(0, dtype=torch.int64)
    assert model.forward(none, [0, 0], cache).shape == (0, args.vocab_size)
    assert model.forward(none, []).shape == (0, args.vocab_size)
    assert cache.lengths == [0, 0]


def test_gradients_change_nothing_and_are_not_made() -> None:
    args = tiny_args()
    model = make_model(args)
    (prompt,) = ragged([20], args.vocab_size)
    with torch.enable_grad():
        logits = model.forward(prompt, [20])
    assert not logits.requires_grad
    assert same([logits], alone(model, [prompt]))


def test_replaced_weights_are_the_ones_used() -> None:
    args = tiny_args()
    model, other = make_model(args), make_model(args, seed=9)
    (prompt,) = ragged([20], args.vocab_size)
    model.forward(prompt, [20])
    model.load_state_dict(other.state_dict(), assign=True)
    assert same(alone(model, [prompt]), alone(other, [prompt]))


def test_what_has_other_bits_is_refused() -> None:
    args = tiny_args()
    ids = torch.tensor([1, 2, 3])
    with pytest.raises(NotDeterministic, match="a cache that the kernels read"):
        make_model(args).forward(ids, [3], RollingBufferCache(args, 1, dtype=torch.float64))
    with pytest.raises(NotDeterministic, match="weights on a CPU, as they were loaded"):
        make_model(args).double().forward(ids, [3])
    model = make_model(args)
    model.output = Linear(args.dim, args.vocab_size)
    with pytest.raises(NotDeterministic, match="weights on a CPU, as they were loaded"):
        model.forward(ids, [3])


@given(st.lists(st.integers(0, 200), max_size=6), st.integers(1, 128))
def test_groups_hold_every_token_once_and_few_of_a_sequence(seqlens: list[int], most: int) -> None:
    seen: list[int] = []
    row_of = [row for row, n in enumerate(seqlens) for _ in range(n)]
    for rows, tokens in groups(seqlens, most):
        assert rows == [row_of[token] for token in tokens]
        assert 0 < len(tokens) <= bitwise.TOKENS
        assert max(map(rows.count, rows)) <= most
        seen += tokens
    assert sorted(seen) == list(range(sum(seqlens)))
    assert all(seen.index(a) < seen.index(a + 1) for a in range(len(row_of) - 1) if row_of[a] == row_of[a + 1])


@given(st.sampled_from([2, 6, 10, 128]), st.lists(st.integers(0, 200_000), min_size=1, max_size=70))
def test_cosines_do_not_depend_on_neighbours(head_dim: int, positions: list[int]) -> None:
    rope = Rope(tiny_args(head_dim=head_dim, rope_theta=1e6, llama_4_scaling=QueryScaling(1000, 0.3)))
    at = torch.tensor(positions)
    together = aligned_angles(at, rope)
    for got, want, contract in zip(
        together,
        map(torch.cat, zip(*(aligned_angles(one, rope) for one in at.split(1)), strict=True)),
        rope.angles(at),
        strict=True,
    ):
        assert torch.equal(got, want)
        torch.testing.assert_close(got, contract, rtol=0, atol=1e-7)


# --- what is made of logits


def run(
    model: BitwiseTransformer, prompts: list[Tensor], params: SamplingParams, **options: Any
) -> list[tuple[Request, list[Token]]]:
    """Generate from prompts: the request and the tokens of each."""
    running = Engine(model, eos_ids=(), **options)
    made: dict[Request, list[Token]] = {running.add(p.tolist(), params): [] for p in prompts}
    while not running.done:
        for token in running.step():
            made[token.request].append(token)
    return list(made.items())


RANDOM = {"temperature": 1.5, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 3}
PENALTIES = {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.3, "logit_bias": {5: 2.5}}


@pytest.mark.parametrize("how", [{"temperature": 0}, RANDOM, {**RANDOM, **PENALTIES}])
@pytest.mark.parametrize("window", [None, 5])
def test_generated_alone_in_a_mix_and_in_a_queue(how: dict[str, Any], window: int | None) -> None:
    args = tiny_args(sliding_window=window)
    model = make_model(args, "bfloat16")
    prompts = ragged([40, 3, 1, 25, 60, 9, 14], args.vocab_size)
    params = SamplingParams(max_tokens=12, top_logprobs=3, **how)
    with threads(1):
        want = [run(model, [prompt], params)[0][1] for prompt in prompts]
    assert all(len(tokens) == 12 for tokens in want)
    for rows, chunk, workers in ((0, None, 2), (2, 5, 1), (3, 1, 2)):
        model.args = tiny_args(sliding_window=window, max_batch_size=rows)
        with threads(workers):
            made = run(model, prompts, params, chunk_size=chunk)
        assert [tokens for _, tokens in made] == want


def test_prompts_are_scored_alike() -> None:
    args = tiny_args()
    model = make_model(args)
    prompts = ragged([40, 3, 25], args.vocab_size)
    greedy = SamplingParams(max_tokens=12, temperature=0)
    scores = [run(model, [p], greedy, score_prompts=True)[0][0].prompt_logprobs for p in prompts]
    mixed = run(model, prompts, greedy, chunk_size=7, score_prompts=True)
    assert [request.prompt_logprobs for request, _ in mixed] == scores
    assert [len(s) for s in scores] == [39, 2, 24]


@pytest.mark.parametrize("vocab", [61, 1000, 32000, 131072])
def test_a_distribution_has_the_same_bits_in_any_company(vocab: int) -> None:
    logits = 5 * torch.rand(6, vocab, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=0.7, top_p=0.8)
    with threads(1):
        want = [torch.cat(x) for x in zip(*(distribution(row, params) for row in logits.split(1)), strict=True)]
    for workers in (1, 2, 3):
        with threads(workers):
            for count in (1, 2, 3, 6):
                for got, one in zip(distribution(logits[:count], params), want, strict=True):
                    assert torch.equal(got, one[:count])


def test_the_mass_that_top_p_cuts_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's sum does; what is compared with it must not be it."""
    monkeypatch.setattr(Tensor, "sum", lambda self, *_, **__: pytest.fail("summed in an order that may change"))
    distribution(torch.rand(1, 61), SamplingParams(temperature=0.7, top_p=0.8))


# --- plugged in at load


@pytest.mark.parametrize("quant", [None, "int8", "int4"])
def test_loaded(tmp_path: Path, quant: str | None) -> None:
    folder = make_folder(tmp_path / "model", sliding_window=3)
    before = torch.get_num_threads()
    loaded = load(folder, device="cpu", deterministic=True, quant=quant)
    assert torch.get_num_threads() == before
    assert "; attention kernels; kernels for all steps; bitwise; " in loaded.describe()
    assert loaded.runtime.execution == "bitwise"
    model = loaded.model
    assert isinstance(model, BitwiseTransformer)
    prompts = ragged([30, 2, 9], loaded.args.vocab_size)
    assert same(whole(model, prompts), alone(model, prompts))
    other = load(folder, device="cpu", quant=quant)
    assert "bitwise" not in other.describe()
    assert type(other.model) is not BitwiseTransformer
    assert other.model.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "bfloat16"},
            "execution bitwise is for a CPU in float32, not for cpu in bfloat16: use --device cpu --dtype float32",
        ),
        ({"attention": "eager"}, "execution bitwise has its own attention: omit --attention eager"),
        ({"kernels": False}, "execution is given as bitwise and as eager: give one of them"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        load(make_folder(tmp_path / "model"), **{"device": "cpu", "deterministic": True, **options})
    assert str(error.value) == message


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", "no-such-compiler")
    folder = make_folder(tmp_path / "model")
    library.cache_clear()
    try:
        with pytest.raises(OptionError, match=r"bitwise computes .* there is no compiler \(no-such-compiler\)"):
            load(folder, device="cpu", deterministic=True)
    finally:
        library.cache_clear()


def test_the_core_does_not_know_of_it() -> None:
    told = (
        "import sys, mistral.loader.runtime, mistral.formats, mistral.generate; print('mistral.oracle' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- the self-test


def a_bit_more(x: Tensor) -> Tensor:
    return (x.view(torch.int32) + 1).view(torch.float32)


def plant_in_products(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bitwise.product
    monkeypatch.setattr(bitwise, "product", lambda m, x: a_bit_more(right(m, x)) if len(x) == 3 else right(m, x))


def plant_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bitwise.product
    wrong = lambda m, x: a_bit_more(right(m, x)) if torch.get_num_threads() == 2 else right(m, x)  # noqa: E731
    monkeypatch.setattr(bitwise, "product", wrong)


def plant_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BitwiseTransformer.decode

    def wrong(self: Any, model: Any, h: Tensor, *rest: Any) -> None:
        right(self, model, h, *rest)
        if len(h) > 16:
            h.copy_(a_bit_more(h))

    monkeypatch.setattr(BitwiseTransformer, "decode", wrong)


def plant_in_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(positions: Tensor, rope: Rope) -> Angles:
        cos, *rest = rope.angles(positions)
        return (a_bit_more(cos) if len(positions) == 6 else cos, *rest)

    monkeypatch.setattr(bitwise, "aligned_angles", wrong)


def plant_in_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bitwise.logprobs
    monkeypatch.setattr(bitwise, "logprobs", lambda x: right(x) + (len(x) == 5) * 1e-12)


def plant_in_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Tensor.cumsum
    wrong = lambda x, dim: a_bit_more(right(x, dim)) if len(x) == 5 else right(x, dim)  # noqa: E731
    monkeypatch.setattr(Tensor, "cumsum", wrong)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (plant_in_products, r"products with attention\.wq have other bits with 3 rows and 1 threads"),
        (plant_in_threads, r"products with attention\.wq have other bits with 17 rows and 2 threads"),
        (plant_in_steps, "steps have other bits"),
        (plant_in_cosines, "steps have other bits with 5 rows"),
        (plant_in_log_probabilities, "log-probabilities have other bits with 5 rows"),
        (plant_in_sums, "sums of probabilities have other bits with 5 rows"),
    ],
)
def test_the_self_test_finds_what_is_planted(
    plant: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "model")
    plant(monkeypatch)
    before = torch.get_num_threads()
    with pytest.raises(NotDeterministic, match=message):
        load(folder, device="cpu", deterministic=True)
    assert torch.get_num_threads() == before
    load(folder, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_self_test_passes(kind: str) -> None:
    self_test(make_model(tiny_args(n_layers=1), kind))


def test_weights_that_are_no_numbers_are_not_the_self_tests_affair() -> None:
    model = make_model(tiny_args())
    with torch.no_grad():
        model.state_dict()["layers.0.attention.wq.weight"][3] = float("nan")
    self_test(model)


def test_the_self_test_does_not_mind_the_batch_limit():
    """As perplexity loads, for a batch of one."""
    loaded = load(deterministic=True, max_batch_size=1)
    assert loaded.args.max_batch_size == 1
