"""Attention by other libraries, driven on the CPU by stand-ins for their kernels; and the choice by name."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from mistral import backends
from mistral.attention import eager, sdpa, tiled
from mistral.backends import flash, varlen, xformers
from mistral.cache import RollingBuffer, StepKeys
from mistral.plan import make_plan
from mistral.window import QUERY_BLOCK
from tests.support.tiny import (
    POISON,
    TOLERANCE,
    at_random,
    distance,
    in_chunks,
    make_cache,
    play,
    ragged,
    tiny_args,
    tiny_model,
)

CPU = torch.device("cpu")
# Below, at and above the tile (min(W, 128) tokens), and per layer.
WINDOWS = [1, 2, 7, QUERY_BLOCK, 150, None, (None, 3), (5, 140)]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [n, H, D], k and v [S, H, D], mask [n, S] bool: attention with a mask, every head on its own."""
    scores = torch.einsum("nhd,shd->hns", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hns,shd->nhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)


class Varlen:
    """A stand-in for varlen_attn of torch 2.12 and later: dense arithmetic from the boundaries alone."""

    def __init__(self):
        self.held = []  # for each call, how many more keys than queries each sequence had

    def __call__(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa or query.shape[1] == key.shape[1], "grouped heads must be asked for"
        return self.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size)

    def attend(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size):
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert query.dtype == key.dtype == value.dtype
        assert cu_seq_q[0] == cu_seq_k[0] == 0
        assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key)) == (len(query), len(value))
        n, s = cu_seq_q.diff(), cu_seq_k.diff()
        assert (max_q, max_k) == (n.max(), s.max())
        self.held.append((s - n).tolist())
        group = query.shape[1] // key.shape[1]
        left, right = window_size
        out = []
        for q, k, v in zip(*(x.split(m.tolist()) for x, m in ((query, n), (key, s), (value, s))), strict=True):
            ahead = torch.arange(len(k)) - (torch.arange(len(q))[:, None] + len(k) - len(q))
            mask = (ahead <= right) if left < 0 else (ahead <= right) & (ahead >= -left)
            out.append(dense(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), mask))
        return torch.cat(out)


class VarlenWithoutFlag(Varlen):
    """The interface of torch 2.11: grouped heads need not be asked for, and cannot be."""

    def __call__(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        return self.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size)


class MemoryEfficient:
    """A stand-in for xformers.ops.memory_efficient_attention: the real bias, made a dense mask."""

    def __init__(self):
        self.held = []

    def __call__(self, query, key, value, attn_bias):
        assert query.shape[0] == key.shape[0] == 1
        assert query.shape[2:] == key.shape[2:] == value.shape[2:], "grouped heads must be expanded"
        n, s = (torch.tensor(x.seqstart_py).diff() for x in (attn_bias.q_seqinfo, attn_bias.k_seqinfo))
        self.held.append((s - n).tolist())
        mask = attn_bias.materialize((query.shape[1], key.shape[1])) == 0
        q, k, v = (x[0].flatten(1, 2) for x in (query, key, value))
        return dense(q, k, v, mask)[None].view(query.shape)


def pairs(kind, window, **changes):
    """The same model on SDPA in tiles and on a stand-in, and the stand-in."""
    if kind is MemoryEfficient:
        pytest.importorskip("xformers.ops")
    stand_in = kind()
    attend = (xformers if kind is MemoryEfficient else flash).backend(stand_in)
    args = tiny_args(sliding_window=window, **changes)
    return tiny_model(args), tiny_model(args, attend=attend), stand_in


KINDS = pytest.mark.parametrize("kind", [Varlen, VarlenWithoutFlag, MemoryEfficient])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# The driving: gathering, bounds, writing back.


@KINDS
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_without_a_cache(kind, window):
    model, other, stand_in = pairs(kind, window)
    lens = [1, 1, 2, 30, 300]
    prompts = ragged(lens, model.args.vocab_size)
    assert distance(play(other, prompts, [lens], None), play(model, prompts, [lens], None)) < TOLERANCE
    assert stand_in.held == [[0] * len(lens)] * model.args.n_layers  # one call a layer, no key from elsewhere


