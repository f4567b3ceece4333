"""The model against float64 truth, in every way of feeding it: whole, in chunks, token by token, batched, alone."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral.args import ModelArgs
from mistral.attention import eager, tiled
from mistral.cache import CacheError, RollingBufferCache
from mistral.generate import generate
from mistral.linear import widened_product
from mistral.model import RMSNorm, Transformer
from tests.support.tiny import (
    TOLERANCE,
    at_random,
    distance,
    in_chunks,
    largest,
    logprobs,
    make_cache,
    play,
    poison_rows,
    prefill_then_decode,
    ragged,
    tiny_args,
    tiny_model,
    true_logprobs,
    whole,
)
from tests.support.truth import truth
from tests.text.test_generate import Letters

LENS = [1, 7, 23, 40]
WINDOWS = [1, 3, 8, 1000, None, [None, 3], [3, None], [2, 7]]
FAR = 131_072


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# The matrix: every way of feeding the same tokens gives the same numbers.


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_whole_is_the_truth_in_every_layer(window):
    model = tiny_model(tiny_args(sliding_window=window))
    prompts = ragged(LENS, model.args.vocab_size)
    seen = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: seen.append(out)) for layer in model.layers]
    logits = whole(model, prompts)
    for hook in hooks:
        hook.remove()
    assert len(seen) == model.args.n_layers
    for row, prompt in enumerate(prompts):
        want, hidden = truth(model.state_dict(), model.args, prompt)
        assert logits[row].dtype == torch.float32
        assert logprobs(logits[row]).shape == want.shape
        assert largest(logprobs(logits[row]) - want) < TOLERANCE
        for layer, h in zip(seen, hidden, strict=True):
            got = layer.split(LENS)[row].double().numpy()
            assert got.shape == h.shape
            assert largest(got - h) < TOLERANCE


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_chunks_of_any_size_are_the_truth(window):
    model = tiny_model(tiny_args(sliding_window=window), seed=1)
    prompts = ragged(LENS, model.args.vocab_size, seed=1)
    want = true_logprobs(model, prompts)
    small = min(w for w in (*model.args.windows, 9) if w is not None)
    # Below, at and above W; token by token; several W; all at once.
    for chunk in sorted({1, max(1, small - 1), small, small + 1, 3 * small + 1, max(LENS)}):
        for positions in (0, max(LENS)):
            cache = make_cache(model, len(LENS), positions)
            got = play(model, prompts, in_chunks(LENS, chunk), cache)
            assert cache.lengths == LENS
            assert distance(got, want) < TOLERANCE, (chunk, positions)


@pytest.mark.parametrize("window", [1, 4, None, [None, 3]], ids=str)
def test_rows_may_bring_nothing_one_or_many_tokens_to_a_step(window):
    model = tiny_model(tiny_args(sliding_window=window), seed=2)
    prompts = ragged([6, 12, 13, 1], model.args.vocab_size, seed=2)
    schedule = [[0, 5, 1, 0], [5, 0, 9, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 6, 2, 0]]
    got = play(model, prompts, schedule, make_cache(model, 4, positions=13))
    assert distance(got, true_logprobs(model, prompts)) < TOLERANCE


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_decode_after_a_ragged_prefill(window):
    """One run whose rows are at different positions: the shorter rows have empty slots where the longest has keys."""
    lens = [9, 40, 3, 21]
    model = tiny_model(tiny_args(sliding_window=window), seed=25)
    prompts = ragged(lens, model.args.vocab_size, seed=25)
    got = play(model, prompts, prefill_then_decode(lens, 7), make_cache(model, 4, positions=40))
    assert distance(got, true_logprobs(model, prompts)) < TOLERANCE


@st.composite
def shapes(draw) -> ModelArgs:
    heads, kv_heads = draw(st.sampled_from([(4, 2), (3, 1), (6, 3), (6, 2), (4, 1)]))
    head_dim = draw(st.sampled_from([2, 4, 6, 10]))
    return tiny_args(
        dim=draw(st.sampled_from([d for d in (10, 17, 28) if d != heads * head_dim])),
        n_layers=draw(st.sampled_from([2, 4])),
        head_dim=head_dim,
        hidden_dim=draw(st.integers(5, 40)),
        n_heads=heads,
        n_kv_heads=kv_heads,
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        vocab_size=draw(st.integers(3, 70)),
        sliding_window=draw(st.sampled_from([1, 2, 3, 5, 8, 13, 500, None, [None, 3], [1, None], [6, 2], [None, 7]])),
        rope_theta=draw(st.sampled_from([None, 1e4, 1e6])),
    )


@settings(max_examples=40)
@given(
    args=shapes(),
    lens=st.lists(st.integers(1, 45), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    chunk=st.integers(1, 20),
    start=st.sampled_from([0, 0, 3, 130_001]),
    block=st.sampled_from([1, 2, 3, 128]),
    growth=st.sampled_from([1, 4, 256]),
    reserve=st.booleans(),
)
def test_every_way_agrees(args, lens, seed, chunk, start, block, growth, reserve):
    """Whole = chunks = ragged schedule = token by token = alone = truth, for any tile and first capacity."""
    model = tiny_model(args, seed)
    prompts = ragged(lens, args.vocab_size, seed)
    want = true_logprobs(model, prompts, start)
    positions = max(lens) if reserve else 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mistral.window.QUERY_BLOCK", block)
        patch.setattr("mistral.cache.GROWTH", growth)
        if start == 0:
            assert distance(whole(model, prompts), want) < TOLERANCE
        for schedule in (in_chunks(lens, chunk), at_random(lens, seed), prefill_then_decode(lens, 5)):
            cache = make_cache(model, len(lens), positions, start)
            assert distance(play(model, prompts, schedule, cache), want) < TOLERANCE
        alone = make_cache(model, 1, positions, start)
        assert distance(play(model, prompts[-1:], in_chunks(lens[-1:], 1), alone), want[-1:]) < TOLERANCE


def test_a_prompt_wraps_the_buffer_many_times():
    model = tiny_model(tiny_args(sliding_window=4, n_layers=3), seed=3)
    prompts = ragged([90, 61], model.args.vocab_size, seed=3)
    want = true_logprobs(model, prompts)
    for schedule in (in_chunks([90, 61], 1), in_chunks([90, 61], 11), at_random([90, 61], 5)):
        cache = make_cache(model, 2, positions=90)
        got = play(model, prompts, schedule, cache)
        assert all(4 <= layer.capacity <= 8 for layer in cache.layers), "the buffer does not roll"
        assert distance(got, want) < TOLERANCE


@pytest.mark.parametrize("window", [127, 128, 129, 200, None, [None, 150]], ids=str)
def test_tiles_shorter_than_the_window(window):
    """At its real size a tile is shorter than these windows, so several tiles see the same keys."""
    model = tiny_model(tiny_args(sliding_window=window), seed=4)
    lens = [410, 3, 129]
    prompts = ragged(lens, model.args.vocab_size, seed=4)
    want = true_logprobs(model, prompts)
    assert distance(whole(model, prompts), want) < TOLERANCE
    for chunk in (410, 131, 64):
        got = play(model, prompts, in_chunks(lens, chunk), make_cache(model, 3, positions=410))
        assert distance(got, want) < TOLERANCE, chunk


def test_a_row_is_the_same_alone_and_in_any_company():
    model = tiny_model(tiny_args(), seed=5)
    prompts = ragged(LENS, model.args.vocab_size, seed=5)
    together = whole(model, prompts)
    alone = [whole(model, [p])[0] for p in prompts]
    others = ragged([11, 40, 2], model.args.vocab_size, seed=6)
    crowd = whole(model, [others[0], prompts[2], others[1], others[2]])[1]
    assert distance(together, alone) < TOLERANCE
    assert distance([crowd], [alone[2]]) < TOLERANCE
    far = [together[2][:5], together[3][:5]]
    assert distance(far[:1], far[1:]) > 0.1, "two different prompts that look the same show nothing"


# Slots and resets.


def test_storage_begins_zeroed():
    cache = RollingBufferCache(tiny_args(), 2, positions=9)
    assert all(layer.capacity for layer in cache.layers)
    assert all(not storage.any() for layer in cache.layers for storage in (layer.k, layer.v))


@pytest.mark.parametrize("attend", [None, tiled(eager)], ids=["sdpa", "eager"])
@pytest.mark.parametrize("window", [4, None, [None, 3]], ids=str)
def test_what_lies_in_unused_slots_changes_no_bit(window, attend):
    model = tiny_model(tiny_args(sliding_window=window), seed=7, attend=attend)
    lens = [1, 19, 6]
    prompts = ragged(lens, model.args.vocab_size, seed=7)
    schedule = at_random(lens, 7)
    clean = play(model, prompts, schedule, make_cache(model, 3, positions=19, poison=False))
    poisoned = play(model, prompts, schedule, make_cache(model, 3, positions=19))
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


@pytest.mark.parametrize("window", [1, 4, None, [None, 3]], ids=str)
def test_reset_forgets_everything(window):
    model = tiny_model(tiny_args(sliding_window=window), seed=8)
    first, second = ragged([30, 17], model.args.vocab_size), ragged([3, 22], model.args.vocab_size, seed=9)
    cache = make_cache(model, 2, positions=30)
    play(model, first, in_chunks([30, 17], 7), cache)
    cache.reset()
    assert cache.lengths == [0, 0]
    assert distance(play(model, second, in_chunks([3, 22], 5), cache), true_logprobs(model, second)) < TOLERANCE
    cache.reset(position=FAR)
    poison_rows(cache)
    got = play(model, second, in_chunks([3, 22], 5), cache)
    assert cache.lengths == [FAR + 3, FAR + 22]
    assert distance(got, true_logprobs(model, second, FAR)) < TOLERANCE


@pytest.mark.parametrize("window", [4, None, [None, 3]], ids=str)
def test_one_row_is_replaced_while_the_others_go_on(window):
    model = tiny_model(tiny_args(sliding_window=window), seed=10)
    prompts = ragged([24, 24], model.args.vocab_size, seed=10)
    new = ragged([21], model.args.vocab_size, seed=11)[0]
    cache = make_cache(model, 2, positions=24)
    play(model, [p[:12] for p in prompts], in_chunks([12, 12], 5), cache)
    cache.reset(row=1, position=40)
    poison_rows(cache, row=1)
    assert cache.lengths == [12, 40]
    got = play(model, [prompts[0][12:], new], [[5, 1], [0, 13], [7, 7]], cache)
    want = true_logprobs(model, prompts[:1])[0][12:], true_logprobs(model, [new], start=40)[0]
    assert distance(got, want) < TOLERANCE


@pytest.mark.parametrize("window", [1, 6, None, [None, 3]], ids=str)
@pytest.mark.parametrize("start", [130_000, 131_071, 1_000_003])
def test_positions_far_out(start, window):
    model = tiny_model(tiny_args(sliding_window=window), seed=12)
    lens = [25, 1, 14]
    prompts = ragged(lens, model.args.vocab_size, seed=12)
    want = true_logprobs(model, prompts, start)
    for positions in (0, 25):
        got = play(model, prompts, at_random(lens, 12), make_cache(model, 3, positions, start))
        assert distance(got, want) < TOLERANCE


def test_an_offset_is_kept_between_steps():
    """Rotation is relative, so log-probs hardly tell offsets apart: look at the positions."""
    model = tiny_model(tiny_args(sliding_window=None), seed=12)
    prompt = ragged([12], model.args.vocab_size, seed=12)
    cache = make_cache(model, 1, 12, FAR)
    model.forward(prompt[0][:6], [6], cache)
    assert cache.plan([6]).positions.tolist() == list(range(FAR + 6, FAR + 12))


def test_rows_begin_at_different_positions():
    model = tiny_model(tiny_args(sliding_window=[None, 4]), seed=13)
    lens, starts = [20, 9, 15], [0, 3, FAR]
    prompts = ragged(lens, model.args.vocab_size, seed=13)
    cache = make_cache(model, 3, positions=20)
    for row, start in enumerate(starts):
        cache.reset(row, start)
    got = play(model, prompts, in_chunks(lens, 6), cache)
    assert cache.lengths == [20, 12, FAR + 15]
    want = [true_logprobs(model, [p], s)[0] for p, s in zip(prompts, starts, strict=True)]
    assert distance(got, want) < TOLERANCE


@pytest.mark.parametrize("start", [0, FAR + 5])
@pytest.mark.parametrize("window", [300, None, [None, 300]], ids=str)
def test_a_cache_that_grows_equals_a_reserved_one(window, start):
    model = tiny_model(tiny_args(sliding_window=window), seed=14)
    lens = [700, 31]
    prompts = ragged(lens, model.args.vocab_size, seed=14)
    schedule = in_chunks(lens, 90)
    grown = make_cache(model, 2, 0, start)
    assert all(layer.capacity == 0 for layer in grown.layers)
    capacities = []
    pieces = []
    done = 0
    for step in schedule:
        ids = torch.cat([p[done : done + n] for p, n in zip(prompts, step, strict=True)])
        pieces.append(model.forward(ids, step, grown)[: step[0]])
        done += 90
        if grown.layers[0].capacity not in capacities:
            capacities.append(grown.layers[0].capacity)
    assert len(capacities) >= 2, capacities
    reserved = play(model, prompts, schedule, make_cache(model, 2, 700, start))
    got = torch.cat(pieces)
    assert distance([got], reserved[:1]) < TOLERANCE
    assert distance([got], true_logprobs(model, prompts[:1], start)) < TOLERANCE


def test_growth_moves_keys_that_have_rolled(monkeypatch):
    """A row that began further on lies anywhere in its slots when they move to a larger storage."""
    monkeypatch.setattr("mistral.cache.GROWTH", 1)
    model = tiny_model(tiny_args(sliding_window=[None, 11]), seed=15)
    prompts = ragged([75, 40, 3], model.args.vocab_size, seed=15)
    for start in (0, 5, 130_003):
        cache = make_cache(model, 3, positions=3, start=start)
        got = play(model, prompts, in_chunks([75, 40, 3], 2), cache)
        assert cache.layers[0].capacity >= 75
        assert cache.layers[1].capacity < 2 * 11
        assert distance(got, true_logprobs(model, prompts, start)) < TOLERANCE


def test_fewer_sequences_than_rows_leave_the_last_rows_alone():
    model = tiny_model(tiny_args(), seed=16)
    prompts = ragged([9, 14], model.args.vocab_size, seed=16)
    cache = make_cache(model, 3, positions=14)
    first = model.forward(torch.cat([prompts[0], prompts[1][:8]]), [9, 8], cache)
    before = [(layer.k[1:].clone(), layer.v[1:].clone()) for layer in cache.layers]
    model.forward(prompts[0][:1], [1], cache)
    assert cache.lengths == [10, 8, 0]
    for layer, (k, v) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.k[1:], k)
        assert torch.equal(layer.v[1:], v)
    rest = model.forward(prompts[1][8:], [0, 6], cache)
    got = [torch.cat([first[9:], rest])]
    assert distance(got, true_logprobs(model, prompts[1:])) < TOLERANCE


def test_an_empty_step_is_a_step():
    model = tiny_model(tiny_args())
    cache = make_cache(model, 2, positions=4)
    none = torch.empty(0, dtype=torch.int64)
    assert model.forward(none, [0, 0], cache).shape == (0, model.args.vocab_size)
    assert model.forward(none, []).shape == (0, model.args.vocab_size)
    assert cache.lengths == [0, 0]


# Dtypes.


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_double_model_is_the_truth(window):
    model = tiny_model(tiny_args(sliding_window=window), seed=17).double()
    prompts = ragged(LENS, model.args.vocab_size, seed=17)
    want = true_logprobs(model, prompts)
    got = whole(model, prompts)
    assert got[0].dtype == torch.float64
    assert distance(got, want) < 1e-11
    assert distance(play(model, prompts, at_random(LENS, 17), make_cache(model, 4, positions=40)), want) < 1e-11
    far = play(model, prompts, at_random(LENS, 18), make_cache(model, 4, start=FAR))
    assert distance(far, true_logprobs(model, prompts, FAR)) < 1e-11


def test_the_plain_path_is_the_truth():
    model = tiny_model(tiny_args(sliding_window=[None, 3]), seed=18, attend=tiled(eager))
    prompts = ragged(LENS, model.args.vocab_size, seed=18)
    want = true_logprobs(model, prompts)
    assert distance(whole(model, prompts), want) < TOLERANCE
    assert distance(play(model, prompts, at_random(LENS, 1), make_cache(model, 4)), want) < TOLERANCE


@pytest.mark.parametrize("scale", [3.0, 8.0])
def test_hot_weights_stay_within_four_times_the_plain_path(scale):
    args = tiny_args(n_layers=4)
    model, reference = (tiny_model(args, 19, scale, attend) for attend in (None, tiled(eager)))
    prompts = ragged(LENS, args.vocab_size, seed=19)
    want = true_logprobs(model, prompts)
    allowed = max(TOLERANCE, 4 * distance(whole(reference, prompts), want))
    assert distance(whole(model, prompts), want) <= allowed
    assert distance(play(model, prompts, at_random(LENS, 2), make_cache(model, 4)), want) <= allowed


@pytest.mark.parametrize("rows", [1, 63, 64, 200])
def test_a_widened_product_is_the_whole_product(rows, monkeypatch):
    monkeypatch.setattr("mistral.linear.WIDEN", 1)  # tiles of 64 rows
    x, weight = torch.randn(5, 48, requires_grad=True), torch.randn(rows, 48).bfloat16()
    with torch.enable_grad():
        whole, product = torch.nn.functional.linear(x, weight.float()), widened_product(x, weight)
        (wanted,) = torch.autograd.grad(whole.square().sum(), x)
        (found,) = torch.autograd.grad(product.square().sum(), x)
    with torch.inference_mode():  # where all tiles share one place
        assert torch.equal(widened_product(x, weight), product)
        eps = torch.finfo(torch.float32).eps
        # Sums in another order: they differ by the rounding of what is summed, not of what it comes to.
        size = x.abs() @ weight.float().abs().T
        assert ((product - whole).abs() <= 8 * eps * size).all()
        assert ((found - wanted).abs() <= 8 * eps * (2 * size @ weight.float().abs())).all()


@pytest.mark.parametrize("at_once", [1, 2**20])
def test_narrow_weights_compute_as_their_widened_selves(at_once, monkeypatch):
    monkeypatch.setattr("mistral.linear.WIDEN", at_once)
    args = tiny_args(vocab_size=150)  # more than the rows widened at least
    narrow = tiny_model(args, seed=20, compute_dtype=torch.float32).bfloat16()
    wide = tiny_model(args, seed=20)
    wide.load_state_dict({name: w.float() for name, w in narrow.state_dict().items()})
    prompts = ragged(LENS, args.vocab_size, seed=20)
    assert narrow.output.weight.dtype == torch.bfloat16
    assert narrow.dtype == torch.float32
    h = narrow.forward_partial(torch.cat(prompts), LENS)
    assert h.dtype == torch.float32
    got = whole(narrow, prompts)
    assert largest(torch.cat(got).numpy() - torch.cat(whole(wide, prompts)).numpy()) < 1e-6
    assert distance(got, true_logprobs(narrow, prompts)) < TOLERANCE
    cache = make_cache(narrow, 4)
    assert cache.layers[0].k.dtype == torch.float32
    assert distance(play(narrow, prompts, at_random(LENS, 3), cache), true_logprobs(narrow, prompts)) < TOLERANCE


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_activations_have_the_compute_dtype(weights, compute):
    model = tiny_model(tiny_args(), compute_dtype=compute).to(weights)
    ids = ragged([9], model.args.vocab_size)[0]
    seen = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype)) for layer in model.layers]
    h = model.forward_partial(ids, [9])
    for hook in hooks:
        hook.remove()
    assert (model.dtype, h.dtype) == (compute, compute)
    assert seen == [compute] * 2
    assert model.logits(h).dtype == torch.promote_types(compute, torch.float32)


def test_compute_follows_the_weights_when_not_given():
    model = tiny_model(tiny_args())
    ids = ragged([9], model.args.vocab_size)[0]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert model.to(dtype).forward_partial(ids, [9]).dtype == dtype


def test_bf16_is_near_the_truth():
    model = tiny_model(tiny_args(), seed=21).bfloat16()
    prompts = ragged(LENS, model.args.vocab_size, seed=21)
    want = true_logprobs(model, prompts)
    ways = whole(model, prompts), play(model, prompts, at_random(LENS, 4), make_cache(model, 4))
    for got in ways:
        assert got[0].dtype == torch.float32
        assert all(torch.equal(x, x.bfloat16().float()) for x in got), "rule 10: a bf16 product, widened after"
        assert 1e-5 < distance(got, want) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rms_norm_casts_before_it_scales(dtype):
    """Rule 5, bit for bit; casting after the product differs in bf16."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(50, 64, generator=generator) * 6 - 3).to(dtype)
    weight = (torch.rand(64, generator=generator) + 0.5).to(dtype)
    norm = RMSNorm(64, 1e-2).to(dtype)
    norm.weight.copy_(weight)
    wide = x.to(torch.promote_types(dtype, torch.float32))
    scaled = wide * torch.rsqrt((wide**2).mean(-1, keepdim=True) + 1e-2)
    assert torch.equal(norm(x), scaled.to(dtype) * weight)
    if dtype is torch.bfloat16:
        assert not torch.equal(norm(x), (scaled * weight).to(dtype))


