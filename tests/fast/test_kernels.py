"""The fast path equals the plain one: products, quantized weights, whole decode steps, and how it plugs in."""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import re
import resource
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mistral.args import ModelArgs, QueryScaling, Yarn
from mistral.cache import RollingBufferCache
from mistral.fast import decode, kernels, layout
from mistral.fast.decode import FastTransformer
from mistral.fast.kernels import KernelsUnavailable, library, pointer
from mistral.fast.linear import FEW, FastLinear, use_kernels
from mistral.formats.convert import convert
from mistral.formats.folder import read_folder
from mistral.generate import complete
from mistral.linear import Linear
from mistral.loader.load import load
from mistral.loader.options import OptionError
from mistral.model import Transformer
from mistral.parameters import parameters
from mistral.quant import put_quantized, quantize, rounding
from mistral.quant.affine import Affine4Linear
from mistral.quant.linear import Int4Linear, Int8Linear, QuantizedLinear, int8
from mistral.util.errors import FormatError
from mistral.window import block_for
from tests.support.commands import Command, in_process
from tests.support.folders import make_folder
from tests.support.tiny import (
    TOLERANCE,
    at_random,
    distance,
    logprobs,
    make_cache,
    play,
    prefill_then_decode,
    ragged,
    tiny_args,
    tiny_model,
    true_logprobs,
)

try:
    library()
except KernelsUnavailable as reason:
    pytest.skip(f"no kernels here: {reason}", allow_module_level=True)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LINEARS = {"int8": Int8Linear, "int4": Affine4Linear, "int4-symmetric": Int4Linear}
KINDS = (*DTYPES, "int8", "int4")
# Inputs of quantized weights are rounded to 16 bits, which moves log-probs by more than fp32 does.
ROUNDED_TOLERANCE = 1e-4


def budget(kind: str) -> float:
    return ROUNDED_TOLERANCE if kind in ("int8", "int4") else TOLERANCE


def make_linear(kind: str, weight: Tensor) -> Any:
    if kind in LINEARS:
        return LINEARS[kind].of(weight)
    linear = FastLinear(weight.shape[1], weight.shape[0])
    linear.weight = torch.nn.Parameter(weight.to(DTYPES[kind]), requires_grad=False)
    return linear


def weights_meant(linear: Any) -> Tensor:
    """The numbers that a linear stands for."""
    return linear.rows(0, linear.out_features) if isinstance(linear, QuantizedLinear) else linear.weight.float()


def fast_twin(model: Transformer, kind: str) -> tuple[FastTransformer, Transformer]:
    """A fast model of a kind, and a plain one in fp32 with the numbers that its weights stand for."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = tiny_model(model.args)
    with torch.device("meta"):
        fast = FastTransformer(model.args)
    if kind in DTYPES:
        fast.load_state_dict({n: t.to(DTYPES[kind]) for n, t in state.items()}, assign=True)
        plain.load_state_dict({n: t.to(DTYPES[kind]).float() for n, t in state.items()})
    else:
        few = {n: quantize(p, state[n], kind) for n, p in parameters(model.args).items() if p.quantized}
        rest = {n: t for n, t in state.items() if n not in few}
        fast.load_state_dict(rest | put_quantized(fast, few), assign=True)
        plain.load_state_dict(rest | {n: m.rows(0, m.out_features) for n, m in few.items()})
    use_kernels(fast)
    return fast, plain


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each decode step of the kernels brought."""
    calls: list[int] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(library(), name)

        def decode(self, model: Any, rows: ctypes.c_int64, *rest: Any) -> None:
            calls.append(rows.value)
            library().decode(model, rows, *rest)

    monkeypatch.setattr("mistral.fast.decode.library", Spy)
    return calls


# --- products


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(n=st.integers(1, 70), k=st.integers(1, 300), rows=st.integers(1, 40), seed=st.integers(0, 2**20))
def test_products_of_any_shape(kind: str, n: int, k: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(n, k, generator=generator) * 2 - 1
    x = torch.rand(rows, k, generator=generator) * 2 - 1
    linear = make_linear(kind, weight)
    with torch.inference_mode():
        y = linear(x)
    assert y.shape == (rows, n)
    assert y.dtype == torch.float32
    x = rounding.rounded(x, linear.span) if isinstance(linear, QuantizedLinear) else x
    want = x.double() @ weights_meant(linear).double().T
    size = x.double().abs() @ weights_meant(linear).double().abs().T
    assert ((y - want).abs() <= 2e-6 * size + 1e-30).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_company(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    linear = make_linear(kind, torch.rand(37, 1300, generator=generator) - 0.5)
    x = torch.rand(FEW, 1300, generator=generator) - 0.5
    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                alone = torch.cat([linear(row[None]) for row in x])
                for rows in range(1, FEW + 1):
                    assert torch.equal(linear(x[:rows]), alone[:rows])
                    assert torch.equal(linear(x[-rows:]), alone[-rows:])
    finally:
        torch.set_num_threads(before)


def test_products_in_other_dtypes_and_with_gradients_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = FastLinear(24, 40)
    x = torch.rand(3, 24)
    monkeypatch.setattr("mistral.fast.linear.product", None)  # whoever calls it fails
    assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight))
    linear(x).sum().backward()
    assert linear.weight.grad is not None
    with torch.inference_mode():
        linear.double()(x.double())
        with pytest.raises(TypeError):
            linear.float()(x)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (0,)])