@pytest.mark.parametrize("kind", [Varlen, MemoryEfficient])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_chunked_and_ragged(kind, window):
    model, other, stand_in = pairs(kind, window)
    lens = [420, 1, 290, 290, 33, 7]
    prompts = ragged(lens, model.args.vocab_size)
    schedules = [in_chunks(lens, 137), in_chunks(lens, 17), *(at_random(lens, seed) for seed in range(3))]
    for schedule, start in zip(schedules, (0, 1000, 0, 1000, 13), strict=True):
        want = play(model, prompts, schedule, make_cache(model, len(lens), start=start))
        got = play(other, prompts, schedule, make_cache(other, len(lens), start=start))
        assert distance(got, want) < TOLERANCE
    behind = [max(counts) for counts in stand_in.held]
    widest = max(0 if w == 1 else 420 if w is None else w - 1 for w in model.args.windows)
    assert max(behind) <= widest  # copying is bounded by the window
    assert widest == 0 or max(behind) > 0  # and keys were gathered


@KINDS
def test_a_mixed_step_uses_both_ways(kind):
    model, other, stand_in = pairs(kind, 6)
    lens = [40, 40, 12, 40, 21]
    schedule = [[20, 20, 0, 20, 20], [1, 3, 3, 0, 1], [9, 1, 9, 2, 0], [10, 16, 0, 18, 0]]
    prompts = ragged(lens, model.args.vocab_size)
    caches = [make_cache(m, 5) for m in (model, other)]
    assert distance(play(other, prompts, schedule, caches[1]), play(model, prompts, schedule, caches[0])) < TOLERANCE
    # Up to a tile of 6 tokens stays in the buffer, unless its run has no keys behind it at all; 9 tokens do not.
    calls = [[0] * 4, [5, 3], [5, 5, 5]]
    assert stand_in.held == [call for call in calls for _ in range(model.args.n_layers)]


@KINDS
def test_decoding_calls_no_kernel(kind):
    _, other, stand_in = pairs(kind, 4)
    cache = make_cache(other, 2)
    ids = ragged([2] * 12, other.args.vocab_size)
    other.forward(ids[0], [1, 1], cache)
    stand_in.held.clear()
    for step in ids[1:]:
        other.forward(step, [1, 1], cache)
    assert stand_in.held == []


@KINDS
def test_storage_narrower_than_the_arithmetic(kind):
    """Keys pass through the cache's dtype even when they are not read back, so chunking moves no number."""
    model, other, _ = pairs(kind, 9)
    lens = [35, 20]
    prompts = ragged(lens, model.args.vocab_size)

    def run(m, schedule):
        cache = make_cache(m, 2)
        for layer in cache.layers:
            layer.k, layer.v = layer.k.bfloat16(), layer.v.bfloat16()
        return play(m, prompts, schedule, cache)

    want = run(model, [lens])
    for schedule in ([lens], in_chunks(lens, 11), in_chunks(lens, 1)):
        # A rounding of the arithmetic may tip a key to the next bf16 number in the second layer.
        assert distance(run(other, schedule), want) < 1e-3
    assert distance(play(model, prompts, [lens], None), want) > 1e-3


@KINDS
def test_gradients_without_a_cache(kind):
    model, other, _ = pairs(kind, 5)
    ids = torch.cat(ragged([3, 1, 17], model.args.vocab_size))
    with torch.enable_grad():
        for m in (model, other):
            m.forward(ids, [3, 1, 17]).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_cache_takes_no_gradient():
    """With gradients on, a step through the cache gives the same numbers, and the storage stays plain numbers."""
    model, other, _ = pairs(Varlen, 5)
    prompts = ragged([30], 61)
    want = play(model, prompts, in_chunks([30], 11), make_cache(model, 1))
    with torch.enable_grad():
        cache = make_cache(other, 1)
        got = play(other, prompts, in_chunks([30], 11), cache)
    assert not cache.layers[0].k.requires_grad
    assert distance(got, want) < TOLERANCE