def test_conversion_back_and_forth_leaves_the_angles_alone():
    """Frequencies stay fp32 on the CPU wherever the weights go."""
    model = tiny_model(tiny_args(), seed=22).bfloat16().float()
    prompts = ragged(LENS, model.args.vocab_size, seed=22)
    assert distance(whole(model, prompts), true_logprobs(model, prompts)) < TOLERANCE


# Training through cache=None.


def loss_of(model: Transformer, prompts: list[torch.Tensor]) -> torch.Tensor:
    """Mean negative log-probability of each next token."""
    lens = [len(p) for p in prompts]
    logits = model.forward(torch.cat(prompts), lens)
    parts = [
        row[:-1].log_softmax(-1).gather(-1, p[1:, None]) for row, p in zip(logits.split(lens), prompts, strict=True)
    ]
    return -torch.cat(parts).mean()


@pytest.mark.parametrize("attend", [None, tiled(eager)], ids=["sdpa", "eager"])
@pytest.mark.parametrize("window", [1, 3, None, [None, 3]], ids=str)
def test_gradients_match_finite_differences(window, attend):
    model = tiny_model(tiny_args(sliding_window=window), seed=23, attend=attend).double()
    prompts = ragged([2, 9, 15], model.args.vocab_size, seed=23)
    with torch.enable_grad():
        loss_of(model, prompts).backward()
    narrow = tiny_model(tiny_args(sliding_window=window), seed=23, attend=attend)
    with torch.enable_grad():
        loss_of(narrow, prompts).backward()
    generator = torch.Generator().manual_seed(1)
    by_name = dict(narrow.named_parameters())
    for name, weight in model.named_parameters():
        grad = weight.grad
        assert grad is not None, name
        assert grad.isfinite().all(), name
        # With one key each, q and k have no say.
        if not (window == 1 and name.endswith(("wq.weight", "wk.weight"))):
            assert grad.abs().max() > 0, name
        assert largest((by_name[name].grad.double() - grad).numpy()) < TOLERANCE, name
        flat = weight.view(-1)
        biggest = int(grad.abs().argmax())
        for i in (biggest, int(torch.randint(flat.numel(), (1,), generator=generator))):
            kept = float(flat[i])
            step = 1e-5
            flat[i] = kept + step
            above = float(loss_of(model, prompts))
            flat[i] = kept - step
            below = float(loss_of(model, prompts))
            flat[i] = kept
            assert abs((above - below) / (2 * step) - float(grad.view(-1)[i])) < 1e-8, (name, i)


