"""Who sees whom: the window's row sums, xformers' own masks, the reach of a token, and what a prefill allocates."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mistral.attention import Kernel, eager, sdpa, tiled
from mistral.cache import NoCache, RollingBufferCache
from mistral.window import visible
from tests.support.tiny import (
    all_at_once,
    at_random,
    in_chunks,
    make_cache,
    play,
    poison_rows,
    ragged,
    tiny_args,
    tiny_model,
)
from tests.support.truth import mask as true_mask

WINDOWS = [1, 2, 3, 7, 16, 100, None]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# The definition.


def row_sums(n: int, window: int | None) -> list[int]:
    positions = torch.arange(n)
    return visible(positions, positions, window).sum(-1).tolist()


@pytest.mark.parametrize("window", WINDOWS)
def test_row_sums_are_1_2_up_to_w_and_stay(window):
    assert row_sums(40, window) == [min(i + 1, window or 40) for i in range(40)]


@pytest.mark.parametrize("window", [1, 2, 3, 7, 16])
def test_row_sums_tell_the_neighbouring_windows_apart(window):
    want = [min(i + 1, window) for i in range(40)]
    assert row_sums(40, window + 1) != want
    assert row_sums(40, None) != want
    if window > 1:
        assert row_sums(40, window - 1) != want


@pytest.mark.parametrize("window", WINDOWS)
def test_visible_is_the_contracts_mask(window):
    positions = torch.arange(30)
    got = visible(positions, positions, window)
    assert got.dtype == torch.bool
    assert torch.equal(got, torch.from_numpy(true_mask(30, window)))


def test_keys_in_any_order_and_empty_slots():
    q, k = torch.tensor([[5, 6]]), torch.tensor([[6, -1, 3, 5, 7, 4, -1, 2]])
    assert visible(q, k, 3).tolist() == [
        [
            [False, False, True, True, False, True, False, False],
            [True, False, False, True, False, True, False, False],
        ]
    ]
    # At position 0 and 1 an empty slot would be inside the window if -1 were a position.
    assert visible(torch.tensor([0, 1]), torch.tensor([-1, 0]), 3).tolist() == [[False, True], [False, True]]
    assert visible(torch.tensor([0]), torch.tensor([-1]), None).tolist() == [[False]]


# The kernels.


@st.composite
def operands(draw, dtype=torch.float32):
    heads, kv_heads = draw(st.sampled_from([(4, 2), (3, 1), (6, 3), (2, 2)]))
    R, n, S, D = (draw(st.integers(1, top)) for top in (3, 9, 20, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=dtype) * 4 - 2

    mask = torch.rand((R, n, S), generator=generator) < draw(st.sampled_from([0.1, 0.5, 1.0]))
    return random(R, n, heads, D), random(R, S, kv_heads, D), random(R, S, kv_heads, D), mask


@given(operands())
def test_plain_equals_sdpa_where_every_query_sees_a_key(qkvm):
    q, k, v, mask = qkvm
    mask[..., 0] = True
    got, want = sdpa(q, k, v, mask), eager(q, k, v, mask)
    assert got.shape == want.shape == q.shape
    assert torch.allclose(got, want, rtol=0, atol=2e-6)


@given(operands(torch.float64))
def test_plain_equals_the_formula_head_by_head(qkvm):
    q, k, v, mask = qkvm
    got = eager(q, k, v, mask)
    group = q.shape[2] // k.shape[2]
    for r in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                seen = mask[r, i]
                want = torch.zeros(q.shape[3], dtype=torch.float64)
                if seen.any():
                    scores = k[r, seen, h // group] @ q[r, i, h] / q.shape[3] ** 0.5
                    want = scores.softmax(0) @ v[r, seen, h // group]
                assert torch.allclose(got[r, i, h], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_query_that_sees_no_key_yields_zero(dtype):
    q, k = torch.full((1, 2, 4, 8), 3.0, dtype=dtype), torch.full((1, 5, 2, 8), -2.0, dtype=dtype)
    mask = torch.zeros(1, 2, 5, dtype=torch.bool)
    mask[0, 1, 3] = True
    out = eager(q, k, torch.ones_like(k), mask)
    assert out.dtype == dtype
    assert not out[0, 0].any()
    assert torch.equal(out[0, 1], torch.ones(4, 8, dtype=dtype))


@pytest.mark.parametrize("kernel", [eager, sdpa])
def test_scores_far_apart_do_not_overflow(kernel):
    q = torch.full((1, 1, 2, 4), 300.0)
    k = torch.tensor([300.0, -300.0, 299.0])[None, :, None, None].expand(1, 3, 1, 4).contiguous()
    v = torch.tensor([1.0, 2.0, 4.0])[None, :, None, None].expand(1, 3, 1, 4).contiguous()
    out = kernel(q, k, v, torch.ones(1, 1, 3, dtype=torch.bool))
    assert torch.equal(out, torch.ones(1, 1, 2, 4))
    low = kernel(q, k, v, torch.tensor([[[False, True, False]]]))
    assert torch.equal(low, torch.full((1, 1, 2, 4), 2.0))


@pytest.mark.parametrize("kernel", [eager, sdpa])
def test_softmax_is_wide_for_narrow_inputs(kernel):
    """Rule 8: 300 equal keys weigh 1/300 each; in bf16 arithmetic their sum would stop at 256."""
    q, k = torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16), torch.zeros(1, 300, 1, 4, dtype=torch.bfloat16)
    v = torch.ones_like(k)
    assert torch.equal(kernel(q, k, v, torch.ones(1, 1, 300, dtype=torch.bool)), torch.ones_like(q))


# What the walk over tiles shows to a kernel, through the real storage.


def witness(seen: dict[int, list[int]]) -> Kernel:
    """A kernel that reads ids out of q and k (see `who_sees_whom`) and notes who sees whom."""

    def kernel(q, k, v, mask):
        assert torch.equal(k, v)
        for queries, keys, rows in zip(q[:, :, 0, 0], k[:, :, 0, 0], mask, strict=True):
            for query, row in zip(queries, rows, strict=True):
                assert int(query) not in seen
                seen[int(query)] = sorted(int(key) for key in keys[row])
        return q

    return kernel


def who_sees_whom(
    schedule: Sequence[Sequence[int]], window: int | None, cached: bool, positions: int = 0, start: int = 0
) -> dict[int, list[int]]:
    """For each token, named row * 10,000 + index, the names of the tokens it sees.

    The names travel as queries, keys and values through plan, store and tiles, and any key that
    was overwritten too early, kept too long or shown to another row changes a name.
    """
    rows = len(schedule[0])
    args = tiny_args(sliding_window=window, n_heads=1, n_kv_heads=1, head_dim=2)
    keys = RollingBufferCache(args, rows, positions=positions) if cached else NoCache(args, "cpu")
    if cached:
        keys.reset(position=start)
        poison_rows(keys)
    seen: dict[int, list[int]] = {}
    done = [0] * rows
    for step in schedule:
        names = [10_000.0 * row + done[row] + torch.arange(n) for row, n in enumerate(step)]
        x = torch.cat(names)[:, None, None].expand(-1, 1, 2).contiguous()
        plan = keys.plan(step)
        out = tiled(witness(seen))(x, x, x, keys.layer(0), plan)
        assert torch.equal(out, x), "the output is not in the order of the input"
        keys.commit(plan)
        done = [d + n for d, n in zip(done, step, strict=True)]
    return seen


@given(
    lens=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    window=st.sampled_from(WINDOWS),
    seed=st.integers(0, 2**31),
    start=st.sampled_from([0, 3, 130_001]),
    block=st.sampled_from([1, 2, 5, 128]),
    growth=st.sampled_from([1, 256]),
    reserve=st.booleans(),
)
def test_each_token_sees_its_window_and_nothing_else(lens, window, seed, start, block, growth, reserve):
    want = {
        10_000 * row + q: [10_000 * row + k for k in range(max(0, q - (window or 99) + 1), q + 1)]
        for row, n in enumerate(lens)
        for q in range(n)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mistral.window.QUERY_BLOCK", block)
        patch.setattr("mistral.cache.GROWTH", growth)
        assert who_sees_whom(all_at_once(lens), window, cached=False) == want
        for schedule in (all_at_once(lens), at_random(lens, seed)):
            positions = max(lens) if reserve else 0
            assert who_sees_whom(schedule, window, True, positions, start) == want


# xformers' bias objects, which define the window of the original package, materialised on the CPU.


def as_names(bias: torch.Tensor, q_names: list[int], k_names: list[int]) -> dict[int, list[int]]:
    """Who sees whom, from an additive bias [queries, keys]."""
    assert bias.shape == (len(q_names), len(k_names))
    assert bool(((bias == 0) | (bias == float("-inf"))).all())
    return {
        q: sorted(k for k, b in zip(k_names, row, strict=True) if b == 0)
        for q, row in zip(q_names, bias.tolist(), strict=True)
    }


def names(lens: Sequence[int], first: Sequence[int] | None = None) -> list[int]:
    starts = first or [0] * len(lens)
    return [10_000 * row + s + i for row, (n, s) in enumerate(zip(lens, starts, strict=True)) for i in range(n)]


@pytest.fixture(scope="module")
def biases():
    return pytest.importorskip("xformers.ops.fmha.attn_bias", reason="needs xformers")


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_prefill_is_xformers_block_diagonal_mask(biases, window, cached):
    lens = [1, 9, 30, 17]
    bias = biases.BlockDiagonalCausalMask.from_seqlens(lens, device=CPU)
    if window is not None:
        bias = bias.make_local_attention(window)
    want = as_names(bias.materialize((sum(lens), sum(lens))), names(lens), names(lens))
    assert who_sees_whom(all_at_once(lens), window, cached) == want
    if window is not None and window < 30:
        wider = biases.BlockDiagonalCausalMask.from_seqlens(lens, device=CPU).make_local_attention(window + 1)
        assert as_names(wider.materialize((sum(lens), sum(lens))), names(lens), names(lens)) != want


@pytest.mark.parametrize("window", WINDOWS)
def test_a_chunk_is_xformers_mask_from_the_bottom_right(biases, window):
    """The second chunk of each row, against all keys before it and against the last W of them, as the original."""
    past, new = [4, 19, 1, 30], [6, 5, 11, 1]
    total = [p + n for p, n in zip(past, new, strict=True)]
    seen = who_sees_whom([past, new], window, cached=True)
    ours = {q: seen[q] for q in names(new, past)}
    for kept in (past, past if window is None else [min(p, window) for p in past]):
        kv = [p + n for p, n in zip(kept, new, strict=True)]
        first = [t - k for t, k in zip(total, kv, strict=True)]
        bias = biases.BlockDiagonalMask.from_seqlens(new, kv, device=CPU)
        if window is None:
            bias = bias.make_causal_from_bottomright()
        else:
            bias = bias.make_local_attention_from_bottomright(window)
        assert as_names(bias.materialize((sum(new), sum(kv))), names(new, past), names(kv, first)) == ours


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("new", [[1, 1, 1, 1], [3, 1, 6, 2]], ids=["decode", "chunk"])
def test_a_step_is_xformers_mask_with_offset_and_padded_keys(biases, window, new):
    past, padding = [4, 19, 1, 30], 40
    total = [p + n for p, n in zip(past, new, strict=True)]
    seen = who_sees_whom([past, new], window, cached=True)
    ours = {q: seen[q] for q in names(new, past)}
    if window is None:
        bias = biases.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(new, padding, total)
    else:
        bias = biases.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(new, padding, total, window)
    dense = bias.materialize((sum(new), padding * len(new)))
    assert as_names(dense, names(new, past), names([padding] * len(new))) == ours


# Rule 13.

REACHES = [
    *((layers, window) for layers in (2, 3, 4) for window in (1, 2, 3, 5)),
    (1, 4),
    (2, 9),
    (4, [2, 5]),
    (4, [1, 3, 1, 2]),
    (6, 2),
]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("layers", "window"), REACHES, ids=str)
def test_a_token_reaches_w_minus_1_positions_a_layer_and_not_one_more(layers, window, cached):
    args = tiny_args(n_layers=layers, sliding_window=window)
    reach = sum(w - 1 for w in args.windows)
    model = tiny_model(args, seed=layers, scale=2.0)
    n, p = reach + 12, 4
    ids = ragged([n], args.vocab_size)[0]
    other = ids.clone()
    other[p] = (other[p] + 1) % args.vocab_size

    def run(ids):
        if not cached:
            return model.forward(ids, [n])
        return play(model, [ids], in_chunks([n], 3), make_cache(model, 1, positions=n))[0]

    changed = [not torch.equal(a, b) for a, b in zip(run(ids), run(other), strict=True)]
    assert changed[:p] == [False] * p, "a token changed what came before it"
    assert changed[p], "the token does not even change itself"
    assert changed[p + reach], f"the token does not reach {reach} positions on"
    assert changed[p + reach + 1 :] == [False] * (n - p - reach - 1), "the token reaches too far"


# What a forward allocates and computes with.


class Tensors(TorchDispatchMode):
    """Notes every operation, and the size and dtype of every tensor it takes or makes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()
        self.dtypes: set[torch.dtype] = set()
        self.largest = 0
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.add(func.name())
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.dtypes |= {x.dtype for x in (*made, *taken)}
        old = {x.untyped_storage()._cdata for x in taken}
        for x in made:
            self.largest = max(self.largest, x.numel())
            # A view of what was taken costs nothing.
            self.total += 0 if x.untyped_storage()._cdata in old else x.numel()
        return out