@pytest.mark.parametrize("kind", KINDS)
def test_leading_dimensions(kind: str, shape: tuple[int, ...]) -> None:
    linear = make_linear(kind, torch.rand(10, 33) - 0.5)
    x = torch.rand(*shape, 33)
    with torch.inference_mode():
        y = linear(x)
    assert y.shape == (*shape, 10)
    torch.testing.assert_close(y, x @ weights_meant(linear).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("span", [Int4Linear.span, Int8Linear.span])
def test_inputs_of_weights_in_few_bits_are_rounded_to_16_bits(span: int) -> None:
    x = torch.rand(3, 170, generator=torch.Generator().manual_seed(4)) - 0.5
    near = rounding.rounded(x, span)
    step = torch.nn.functional.pad(x, (0, -170 % span)).unflatten(-1, (-1, span)).abs().amax(-1) / rounding.INPUTS
    assert ((near - x).abs() <= step.repeat_interleave(span, dim=-1)[:, :170] * 0.5001).all()
    assert not torch.equal(near, x)
    assert not rounding.rounded(torch.zeros(2, 40), span).any()


@given(k=st.integers(1, 300), span=st.sampled_from([32, 128]), scale=st.sampled_from([0.0, 1e-30, 1.0, 1e30]))
def test_inputs_of_many_rows_are_rounded_to_the_same_bits(k: int, span: int, scale: float) -> None:
    x = scale * (torch.rand(5, k, generator=torch.Generator().manual_seed(k)) - 0.5)
    found = torch.full_like(x, float("nan"))
    size = (ctypes.c_int64(n) for n in (k, 5, span))
    library().through_16_bits(pointer(x), *size, pointer(found), ctypes.c_int64(2))
    assert torch.equal(found, rounding.rounded(x, span))


@pytest.mark.parametrize("rows", [1, FEW + 1])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_inputs_that_are_no_numbers_stay_none(kind: str, rows: int) -> None:
    linear = make_linear(kind, torch.rand(20, 200) - 0.5)
    x = torch.rand(rows, 200)
    x[0, 7] = float("nan")
    with torch.inference_mode():
        assert linear(x)[0].isnan().all()


@pytest.mark.parametrize("rows", [1, FEW + 1])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("size", [0.0, 1e-36])
def test_inputs_too_small_to_be_rounded_count_as_zero(kind: str, rows: int, size: float) -> None:
    """A step of nothing would make them NaN, which no whole number can be."""
    linear = make_linear(kind, torch.rand(20, 200) + 0.5)
    with torch.inference_mode():
        assert not linear(torch.full((rows, 200), size)).any()


@pytest.mark.parametrize("rows", [1, 5, FEW + 1])
def test_activations_in_bfloat16(rows: int) -> None:
    generator = torch.Generator().manual_seed(6)
    linear = make_linear("bfloat16", torch.rand(40, 100, generator=generator) - 0.5)
    x = (torch.rand(rows, 100, generator=generator) - 0.5).bfloat16()
    with torch.inference_mode():
        y = linear(x)
    assert y.dtype == torch.bfloat16
    want = x.double() @ linear.weight.double().T
    assert ((y - want).abs() <= 2**-8 * want.abs() + 1e-5).all()  # summed up in fp32, rounded once


def test_half_precision_specials() -> None:
    values = [0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, -65504.0, float("inf"), float("-inf"), 1 / 3]
    weight = torch.tensor(values).half()[:, None]
    linear = make_linear("float16", weight)
    with torch.inference_mode():
        assert torch.equal(linear(torch.ones(1, 1))[0], weight[:, 0].float())


# --- quantized weights


@given(n=st.integers(1, 40), k=st.integers(1, 130), scale=st.floats(1e-6, 1e3), seed=st.integers(0, 2**20))
def test_packing_is_undone(n: int, k: int, scale: float, seed: int) -> None:
    weight = (torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) - 0.5) * scale
    q, scales = rounding.int4(weight)
    assert q.shape == (n, layout.groups(k) * layout.GROUP)
    assert not q[:, k:].any()
    packed = rounding.pack(q, scales)
    back = rounding.unpack(packed, n, k)
    assert torch.equal(back[0], q)
    assert torch.equal(back[1], scales)


