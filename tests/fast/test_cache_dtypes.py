"""The kernels with keys and values in fewer bits: what they keep, what they read, and what they cannot hold."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mistral import load
from mistral.buffers import Int8Buffer, RollingBuffer, buffer_for
from mistral.cache import RollingBufferCache
from mistral.fast.bitwise import BitwiseTransformer, NotDeterministic
from mistral.fast.decode import CACHE_KINDS, FastTransformer
from mistral.fast.kernels import KernelsUnavailable, library, pointer
from mistral.fast.linear import use_kernels
from mistral.generate import stream
from mistral.loader.options import OptionError
from mistral.model import Transformer
from mistral.plan import Tile
from tests.core.test_cache_dtypes import half_model
from tests.support.tiny import TOLERANCE, at_random, distance, in_chunks, play, ragged, tiny_args, tiny_model

try:
    library()
except KernelsUnavailable as reason:
    pytest.skip(f"no kernels here: {reason}", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
WINDOWS: tuple[Any, ...] = (None, 1, 3, 17, (None, 4), (6, 2))


def as_kernels(kind: type[FastTransformer], model: Transformer, dtype: torch.dtype) -> FastTransformer:
    with torch.device("meta"):
        fast = kind(model.args)
    fast.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    use_kernels(fast)
    fast.kept_in = {torch.float32: dtype}
    return fast


# --- what is kept


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=200)
@given(
    values=st.lists(st.floats(width=32) | st.floats(-(2.0**-13), 2.0**-13, width=32), min_size=1, max_size=40),
    scale=st.sampled_from([1.0, 2.0**-20, 2.0**14]),
)
def test_the_kernels_keep_the_bits_that_buffers_do(dtype: torch.dtype, values: list[float], scale: float) -> None:
    x = (torch.tensor(values) * scale)[None, None]
    store = buffer_for(dtype)(None, 1, 1, len(values), "cpu", dtype)
    beyond = dtype == torch.float16 and bool((x.half().isinf() & x.isfinite()).any())
    want = RollingBuffer.encode(store, x, x) if dtype != torch.int8 else store.encode(x, x)
    got, got_scale = torch.empty_like(want[0]), torch.full((1,), 7.0)
    kind, size = ctypes.c_int64(CACHE_KINDS[dtype]), ctypes.c_int64(len(values))
    assert bool(library().keep(kind, pointer(x), size, pointer(got), pointer(got_scale))) == beyond
    torch.testing.assert_close(got, want[0], rtol=0, atol=0, equal_nan=True)
    if dtype == torch.int8:
        torch.testing.assert_close(got_scale, want[2].view(1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_round_every_tie_as_buffers_do(dtype: torch.dtype) -> None:
    """Half way between any two neighbours, and the floats beside that place; the last is where infinity begins."""
    there = torch.arange(0x7C01 if dtype == torch.float16 else 0x7F81, dtype=torch.int16).view(dtype).float()
    there[-1] = 2 * there[-2] - there[-3]  # what would follow the largest number, were there more
    ties = (there[:-1].double() + there[1:].double()).div(2).float()
    ties = ties[ties.isfinite()]
    around = [ties, *(torch.nextafter(ties, torch.tensor(end)) for end in (0.0, torch.inf))]
    x = torch.cat([*around, *(-t for t in around)])
    got = torch.empty(len(x), dtype=dtype)
    kind, size = ctypes.c_int64(CACHE_KINDS[dtype]), ctypes.c_int64(len(x))
    library().keep(kind, pointer(x), size, pointer(got), None)
    assert torch.equal(got.view(torch.int16), x.to(dtype).view(torch.int16))


# --- what is read


class Peek(RollingBufferCache):
    """The cache of another model whose step has been made: what that kept is read, what comes now is noted."""

    def __init__(self, other: RollingBufferCache, lengths: list[int]) -> None:
        vars(self).update(vars(other), lengths=lengths)
        self.given: list[tuple[Tile, Tensor, Tensor]] = []
        self.stores = [self._peeking(store) for store in other.layers]

    def _peeking(self, store: RollingBuffer) -> RollingBuffer:
        twin = object.__new__(type(store))
        vars(twin).update(vars(store))

        def extend(tile: Tile, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            self.given.append((tile, k[:, tile.start : tile.stop], v[:, tile.start : tile.stop]))
            used = tile.k_pos.shape[1]
            return store.decode([part[tile.run.rows, :used] for part in store.storage], k.dtype)

        twin.extend = extend  # type: ignore[method-assign]
        return twin

    def layer(self, i: int) -> RollingBuffer:
        return self.stores[i]


def step_apart(kept: Tensor, scale: Tensor | None, given_: Tensor) -> bool:
    """Whether what is kept is what was given, rounded, where both were computed in fp32 in two ways."""
    if scale is not None:
        return bool(((kept * scale[..., None] - given_).abs() <= 0.501 * scale[..., None] + 1e-5).all())
    relative = {torch.float32: 0.0, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[kept.dtype] * 2
    return bool(((kept.float() - given_).abs() <= 1.01 * relative * given_.abs() + 1e-5).all())


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=12)
@given(
    window=st.sampled_from(WINDOWS),
    heads=st.sampled_from([(4, 2), (6, 3), (8, 1), (5, 5), (6, 2)]),
    head_dim=st.sampled_from([2, 8, 16, 34, 64, 128, 150]),
    lens=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    seed=st.integers(0, 100),
)
def test_decode_steps_read_what_is_kept(
    dtype: torch.dtype, window: Any, heads: tuple[int, int], head_dim: int, lens: list[int], seed: int
) -> None:
    args = tiny_args(sliding_window=window, n_heads=heads[0], n_kv_heads=heads[1], head_dim=head_dim)
    plain = tiny_model(args, seed)
    fast = as_kernels(FastTransformer, plain, dtype)
    cache = fast.make_cache(len(lens))
    prompts = ragged(lens, args.vocab_size, seed)
    with torch.inference_mode():
        fast(torch.cat(prompts), lens, cache)  # may be one tile or many, by the plain path
        for turn in range(6):
            before, step = list(cache.lengths), [int((row + turn) % 3 > 0) for row in range(len(lens))]
            ids = torch.arange(sum(step)) + turn
            got = fast(ids, step, cache)
            peek = Peek(cache, before)
            want = plain(ids, step, peek)
            assert distance([got], [want]) <= TOLERANCE
            for i, (tile, *both) in enumerate(peek.given):
                store = cache.layers[i // max(1, len(peek.given) // args.n_layers)]
                rows = torch.arange(tile.run.rows.start, tile.run.rows.stop)[:, None]
                for name, x in zip(("k", "v"), both, strict=True):
                    scale = getattr(store, f"{name}_scale")[rows, tile.slots] if dtype == torch.int8 else None
                    assert step_apart(getattr(store, name)[rows, tile.slots], scale, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 200, 4200])
def test_decode_steps_over_many_positions(window: int | None, dtype: torch.dtype) -> None:
    """Attention is taken in parts: one, several, and as many as there may be; over the end of the buffer, too."""
    args = tiny_args(n_heads=6, sliding_window=window, head_dim=32)
    plain = tiny_model(args, seed=4)
    fast = as_kernels(FastTransformer, plain, dtype)
    lengths = [5000, 127, 128, 129, 4097]
    cache = fast.make_cache(len(lengths), max(lengths) + 1)
    cache.lengths = list(lengths)
    generator = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        for layer in cache.layers:
            k, v = (torch.randn(*layer.k.shape, generator=generator) for _ in range(2))
            for storage, new in zip(layer.storage, layer.encode(k, v), strict=True):
                storage.copy_(new)
        ids = torch.arange(1, 1 + len(lengths))
        got = fast(ids, [1] * len(lengths), cache)
        assert distance([got], [plain(ids, [1] * len(lengths), Peek(cache, lengths))]) <= TOLERANCE


@pytest.mark.parametrize("slots", [1, -1])
def test_a_scale_of_another_position_is_noticed(slots: int) -> None:
    """The comparisons above can fail: scales that lie a slot further on give other numbers."""
    args = tiny_args(sliding_window=None)
    plain = tiny_model(args, seed=4)
    fast = as_kernels(FastTransformer, plain, torch.int8)
    cache = fast.make_cache(1, 30)
    with torch.inference_mode():
        fast(ragged([20], args.vocab_size)[0], [20], cache)
        got = fast(torch.tensor([3]), [1], cache)
        for layer in cache.layers:
            assert isinstance(layer, Int8Buffer)
            layer.k_scale = layer.k_scale.roll(slots, dims=1)
        assert distance([got], [plain(torch.tensor([3]), [1], Peek(cache, [20]))]) > 10 * TOLERANCE


# --- what float16 cannot hold


@pytest.mark.parametrize(("window", "matrix"), [(None, "wk"), (3, "wk"), (None, "wv")])
def test_a_key_or_a_value_beyond_float16_moves_its_layer_to_float32(
    window: Any, matrix: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = half_model(window, matrix)
    fast = as_kernels(FastTransformer, model, torch.float16)
    caches = [m.make_cache(1, 20) for m in (model, fast)]
    with torch.inference_mode():
        slow_and_fast = [
            torch.cat([m(part, [len(part)], cache) for part in (ids[:4], *ids[4:].split(1))])
            for m, cache in zip((model, fast), caches, strict=True)
        ]
    assert [layer.k.dtype for layer in caches[1].layers] == [torch.float16, torch.float32, torch.float16]
    assert caplog.text.count("exceed 65,504") == 2  # once each
    assert slow_and_fast[1].isfinite().all()
    assert distance([slow_and_fast[1]], [slow_and_fast[0]]) < 1e-3  # a key may round to the next number


def test_a_key_beyond_float16_is_refused_where_bits_count() -> None:
    model, ids = half_model(3)
    exact = as_kernels(BitwiseTransformer, model, torch.float16)
    with pytest.raises(NotDeterministic, match="exceed 65,504"):
        exact(ids, [len(ids)], exact.make_cache(1))
    exact.kept_in = {torch.float32: torch.bfloat16}
    assert exact(ids, [len(ids)], exact.make_cache(1)).isfinite().all()


# --- bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 3, (6, 2)])
def test_bits_depend_on_nothing_but_the_sequence(window: Any, dtype: torch.dtype) -> None:
    args = tiny_args(sliding_window=window, n_heads=6, n_kv_heads=2, hidden_dim=50)
    model = as_kernels(BitwiseTransformer, tiny_model(args, 4), dtype)
    lens = [60, 1, 23]
    prompts = ragged(lens, args.vocab_size)
    want = [play(model, [p], in_chunks([len(p)], 1), model.make_cache(1))[0] for p in prompts]
    for schedule in ([lens], in_chunks(lens, 19), at_random(lens, 7)):
        got = play(model, prompts, schedule, model.make_cache(3))
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    whole = play(model, prompts, [lens], None)
    assert all(torch.equal(g, w) for g, w in zip(whole, want, strict=True))


@pytest.mark.parametrize("cache_dtype", ["float16", "int8"])
def test_guessed_tokens_are_those_of_plain_decoding(cache_dtype: str) -> None:
    """Also where the window has rolled: refused guesses are rewound."""
    found = []
    for draft in (None, "ngram"):
        loaded = load(device="cpu", cache_dtype=cache_dtype, deterministic=True, draft=draft)
        prompts = ["one two three one two three one two", "The king"]
        pieces = stream(prompts, loaded.model, loaded.tokenizer, max_tokens=90, temperature=0.7, seed=3)
        tokens = [(p.index, p.token.id, p.token.logprob) for p in pieces if p.token]
        found.append([[token for token in tokens if token[0] == row] for row in range(2)])
    assert found[0] == found[1]


# --- options


def cache_of(**options: Any) -> torch.dtype:
    return load(device="cpu", **options).runtime.cache


def test_what_a_cache_is_kept_in() -> None:
    assert cache_of() == torch.float32  # although the bundled model has 16 bits: nothing is rounded unasked
    assert cache_of(quant="int4") == torch.float32
    assert cache_of(deterministic=True, cache_dtype="fp16") == torch.float16
    assert cache_of(cache_dtype="fp32") == torch.float32
    assert cache_of(dtype="bfloat16") == torch.bfloat16
    assert cache_of(dtype="float64") == torch.float64
    assert cache_of(dtype="float64", cache_dtype="auto") == torch.float64
    assert cache_of(dtype="float64", cache_dtype="float64") == torch.float64, "as it is printed"
    with pytest.raises(OptionError, match="cache_dtype float64 is for arithmetic in float64, and this is in float32"):
        cache_of(cache_dtype="float64")
    for name in ("float32", "bfloat16", "float16", "int8"):
        loaded = load(device="cpu", cache_dtype=name)
        assert loaded.model.make_cache(1).layer(0).k.dtype == getattr(torch, name)
        assert f"/{name}; attention" in loaded.describe()


@pytest.mark.parametrize("name", ["int4", "half", ""])
def test_caches_that_cannot_be(name: str) -> None:
    with pytest.raises(OptionError, match=f"cache_dtype '{name}' is not one of auto, float64"):
        load(device="cpu", cache_dtype=name)


def test_runtimes_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from mistral.loader import runtime
    from mistral.loader.options import LoadOptions

    cuda = torch.device("cuda")
    half = LoadOptions(cache_dtype="float16")
    assert runtime.pick_cache(half, cuda, torch.float16) == torch.float16
    with pytest.raises(OptionError, match="use --cache_dtype bfloat16"):
        runtime.pick_cache(half, cuda, torch.bfloat16)
    assert runtime.pick_cache(LoadOptions(), cuda, torch.bfloat16) == torch.bfloat16
    assert dataclasses.replace(half, cache_dtype=torch.int8).cache_dtype == "int8"