def prefill(n: int, window: int | None, cached: bool, attend=None) -> Tensors:
    # Few heads, so that what is T x T stands out against what is T x width.
    model = tiny_model(tiny_args(sliding_window=window, vocab_size=11), attend=attend)
    ids = ragged([n], 11)[0]
    with Tensors() as noted:
        cache = RollingBufferCache(model.args, 1, positions=n) if cached else None
        model.forward_partial(ids, [n], cache)
    return noted


@pytest.mark.parametrize("attend", [None, tiled(eager)], ids=["sdpa", "eager"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_prefill_never_makes_anything_t_by_t(cached, attend):
    T, W = 2048, 16
    noted = prefill(T, W, cached, attend)
    assert 0 < noted.largest < T * T / 4
    assert noted.largest <= T * 64, "more than the widest activation"
    half = prefill(T // 2, W, cached, attend)
    assert noted.largest <= 2 * half.largest
    assert noted.total <= 2.01 * half.total, "the elements made grow faster than the prompt"


@pytest.mark.parametrize("cached", [False, True])
def test_full_attention_holds_one_tile_of_scores_at_a_time(cached):
    assert prefill(2048, None, cached).largest < 2048 * 2048 / 4


@pytest.mark.parametrize("cached", [False, True])
def test_a_plan_does_not_keep_the_masks_of_a_long_prompt(cached):
    """Layers share what was derived for a short step; kept for each tile, it would grow with length times window."""
    model = tiny_model(tiny_args(sliding_window=16))
    cache = RollingBufferCache(model.args, 1) if cached else NoCache(model.args, "cpu")
    plan = cache.plan([640])
    model.step(ragged([640], model.args.vocab_size)[0], plan, cache)
    assert len(plan.memo) < 5
    cache.commit(plan)
    plan = cache.plan([1])
    model.step(torch.tensor([1]), plan, cache)
    assert len(plan.memo) == 1, "the layers of one window do not share their mask"


def test_a_t_by_t_mask_would_be_noticed():
    with Tensors() as noted:
        positions = torch.arange(2048)
        visible(positions, positions, 16)
    assert noted.largest >= 2048 * 2048 / 4


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_complex_or_double_and_nothing_waits_for_the_device(dtype, cached):
    """fp32 and integers only (and bf16, if the model is): devices lack complex and double."""
    model = tiny_model(tiny_args(sliding_window=[None, 3])).to(dtype)
    prompts = ragged([9, 1, 4], model.args.vocab_size)
    with Tensors() as noted:
        cache = RollingBufferCache(model.args, 3, dtype=dtype) if cached else None
        model.forward(torch.cat(prompts), [9, 1, 4], cache)
        model.forward(torch.arange(3), [1, 1, 1], cache)
    assert torch.float32 in noted.dtypes
    assert noted.dtypes <= {torch.float32, dtype, torch.int64, torch.bool}
    assert not any("complex" in name for name in noted.operations)
    # .item(), .tolist() on a device and indexing by a boolean mask all wait for it.
    assert not {name for name in noted.operations if "local_scalar" in name or "nonzero" in name}