def test_inference_mode_first_does_not_spoil_training():
    model = tiny_model(tiny_args(), seed=24)
    prompts = ragged([9, 4], model.args.vocab_size, seed=24)
    with torch.inference_mode():
        before = whole(model, prompts)
    with torch.enable_grad():
        loss_of(model, prompts).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert distance(whole(model, prompts), [x.clone() for x in before]) < TOLERANCE


# Names, errors, global state.


def test_state_dict_has_the_checkpoint_names_and_shapes():
    args = tiny_args()
    q, kv, dim, hidden = 4 * 8, 2 * 8, 24, 40
    want = {"tok_embeddings.weight": (61, dim), "norm.weight": (dim,), "output.weight": (61, dim)}
    for i in range(2):
        want |= {
            f"layers.{i}.attention.wq.weight": (q, dim),
            f"layers.{i}.attention.wk.weight": (kv, dim),
            f"layers.{i}.attention.wv.weight": (kv, dim),
            f"layers.{i}.attention.wo.weight": (dim, q),
            f"layers.{i}.feed_forward.w1.weight": (hidden, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, hidden),
            f"layers.{i}.feed_forward.w3.weight": (hidden, dim),
            f"layers.{i}.attention_norm.weight": (dim,),
            f"layers.{i}.ffn_norm.weight": (dim,),
        }
    model = tiny_model(args)
    state = model.state_dict()
    assert {name: tuple(w.shape) for name, w in state.items()} == want
    other = tiny_model(args, seed=1)
    other.load_state_dict(state, strict=True)
    prompts = ragged(LENS, args.vocab_size)
    assert all(torch.equal(a, b) for a, b in zip(whole(model, prompts), whole(other, prompts), strict=True))