def test_a_step_without_tokens():
    _, other, _ = pairs(Varlen, 5)
    assert other.forward(torch.empty(0, dtype=torch.int64), [0, 0], make_cache(other, 2)).shape == (0, 61)


def test_description_is_made_once_a_step_and_window():
    made = []

    def describe(*args):
        made.append(args[2])
        return flash.bounds(*args)

    attend = varlen.VarlenAttention(describe, flash.backend(Varlen()).kernel)
    model = tiny_model(tiny_args(n_layers=4, sliding_window=(3, None)), attend=attend)
    model.forward(ragged([9], 61)[0], [9], make_cache(model, 1))
    assert sorted(made, key=str) == [3, None]


# The stores' side of it.


@pytest.mark.parametrize("window", [1, 4, None])
def test_exchange_reads_before_it_writes_and_keeps_the_last(window):
    buffer = RollingBuffer(window, 2, 1, 2, "cpu", torch.float32)
    C = 7 if window else 32
    buffer.grow(C, [0, 0], [0, 0])
    buffer.k += POISON
    done = [0, 0]
    for step in ([5, 0], [3, 11], [1, 2], [9, 9]):
        plan = make_plan(step, done, [0, 0], "cpu")
        rows = [row for row in (0, 1) if step[row]]
        k = (plan.positions.float() + 1)[:, None, None].expand(-1, 1, 2)
        pack = varlen.varlen_keys(buffer, plan, rows)
        keys, values = varlen.exchange(buffer, pack, k, -k)
        behind = [done[row] if window is None else min(done[row], window - 1) for row in rows]
        want = [torch.arange(done[r] - m, done[r] + step[r]) + 1.0 for r, m in zip(rows, behind, strict=True)]
        assert pack.q_lens == tuple(step[row] for row in rows)
        assert pack.k_lens == tuple(map(len, want))
        assert keys[:, 0, 0].tolist() == torch.cat(want).tolist()
        assert values.tolist() == (-keys).tolist()
        done = [d + n for d, n in zip(done, step, strict=True)]
        for row, length in enumerate(done):
            for position in range(max(0, length - C), length):
                assert buffer.k[row, position % C].tolist() == [[position + 1.0] * 2]


def test_step_keys_pass_through():
    store, plan = StepKeys(3), make_plan([2, 0, 1], [0, 0, 0], [0, 0, 0], "cpu")
    pack = varlen.varlen_keys(store, plan, [0, 2])
    assert pack.q_lens == pack.k_lens == (2, 1)
    k, v = torch.zeros(3, 1, 2), torch.ones(3, 1, 2)
    assert all(a is b for a, b in zip(varlen.exchange(store, pack, k, v), (k, v), strict=True))


# The choice by name.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["flash", "xformers"])
def test_a_backend_that_does_not_run_here_warns_in_one_line(name, dtype, caplog, capsys):
    with caplog.at_level(logging.INFO, logger="mistral"):
        used, attend = backends.resolve(name, CPU, dtype)
    assert used == "sdpa"
    lines = [r for r in caplog.records if r.name == "mistral"]
    assert [r.levelname for r in lines] == ["WARNING"]
    message = lines[0].getMessage()
    assert message.startswith("note: ")
    assert "\n" not in message
    assert len(message) < 300
    assert all(word in message for word in (name, "cpu", str(dtype)[6:], "using 'sdpa'"))
    assert capsys.readouterr().out == ""
    plan = make_plan([3], [0], [0], "cpu")
    q, k = torch.rand(3, 4, 8), torch.rand(3, 2, 8)
    torch.testing.assert_close(attend(q, k, k, StepKeys(2), plan), tiled(eager)(q, k, k, StepKeys(2), plan))


def test_a_replaced_backend_in_float64_is_replaced_by_plain(caplog):
    with caplog.at_level(logging.WARNING, logger="mistral"):
        assert backends.resolve("flash", CPU, torch.float64)[0] == "eager"
    assert len([r for r in caplog.records if r.name == "mistral"]) == 1