def test_how_int8_weights_lie_in_memory() -> None:
    q = (torch.arange(20 * 40).view(20, 40) % 251 - 125).to(torch.int8)
    packed = rounding.interleave(q)
    assert packed.shape == layout.int8_shape(20, 40) == (2, 2, 512)
    for row, column in ((0, 0), (3, 5), (15, 31), (19, 39)):
        assert packed[row // 16, column // 32, column % 32 // 2 * 32 + row % 16 * 2 + column % 2] == q[row, column]


def test_how_packed_weights_lie_in_memory() -> None:
    q = torch.arange(16 * 32).view(16, 32) % 16 - 8
    scales = torch.arange(1, 17).bfloat16()[:, None]
    packed = rounding.pack(q.to(torch.int8), scales)
    assert packed.shape == (1, 1, 288)
    words = packed[0, 0, :256].view(torch.int32).view(4, 16)
    for j, row, i in ((0, 0, 0), (1, 3, 5), (3, 15, 7)):
        nibble = (int(words[j, row]) >> (4 * i)) & 15
        assert nibble - 8 == q[row, 8 * j + i]
    assert torch.equal(packed[0, 0, 256:].view(torch.bfloat16), scales[:, 0])


@pytest.mark.parametrize("k", [32, 100])
def test_int8_and_symmetric_int4_are_near(k: int) -> None:
    weight = torch.randn(50, k, generator=torch.Generator().manual_seed(1))
    int8, int4 = Int8Linear.of(weight), Int4Linear.of(weight)
    step = weight.abs().amax(-1, keepdim=True) / 127
    assert ((int8.rows(0, 50) - weight).abs() <= step * 0.5001).all()
    off = int4.rows(0, 50) - weight
    largest = torch.nn.functional.pad(weight, (0, -k % 32)).unflatten(-1, (-1, 32)).abs().amax(-1)
    steps = (largest / 8).repeat_interleave(32, dim=-1)[:, :k]
    assert (off.abs() <= steps * 1.2).all()
    assert float(off.square().mean().sqrt()) < 0.095 * float(weight.std())
    # Each group takes the best of its scales, so it is no worse than the first.
    assert float(off.square().sum()) < float((_round_to_eighths(weight) - weight).square().sum())


def test_symmetric_int4_has_steps_on_the_side_of_the_largest_weight() -> None:
    weight = torch.arange(-8.0, 8).repeat(2, 2) * torch.tensor([[0.25], [-0.25]])  # one group of -2, one of 2
    assert torch.equal(Int4Linear.of(weight).rows(0, 2), weight)


def _round_to_eighths(weight: Tensor) -> Tensor:
    groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 32)).unflatten(-1, (-1, 32))
    scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2)[:, : weight.shape[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@given(n=st.integers(1, 40), k=st.integers(1, 130), scale=st.floats(1e-4, 1e3), seed=st.integers(0, 2**20))
def test_the_kernels_round_as_the_plain_path_does(dtype: str, n: int, k: int, scale: float, seed: int) -> None:
    weight = ((torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) - 0.5) * scale).to(DTYPES[dtype])
    q, scales = rounding.int8(weight)
    packed, found = int8(weight)
    assert torch.equal(packed, rounding.interleave(q))
    assert torch.equal(rounding.separate(packed, n, k), q)
    assert torch.equal(found, scales)


def test_the_kernels_round_rows_that_are_next_to_nothing_as_the_plain_path_does() -> None:
    weight = (torch.rand(5, 70) - 0.5) * torch.tensor([1, 1e-30, 1e-36, 1e-42, 0])[:, None]
    packed, scales = int8(weight)
    q, want = rounding.int8(weight)
    assert torch.equal(rounding.separate(packed, 5, 70), q)
    assert torch.equal(scales, want)
    assert not q[2:].any()


@pytest.mark.parametrize("kind", ["int8", "int4-symmetric"])
def test_zeros_stay_zero(kind: str) -> None:
    weight = torch.zeros(20, 70)
    weight[3, 5] = -2.0
    linear = make_linear(kind, weight)
    assert torch.equal(linear.rows(0, 20), weight)
    with torch.inference_mode():
        torch.testing.assert_close(linear(torch.ones(2, 70)), torch.ones(2, 70) @ weight.T)


@pytest.mark.parametrize("kind", LINEARS)
def test_widened_tiles_are_the_weights_meant(kind: str) -> None:
    linear = make_linear(kind, torch.randn(50, 77, generator=torch.Generator().manual_seed(2)))
    matrix = linear.matrix()
    for first, last in ((0, 50), (16, 48), (32, 39)):
        out = torch.full((77, last - first), 9.0)
        size = ctypes.c_int64(last - first), kernels.pointer(out), ctypes.c_int64(2)
        library().widen(ctypes.byref(matrix), ctypes.c_int64(first), *size)
        assert torch.equal(out.T, linear.rows(first, last))


@pytest.mark.parametrize("kind", LINEARS)
def test_quantized_products_without_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = make_linear(kind, torch.randn(50, 77, generator=torch.Generator().manual_seed(2)))
    x = torch.rand(3, 77)
    with torch.inference_mode():
        fast = linear(x)
        monkeypatch.setattr(type(linear), "matrix", lambda self: None)
        torch.testing.assert_close(linear(x), fast)
        assert linear(x.double()).dtype == torch.float64


# --- decode steps

WINDOWS: tuple[Any, ...] = (None, 1, 3, 17, 50, (None, 4), (6, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", WINDOWS)
def test_decode_steps_equal_the_plain_model(kind: str, window: Any, decodes: list[int]) -> None:
    args = tiny_args(sliding_window=window, n_heads=6, n_kv_heads=2, hidden_dim=50, vocab_size=70, rope_theta=1e4)
    fast, plain = fast_twin(tiny_model(args, seed=4), kind)
    prompts = ragged([60, 1, 33, 47, 2], args.vocab_size)
    lens = [len(p) for p in prompts]
    block = min(map(block_for, args.windows))  # tokens of a sequence that a buffer takes at once
    with torch.inference_mode():
        for schedule in (prefill_then_decode(lens, 30), at_random(lens, 7)):
            decodes.clear()
            got = play(fast, prompts, schedule, make_cache(fast, len(prompts)))
            few = [sum(s) for s in schedule if 0 < sum(s) <= FEW and max(s) <= block]
            assert decodes == few  # these steps, and no others
            assert len(few) > 10
            assert distance(got, true_logprobs(plain, prompts)) <= budget(kind)


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("window", [None, 17])
def test_queries_that_grow(kind: str, window: int | None, decodes: list[int]) -> None:
    grows = {"llama_4_scaling": QueryScaling(5, 0.7), "yarn": Yarn(4, 8)}
    args = tiny_args(sliding_window=window, n_heads=6, n_kv_heads=2, hidden_dim=50, vocab_size=70, **grows)
    fast, plain = fast_twin(tiny_model(args, seed=4), kind)
    prompts = ragged([60, 1, 33], args.vocab_size)
    with torch.inference_mode():
        for schedule in (prefill_then_decode([60, 1, 33], 30), at_random([60, 1, 33], 7)):
            got = play(fast, prompts, schedule, make_cache(fast, 3))
            assert distance(got, true_logprobs(plain, prompts)) <= budget(kind)
    assert len(decodes) > 30


@settings(max_examples=25)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3), (8, 1), (5, 5)]),
    head_dim=st.sampled_from([2, 6, 8, 16, 20, 34, 128, 150]),
    dim=st.integers(3, 70),
    hidden=st.integers(1, 90),
    window=st.sampled_from([None, 1, 2, 7, 40]),
    start=st.sampled_from([0, 5, 1000]),
    rows=st.integers(1, FEW + 2),
    kind=st.sampled_from(KINDS),
)
def test_decode_steps_of_any_shape(
    heads: tuple[int, int], head_dim: int, dim: int, hidden: int, window: int | None, start: int, rows: int, kind: str
) -> None:
    args = tiny_args(
        dim=dim, hidden_dim=hidden, head_dim=head_dim, n_heads=heads[0], n_kv_heads=heads[1], sliding_window=window
    )
    fast, plain = fast_twin(tiny_model(args, seed=dim), kind)
    prompts = ragged([9 + 3 * i for i in range(rows)], args.vocab_size, seed=hidden)
    schedule = prefill_then_decode([len(p) for p in prompts], 8)
    with torch.inference_mode():
        got = play(fast, prompts, schedule, make_cache(fast, rows, start=start))
        nowhere = (mock.patch.object(cls, "matrix", return_value=None) for cls in (Int8Linear, Int4Linear))
        with next(nowhere), next(nowhere):  # then a step is not for the kernels
            slow = fast if kind in ("int8", "int4") else plain
            want = play(slow, prompts, schedule, make_cache(slow, rows, start=start))
    truth = true_logprobs(plain, prompts, start)
    # Small random shapes may amplify rounding: then as near to the truth as the plain path is, times 4 (rule 11).
    assert distance(got, truth) <= max(budget(kind), 4 * distance(want, truth))