def test_windows_and_capacities_per_layer():
    cache = RollingBufferCache(tiny_args(n_layers=4, sliding_window=[None, 3]), 1, positions=50)
    assert [layer.window for layer in cache.layers] == [None, 3, None, 3]
    assert [layer.capacity for layer in cache.layers] == [50, 5, 50, 5]
    assert cache.nbytes == sum(2 * 4 * c * 2 * 8 for c in (50, 5, 50, 5))


@pytest.mark.parametrize("with_cache", [False, True])
def test_what_does_not_fit_together_is_refused_by_name(with_cache):
    model = tiny_model(tiny_args(max_batch_size=2))
    cache = make_cache(model, 3) if with_cache else None
    ids = torch.arange(6)
    with pytest.raises(ValueError, match=r"sum to 5.*\(6,\)"):
        model.forward(ids, [2, 3], cache)
    with pytest.raises(ValueError, match=r"sum to 7.*\(6,\)"):
        model.forward_partial(ids, [7], cache)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        model.forward(ids.view(2, 3), [3, 3], cache)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        model.forward(ids.view(2, 3), [1, 1], cache)
    with pytest.raises(ValueError, match="3 sequences.*max_batch_size is 2"):
        model.forward(ids, [2, 2, 2], cache)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model(torch.tensor([0, model.args.vocab_size]), [2])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model(torch.tensor([-1, 0]), [2])
    with pytest.raises(ValueError, match="negative"):
        model.forward(ids, [7, -1], cache)
    if cache is not None:
        assert cache.lengths == [0, 0, 0], "a refused step moved the cache"