@pytest.mark.parametrize(
    ("name", "dtype", "want"),
    [
        ("auto", torch.float64, "eager"),
        (None, torch.float64, "eager"),
        ("auto", torch.float32, "sdpa"),
        (None, torch.bfloat16, "sdpa"),
        ("eager", torch.float32, "eager"),
        ("sdpa", torch.float64, "sdpa"),
    ],
)
def test_names_that_run_say_nothing(name, dtype, want, caplog):
    with caplog.at_level(logging.DEBUG, logger="mistral"):
        assert backends.resolve(name, CPU, dtype)[0] == want
    assert caplog.records == []


def test_auto_tries_flash_on_cuda_only_in_half_precision(monkeypatch, caplog):
    """Without a GPU: the table is asked, and a backend that fails is passed over without a warning."""
    asked = []

    def absent():
        asked.append("flash")
        raise RuntimeError("no kernel\nfor this machine")

    monkeypatch.setitem(backends.BACKENDS, "flash", absent)
    cuda = torch.device("cuda")
    with caplog.at_level(logging.INFO, logger="mistral"):
        assert [backends.resolve("auto", cuda, d)[0] for d in (torch.float32, torch.float64)] == ["sdpa", "eager"]
        assert asked == []
        assert [backends.resolve("auto", cuda, d)[0] for d in (torch.float16, torch.bfloat16)] == ["sdpa", "sdpa"]
    assert asked == ["flash"] * 2
    assert [r.levelname for r in caplog.records] == ["INFO", "INFO"]
    assert backends.resolve("flash", cuda, torch.float16)[0] == "sdpa"
    assert "no kernel for this machine" in caplog.records[-1].getMessage()


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'flsh'.*auto, sdpa, eager, flash, xformers"):
        backends.resolve("flsh", CPU, torch.float32)


@KINDS
def test_proof_passes_a_right_kernel(kind):
    _, other, _ = pairs(kind, 5)
    other.layers[0].attention.attend.prove(CPU, torch.float32, 8)


@pytest.mark.parametrize("shift", [-1, 1])
def test_proof_finds_a_window_that_is_off_by_one(shift):
    def varlen(*args, window_size, **_):
        return Varlen()(*args, window_size=(window_size[0] + shift, 0), enable_gqa=True)

    with pytest.raises(ArithmeticError, match="off by"):
        flash.backend(varlen).prove(CPU, torch.float32, 8)


def test_proof_finds_a_mask_anchored_at_the_first_key():
    """Flash attention before 2.1 aligned the first query with the first key."""

    def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
        first = (len(query), key[: len(query)], value[: len(query)])
        return VarlenWithoutFlag()(query, *first[1:], cu_seq_q, cu_seq_q, max_q, max_q, window_size=window_size)

    with pytest.raises(ArithmeticError):
        flash.backend(varlen).prove(CPU, torch.float32, 8)


def test_proof_finds_nan():
    with pytest.raises(ArithmeticError):
        flash.backend(lambda q, *_, **__: q * float("nan")).prove(CPU, torch.float32, 8)


def test_a_torch_without_the_window_is_no_backend(monkeypatch, caplog):
    """torch 2.10: varlen_attn has is_causal and no window_size."""

    def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        raise AssertionError("must not be reached")

    monkeypatch.setitem(backends.BACKENDS, "flash", lambda: flash.backend(varlen))
    assert backends.resolve("flash", CPU, torch.float16)[0] == "sdpa"
    assert "window_size" in caplog.records[-1].getMessage()


def test_sdpa_is_the_fallback_of_short_runs():
    """Two tokens on three held keys: the tiles' answer, bit for bit."""
    attend, reference = flash.backend(Varlen()), tiled(sdpa)
    answers = []
    for function in (attend, reference):
        store = RollingBuffer(4, 1, 1, 8, "cpu", torch.float32)
        store.grow(7, [0], [0])
        generator = torch.Generator().manual_seed(0)
        for start, n in ((0, 3), (3, 2)):
            q, k, v = (torch.rand(n, 1, 8, generator=generator) for _ in range(3))
            out = (reference if start == 0 else function)(q, k, v, store, make_plan([n], [start], [0], "cpu"))
        answers.append(out)
    assert torch.equal(*answers)