def filled_cache(args: ModelArgs, lengths: list[int]) -> RollingBufferCache:
    """Sequences of these lengths, with random keys and values: the same ones at each call."""
    generator = torch.Generator().manual_seed(5)
    cache = RollingBufferCache(args, len(lengths), positions=max(lengths) + 1)
    cache.lengths = list(lengths)
    for layer in cache.layers:
        layer.k.copy_(torch.randn(layer.k.shape, generator=generator))
        layer.v.copy_(torch.randn(layer.v.shape, generator=generator))
    return cache


@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (3, 3), (8, 1)])
@pytest.mark.parametrize("window", [None, 200, 4200])
def test_decode_steps_over_many_positions(window: int | None, heads: tuple[int, int]) -> None:
    """Attention is taken in parts: one, several, and as many as there may be; over the end of the buffer, too."""
    args = tiny_args(n_heads=heads[0], n_kv_heads=heads[1], sliding_window=window)
    fast, plain = fast_twin(tiny_model(args, seed=4), "float32")
    lengths = [5000, 127, 128, 129, 300, 4097]
    ids = torch.arange(1, 1 + len(lengths))
    logits = []
    with torch.inference_mode():
        for model in (fast, plain):
            logits.append(model.forward(ids, [1] * len(lengths), filled_cache(args, lengths)))
    assert distance([logits[0]], [logits[1]]) <= TOLERANCE


@pytest.mark.parametrize("score", [-25.0, 100.0])
def test_attention_whose_scores_lie_far_apart(score: float) -> None:
    """One of 300 positions, in the first of three parts, differs by `score` from all others, whose keys are 0.

    At -25 it has a weight of 5e-14 and a value of 1e10: nothing that counts may be rounded to 0. At 100 it has all the
    weight, and the other parts, merged by the largest score, have none.
    """
    args = tiny_args(n_heads=1, n_kv_heads=1, sliding_window=None)
    fast, plain = fast_twin(tiny_model(args, seed=4), "float32")
    queries: list[Tensor] = []
    attend = plain.layers[0].attention.attend
    plain.layers[0].attention.attend = lambda q, *rest: (queries.append(q), attend(q, *rest))[1]
    ids, caches = torch.tensor([7]), [filled_cache(args, [300]) for _ in range(3)]
    with torch.inference_mode():
        plain.forward(ids, [1], caches.pop())
        q = queries[0][0, 0]
        for cache in caches:
            store = cache.layers[0]
            store.k.zero_()
            store.v.zero_()
            store.k[0, 5, 0] = score * args.head_dim**0.5 * q / q.square().sum()
            store.v[0, 5] = 1e10 if score < 0 else 1.0
        got, want = (model.forward(ids, [1], cache) for model, cache in zip((fast, plain), caches, strict=True))
        caches[0].rewind(0, 300)
        caches[0].layers[0].v.zero_()
        without = plain.forward(ids, [1], caches[0])
    assert distance([got], [want]) <= TOLERANCE
    assert distance([without], [want]) > 10 * TOLERANCE  # the position matters