def test_a_cache_refuses_what_it_cannot_hold():
    args = tiny_args()
    cache = RollingBufferCache(args, 2)
    with pytest.raises(CacheError, match="3 sequences for a cache of 2 rows"):
        tiny_model(args).forward(torch.arange(3), [1, 1, 1], cache)
    with pytest.raises(CacheError, match="negative"):
        cache.plan([1, -1])
    with pytest.raises(CacheError, match="-1"):
        cache.reset(position=-1)
    with pytest.raises(CacheError, match="no row 2"):
        cache.reset(row=2)
    with pytest.raises(CacheError, match="positions is -3"):
        RollingBufferCache(args, 1, positions=-3)
    with pytest.raises(CacheError, match="rows is 0"):
        RollingBufferCache(args, 0)
    assert issubclass(CacheError, ValueError)
    assert cache.lengths == [0, 0]
    assert all(layer.capacity == 0 for layer in cache.layers), "a refused step grew the storage"


def test_a_forward_leaves_global_state_alone():
    model = tiny_model(tiny_args())
    before = torch.random.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    play(model, ragged([9], 61), in_chunks([9], 4), make_cache(model, 1))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (torch.get_num_threads(), torch.get_default_dtype()) == before[1:]


def test_the_truth_itself_on_a_case_done_by_hand():
    """Attention over equal tokens gives back their value, so every position has the same hidden state."""
    args = tiny_args(sliding_window=None)
    model = tiny_model(args)
    ids = torch.tensor([5, 5, 5])
    logp, hidden = truth(model.state_dict(), args, ids)
    assert np.allclose(np.exp(logp).sum(-1), 1)
    assert np.allclose(hidden[0][0], hidden[0][2])
    assert len(hidden) == 2