@pytest.mark.parametrize("window", [None, 200])
def test_parts_do_not_hang_on_threads_or_company(window: int | None) -> None:
    args = tiny_args(sliding_window=window)
    fast, _ = fast_twin(tiny_model(args, seed=4), "float32")
    lengths = [900, 300, 129, 500]
    before, found = torch.get_num_threads(), []

    def step(rows: list[int]) -> Tensor:
        seqlens = [int(row in rows) for row in range(len(lengths))]
        return fast.forward(torch.tensor(rows), seqlens, filled_cache(args, lengths))

    try:
        with torch.inference_mode():
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found += [step([0, 1, 2, 3]), torch.cat([step([row]) for row in range(4)])]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, found[0]) for x in found)


def test_a_decode_step_writes_the_cache_as_the_plain_model_does() -> None:
    args = tiny_args(sliding_window=3)
    fast, plain = fast_twin(tiny_model(args), "float32")
    caches = [RollingBufferCache(args, 2) for _ in range(2)]
    with torch.inference_mode():
        for step in range(20):
            seqlens = [1, step % 2]
            ids = torch.tensor([step, 7][: sum(seqlens)])
            for model, cache in zip((fast, plain), caches, strict=True):
                model.forward(ids, seqlens, cache)
    assert caches[0].lengths == caches[1].lengths == [20, 10]
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        assert a.capacity == b.capacity
        torch.testing.assert_close(a.k, b.k)
        torch.testing.assert_close(a.v, b.v)
        assert not a.written


def test_a_sequence_has_the_same_bits_in_any_batch() -> None:
    args = tiny_args(sliding_window=6)
    fast, _ = fast_twin(tiny_model(args), "bfloat16")
    prompts = ragged([20] * 9, args.vocab_size)
    steps = [[1] * 9] * 20
    with torch.inference_mode():
        together = play(fast, prompts, steps, make_cache(fast, 9))
        for prompt, want in zip(prompts, together, strict=True):
            (alone,) = play(fast, [prompt], [[1]] * 20, make_cache(fast, 1))
            assert torch.equal(alone, want)


def test_replaced_and_moved_weights_are_the_ones_used(decodes: list[int]) -> None:
    args = tiny_args()
    fast, _ = fast_twin(tiny_model(args), "float32")
    other = tiny_model(args, seed=9)
    ids, cache = torch.tensor([3]), make_cache(fast, 1)
    with torch.inference_mode():
        fast.forward(ids, [1], cache)
        fast.load_state_dict(other.state_dict(), assign=True)
        fast.layers[0].attention.wq.weight = torch.nn.Parameter(other.layers[1].attention.wq.weight.clone())
        other.layers[0].attention.wq.weight = fast.layers[0].attention.wq.weight
        got = fast.forward(ids, [1], make_cache(fast, 1))
        assert distance([got], [other.forward(ids, [1], make_cache(other, 1))]) <= TOLERANCE
        assert decodes == [1, 1]
        fast.double()  # not for the kernels: the plain way
        fast.forward(ids, [1], make_cache(fast, 1))
    assert decodes == [1, 1]


def swapped_data(model: FastTransformer) -> None:
    model.layers[1].feed_forward.w2.weight.data = model.layers[1].feed_forward.w2.weight.data * 2


def turned_data(model: FastTransformer) -> None:
    weight = model.layers[1].feed_forward.w2.weight
    weight.data = weight.data.T.reshape(weight.shape)


def seen_otherwise(model: FastTransformer) -> None:
    weight = model.layers[1].feed_forward.w2.weight
    weight.data = weight.data.view(torch.float16)


def hooked(model: FastTransformer) -> None:
    model.layers[1].feed_forward.register_forward_hook(lambda module, inputs, output: output * 2)


def replaced_weight(model: FastTransformer) -> None:
    model.layers[1].attention.wk.weight = torch.nn.Parameter(model.layers[1].attention.wk.weight * 2)


def replaced_layers(model: FastTransformer) -> None:
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


def changed_norm(model: FastTransformer) -> None:
    model.layers[0].ffn_norm.weight.data.mul_(2)


def changed_weight(model: FastTransformer) -> None:
    model.layers[0].attention.wo.weight.data.mul_(2)


def loaded_state(model: FastTransformer) -> None:
    model.load_state_dict({name: w * 1.5 for name, w in model.state_dict().items()}, assign=True)


def replaced_linear(model: FastTransformer) -> None:
    linear = make_linear("bfloat16", model.layers[0].attention.wq.weight.detach().float() * 2)
    model.layers[0].attention.wq = linear


@pytest.mark.parametrize(
    "change",
    [
        swapped_data,
        turned_data,
        seen_otherwise,
        hooked,
        replaced_weight,
        replaced_layers,
        changed_norm,
        changed_weight,
        loaded_state,
        replaced_linear,
    ],
)
def test_what_changes_between_two_steps_on_one_cache(change: Callable[[FastTransformer], None]) -> None:
    """The description of a model and a cache is kept from step to step, for as long as it is right."""
    found = []
    for forget in (False, True):
        fast, _ = fast_twin(tiny_model(tiny_args(), seed=4), "bfloat16")
        cache = make_cache(fast, 1)
        with torch.inference_mode():
            before = fast.forward(torch.tensor([3]), [1], cache)
            change(fast)
            if forget:
                decode._descriptions.clear()
            found.append(fast.forward(torch.tensor([3]), [1], cache))
            assert not torch.equal(before, found[-1])
            assert fast.described(cache) is fast.described(cache)
    assert torch.equal(*found)


def test_square_weights_that_are_transposed_in_place() -> None:
    """At the same address, of the same shape."""
    args = tiny_args(dim=32, n_heads=4, n_kv_heads=2, head_dim=8)
    fast, plain = fast_twin(tiny_model(args), "float32")
    cache, other = make_cache(fast, 1), make_cache(plain, 1)
    with torch.inference_mode():
        for _ in range(2):
            got, want = (m.forward(torch.tensor([3]), [1], c) for m, c in ((fast, cache), (plain, other)))
            assert distance([got], [want]) <= TOLERANCE
            for model in (fast, plain):
                weight = model.layers[0].attention.wo.weight
                weight.data = weight.data.T


def test_one_cache_for_two_models() -> None:
    a, b = (fast_twin(tiny_model(tiny_args(), seed=seed), "float32")[0] for seed in (5, 6))
    cache = make_cache(a, 1)
    with torch.inference_mode():
        found = [model.forward(torch.tensor([3]), [1], cache) for model in (a, b, a)]
        decode._descriptions.clear()
        cache.reset()
        again = [model.forward(torch.tensor([3]), [1], cache) for model in (a, b, a)]
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


def test_a_description_goes_with_its_cache() -> None:
    fast, _ = fast_twin(tiny_model(tiny_args()), "float32")
    with torch.inference_mode():
        cache = make_cache(fast, 1)
        fast.forward(torch.tensor([3]), [1], cache)
        assert cache in decode._descriptions[fast]
        gone = weakref.ref(cache)
        del cache
        gc.collect()
        assert gone() is None


def test_a_cache_does_not_keep_its_model() -> None:
    fast, _ = fast_twin(tiny_model(tiny_args()), "float32")
    cache = make_cache(fast, 1)
    with torch.inference_mode():
        fast.forward(torch.tensor([3]), [1], cache)
    gone = weakref.ref(fast)
    del fast
    gc.collect()
    assert gone() is None
    assert cache.lengths == [1]


def test_other_linears_and_gradients_take_the_plain_way(decodes: list[int]) -> None:
    args = tiny_args()
    fast, _ = fast_twin(tiny_model(args), "float32")
    fast.forward(torch.tensor([3]), [1], make_cache(fast, 1))  # with gradients on
    plain = Linear(args.dim, args.n_heads * args.head_dim)
    fast.layers[1].attention.wq = plain
    with torch.inference_mode():
        fast.forward(torch.tensor([3]), [1], make_cache(fast, 1))
        fast.forward(torch.tensor([3]), [1])  # without a cache
    assert not decodes


# --- plugged in at load


def test_load_takes_the_kernels_and_leaves_the_weights_where_they_are(tmp_path: Path, decodes: list[int]) -> None:
    folder = make_folder(tmp_path / "model", sliding_window=3)
    fast, plain = load(folder, device="cpu"), load(folder, device="cpu", kernels=False)
    assert "kernels for decode steps" in fast.describe()
    assert "; kernels" not in plain.describe()
    assert type(plain.model) is Transformer
    assert isinstance(fast.model, FastTransformer)
    assert fast.model.state_dict().keys() == plain.model.state_dict().keys()
    both = [complete(["The king", "A"], x.model, x.tokenizer, max_tokens=12, temperature=0) for x in (fast, plain)]
    assert [r.tokens for r in both[0]] == [r.tokens for r in both[1]]
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=TOLERANCE)
    assert len(decodes) >= 11