def test_a_new_model_has_random_embeddings() -> None:
    """As nn.Embedding draws them: a model of one's own to train must not begin with what memory happened to hold."""
    torch.manual_seed(0)
    first, second = (Transformer(tiny_args(vocab_size=2000)).tok_embeddings.weight for _ in range(2))
    assert abs(first.std().item() - 1) < 0.02
    assert not torch.equal(first, second)


def test_a_float64_model_generates_in_float64() -> None:
    model = tiny_model(tiny_args()).double()
    prompts = ragged([9, 3], model.args.vocab_size)
    _, scored = generate([p.tolist() for p in prompts], model, Letters(), max_tokens=0, chunk_size=2)
    for got, want, prompt in zip(scored, true_logprobs(model, prompts), prompts, strict=True):
        picked = want[range(len(prompt) - 1), prompt[1:]]
        assert got == pytest.approx(picked.tolist(), abs=1e-12)


def test_copies_and_pickles() -> None:
    model = tiny_model(tiny_args())
    ids = torch.tensor([1, 2, 3])
    want = model(ids, [3])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids, [3]), want)


def test_lengths_may_be_a_tensor() -> None:
    model = tiny_model(tiny_args())
    cache = RollingBufferCache(model.args, 2)
    model(torch.arange(3), torch.tensor([1, 2]), cache)  # type: ignore[arg-type]
    assert cache.lengths == [1, 2]