def test_narrow_weights_stay_narrow(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    state = {n: t.bfloat16() for n, t in load(folder, kernels=False).model.state_dict().items()}
    folder = make_folder(tmp_path / "narrow", state)
    assert load(folder, device="cpu").model.output.weight.dtype == torch.bfloat16
    assert load(folder, device="cpu", kernels=False).model.output.weight.dtype == torch.float32


def test_an_attention_that_was_asked_for_is_the_one_used(tmp_path: Path, decodes: list[int]) -> None:
    loaded = load(make_folder(tmp_path / "model"), device="cpu", attention="eager")
    assert "attention eager; kernels for products" in loaded.describe()
    complete(["The king"], loaded.model, loaded.tokenizer, max_tokens=5)
    assert not decodes


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_while_loading(tmp_path: Path, kind: str, decodes: list[int]) -> None:
    folder = make_folder(tmp_path / "model", sliding_window=3)
    loaded, plain = load(folder, device="cpu", quant=kind), load(folder, device="cpu", kernels=False)
    assert f"weights/compute/cache {kind}/float32/float32" in loaded.describe()
    assert f"{loaded.parameters / 1e6:.1f} M" in loaded.describe()
    kinds = {type(m) for n, m in loaded.model.named_modules() if n.startswith("layers.0.") and "w" in n[-2:]}
    assert kinds == {LINEARS[kind]}
    assert type(loaded.model.output) is Int8Linear
    complete(["The king"], loaded.model, loaded.tokenizer, max_tokens=5)
    assert decodes
    # The same rounding without kernels gives the same numbers.
    slow = load(folder, device="cpu", quant=kind, kernels=False)
    ids = torch.arange(40)
    with torch.inference_mode():
        a, b, c = (m.model.forward(ids, [40]) for m in (loaded, slow, plain))
    assert distance([a], [b]) <= budget(kind)
    assert float(np.abs(logprobs(a) - logprobs(c)).max()) > TOLERANCE


def test_options_that_cannot_be(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    for options, message in (
        ({"quant": "int3"}, "quant 'int3' is not one of int8, int4"),
        ({"quant": "int8", "dtype": "float64"}, "quantized weights are for a CPU in float32, or for CUDA, not for cpu"),
        ({"kernels": True, "dtype": "float16"}, "execution kernels is for a CPU in float32 or bfloat16"),
    ):
        with pytest.raises(OptionError, match=message):
            load(folder, device="cpu", **options)


def test_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cli: Command = in_process(capfd)
    folder = make_folder(tmp_path / "model")
    words = ("complete", folder, "The king", "--max_tokens", 5, "--temperature", 0)
    fast, plain = cli(*words), cli(*words, "--execution", "eager")
    assert fast.text == plain.text
    assert "kernels for decode steps" in fast.err
    assert "; kernels" not in plain.err
    assert "int4/float32/float32" in cli(*words, "--quant", "int4").err
    assert cli(*words, "--quant", "int5").error == "--quant 'int5' is not one of int8, int4, none"


# --- built once


@pytest.fixture
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine on which nothing has been built yet, and functions that do nothing, which take no time to build."""
    stub, parts = (
        tmp_path / "kernels.c",
        [path.read_text(encoding="utf-8") for path in (kernels.SOURCE, *kernels.HEADERS)],
    )
    names = re.findall(r"^(?:void|int64_t) (\w+)\(", "\n".join(parts), re.MULTILINE)
    stub.write_text("\n".join(f"void {name}(void) {{}}" for name in names))
    monkeypatch.setattr(kernels, "SOURCE", stub)
    monkeypatch.setattr(kernels, "HEADERS", ())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.cache_clear()
    yield tmp_path / "cache" / "mistral-ref"
    library.cache_clear()


def test_built_once_and_found_again(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library()
    assert [record.message for record in caplog.records] == [
        "compiling the C kernels for this machine, which is done once and may take a minute"
    ]
    caplog.clear()
    (built,) = unbuilt.glob("*.so")
    assert built.name.startswith("kernels-")
    library.cache_clear()
    monkeypatch.setattr("subprocess.run", None)  # whoever compiles fails
    library()
    assert not caplog.records
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, "-O1"))
    library.cache_clear()
    with pytest.raises(TypeError):
        library()


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", r"there is no compiler \(no-such-compiler\)"),
        ("false", "false cannot build them: exit 1"),
        ("true", "true made no library"),
        ("'", "CC is .* No closing quotation"),
    ],
)
def test_no_compiler_is_the_plain_path_and_a_line(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str, message: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    folder = make_folder(tmp_path / "model")
    loaded = load(folder, device="cpu")
    assert type(loaded.model) is Transformer
    assert "; kernels" not in loaded.describe()
    (note,) = [n for n in loaded.notes if "kernels" in n]
    assert note.startswith("no C kernels, which are several times faster: ")
    with pytest.raises(OptionError, match=message):
        load(folder, device="cpu", kernels=True)
    assert not list(unbuilt.iterdir()) if unbuilt.exists() else True


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_weights_in_few_bits_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quant: str) -> None:
    folder, few = make_folder(tmp_path / "model"), tmp_path / "few"
    library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("CC", "no-such-compiler")
        found = load(folder, device="cpu", quant=quant)
        convert(folder, few, "mistral", quant=quant)
        again = load(few, device="cpu")
        assert any(note.startswith("no C kernels") for note in found.notes)
        here = [
            complete([[1, 5, 9]], x.model, x.tokenizer, max_tokens=6, temperature=0)[0].tokens for x in (found, again)
        ]
    library.cache_clear()
    asked = load(folder, device="cpu", quant=quant, kernels=False)
    monkeypatch.setattr("mistral.fast.linear.product", None)  # whoever calls it fails
    here.append(complete([[1, 5, 9]], asked.model, asked.tokenizer, max_tokens=6, temperature=0)[0].tokens)
    assert here[0] == here[1] == here[2]


@pytest.mark.parametrize("damage", [lambda b: b[:5000], lambda b: b"", lambda b: b + b"x"])
def test_a_library_that_is_damaged_is_built_again(unbuilt: Path, damage: Callable[[bytes], bytes]) -> None:
    library()
    (built,) = unbuilt.glob("*.so")
    content = built.read_bytes()
    built.unlink()  # this process has it mapped
    built.write_bytes(damage(content))
    library.cache_clear()
    library()
    assert kernels._intact(built)


def test_a_blank_compiler_is_the_usual_one(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", " ")
    library()


def test_a_place_that_cannot_be_written(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbuilt.parent.write_text("a file")
    with pytest.raises(KernelsUnavailable, match="cannot be written"):
        library()


def test_a_full_disk_is_told_before_anything_is_compiled(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each run would compile first and then find out. A limit on files is what a test can have of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr("subprocess.run", None)  # whoever compiles fails
    resource.setrlimit(resource.RLIMIT_FSIZE, (kernels.ROOM - 1, hard))
    try:
        with pytest.raises(KernelsUnavailable, match=f"cannot be written: {os.strerror(errno.EFBIG)}"):
            library()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(unbuilt.iterdir())


def test_the_library_takes_less_room_than_is_tried() -> None:
    assert Path(library()._name).stat().st_size < kernels.ROOM


# --- quantized weights on disk


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_a_folder_in_few_bits_is_the_model_that_was_rounded_while_loading(quant: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    written = convert(folder, tmp_path / "few", "mistral", quant=quant)
    assert written.nbytes == sum(t.nbytes for t in read_folder(tmp_path / "few").tensors.values())
    loaded, rounded = load(tmp_path / "few", device="cpu"), load(folder, device="cpu", quant=quant)
    assert (loaded.runtime, loaded.parameters) == (rounded.runtime, rounded.parameters)
    ours, theirs = loaded.model.state_dict(), rounded.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert load(tmp_path / "few", device="cpu", quant=quant).runtime.quant == quant
    ids = torch.tensor([1, 5, 9, 3])
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids, [4]), rounded.model(ids, [4]))


def test_a_folder_in_few_bits_is_not_rounded_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cli = in_process(capfd)
    folder = make_folder(tmp_path / "model")
    few = tmp_path / "few"
    assert cli("convert", folder, few, "--to", "mistral", "--quant", "int4").code == 0
    for words, error in (
        (
            ["complete", few, "Hi", "--quant", "int8"],
            f"the weights of {few} are already quantized to int4: omit quant",
        ),
        (
            ["convert", few, tmp_path / "again", "--to", "mistral"],
            f"the weights of {few} are already quantized to int4",
        ),
        (["convert", folder, tmp_path / "hf", "--to", "hf", "--quant", "int4"], "quantized weights are written in"),
        (["convert", folder, tmp_path / "int2", "--to", "mistral", "--quant", "int2"], "quant 'int2' is not one of"),
        (["complete", few, "Hi", "--dtype", "float64"], "quantized weights are for a CPU in float32"),
    ):
        done = cli(*words)
        assert done.code == 2
        assert done.error.startswith(error)
    told = cli("inspect", few).text
    assert "it does not read int4 weights of this library" in told
    assert "dtypes:" not in told
    assert "the size of bfloat16" not in told


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_that_mean_nothing(value: float, tmp_path: Path) -> None:
    few = tmp_path / "few"
    convert(make_folder(tmp_path / "model"), few, "mistral", quant="int8")
    (file,) = few.glob("*.safetensors")
    tensors = load_file(file)
    tensors["output.scale"][3] = value
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"output\.weight: a scale of its int8 weights is negative or no number"):
        load(few, device="cpu")


@pytest.mark.parametrize("key", ["quantization", "few_bits"])
@pytest.mark.parametrize("told", [None, "int8", "int4", "int3", 4, True, {"qformat_weight": "fp8_e4m3"}])
def test_a_folder_that_says_another_number_of_bits(key: str, told: Any, tmp_path: Path) -> None:
    convert(make_folder(tmp_path / "model"), tmp_path / "few", "mistral", quant="int4")
    path = tmp_path / "few" / "params.json"
    params = json.loads(path.read_text())
    assert params.pop("quantization") == "int4-affine"
    path.write_text(json.dumps({**params, key: told} if told else params))
    with pytest.raises(FormatError, match=f"{key}|weights in|makes|qscale_weight"):
        load(tmp_path / "few")


def test_a_folder_written_before_the_key_had_its_name(tmp_path: Path) -> None:
    convert(make_folder(tmp_path / "model"), tmp_path / "few", "mistral", quant="int8")
    path = tmp_path / "few" / "params.json"
    params = json.loads(path.read_text())
    state = load(tmp_path / "few", device="cpu").model.state_dict()
    path.write_text(json.dumps({**params, "few_bits": "int8"}))  # both, and they agree
    assert read_folder(tmp_path / "few").quant == "int8"
    path.write_text(json.dumps({**params, "few_bits": "int4"}))
    with pytest.raises(FormatError, match="params.json has both quantization = 'int8' and few_bits = 'int4'"):
        read_folder(tmp_path / "few")
    del params["quantization"]
    path.write_text(json.dumps({**params, "few_bits": "int8"}))
    again = load(tmp_path / "few", device="cpu").model.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.items())
