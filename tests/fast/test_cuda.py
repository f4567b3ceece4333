"""The real attention kernels against the plain one, on a GPU: the stand-ins of test_backends.py prove nothing there."""

from __future__ import annotations

import logging

import pytest
import torch

from mistral import backends, quant
from mistral.attention import eager, tiled
from mistral.cache import RollingBuffer, RollingBufferCache, StepKeys
from mistral.fast.cuda_graph import CudaGraphTransformer
from mistral.model import Transformer
from mistral.parameters import parameters
from mistral.plan import make_plan
from tests.support.tiny import at_random, in_chunks, play, prefill_then_decode, ragged, tiny_args, tiny_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# Largest error of attention's output for values of scale 1 (largest about 4): one rounding of the result
# is 2^-9 of it in bf16 and 2^-12 in fp16, and kernels round the softmax weights in between as well.
BUDGETS = {torch.bfloat16: 2.5e-2, torch.float16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", list(BUDGETS), ids=str)
WINDOWS = [1, 7, 128, 150, 1000, None]
LENS = [700, 1, 333, 333, 40, 150]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def real(name, dtype, head_dim=128):
    used, attend = backends.resolve(name, torch.device("cuda"), dtype, head_dim)
    if used != name:
        pytest.skip(f"{name} has no kernel here")
    return attend


def steps(attend, lens, schedule, window, dtype, H=8, K=2, D=128, origin=0, seed=0):
    """Attention outputs of a schedule on a rolling buffer, one [T, H, D] a step; inputs rounded to fp16 or bf16.

    The reference (dtype None) computes in fp32 on the same rounded inputs.
    """
    rounding, compute = dtype
    generator = torch.Generator("cpu").manual_seed(seed)
    store = RollingBuffer(window, len(lens), K, D, "cuda", compute)
    store.grow(store.capacity_for(max(lens)), [0] * len(lens), [0] * len(lens))
    store.k.fill_(1e4)
    store.v.fill_(1e4)
    origins = [origin] * len(lens)
    starts, out = list(origins), []
    for step in schedule:
        q, k, v = (
            torch.randn(sum(step), heads, D, generator=generator).to("cuda", rounding).to(compute)
            for heads in (H, K, K)
        )
        out.append(attend(q, k, v, store, make_plan(step, starts, origins, "cuda")))
        starts = [start + n for start, n in zip(starts, step, strict=True)]
    return out


def error(got, want):
    assert [x.shape for x in got] == [x.shape for x in want]
    return max((g.float() - w).abs().max().item() if g.numel() else 0.0 for g, w in zip(got, want, strict=True))


@DTYPES
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("name", ["flash", "xformers", "sdpa"])
def test_rolling_buffer(name, window, dtype):
    attend = real(name, dtype)
    for i, schedule in enumerate(([LENS], in_chunks(LENS, 200), at_random(LENS, 0), at_random(LENS, 1))):
        origin = 5000 * (i % 2)
        got = steps(attend, LENS, schedule, window, (dtype, dtype), origin=origin, seed=i)
        want = steps(tiled(eager), LENS, schedule, window, (dtype, torch.float32), origin=origin, seed=i)
        assert all(x.isfinite().all() for x in got)
        assert error(got, want) < BUDGETS[dtype]


@DTYPES
@pytest.mark.parametrize("shape", [(4, 4, 64), (32, 8, 128), (6, 1, 96), (4, 2, 256)], ids=str)
@pytest.mark.parametrize("name", ["flash", "xformers", "sdpa"])
def test_head_counts_and_sizes(name, shape, dtype):
    H, K, D = shape
    attend = real(name, dtype, D)
    for window in (60, None):
        schedule = in_chunks(LENS, 250)
        got = steps(attend, LENS, schedule, window, (dtype, dtype), H, K, D)
        want = steps(tiled(eager), LENS, schedule, window, (dtype, torch.float32), H, K, D)
        assert error(got, want) < BUDGETS[dtype]


@DTYPES
@pytest.mark.parametrize("name", ["flash", "xformers", "sdpa"])
def test_without_a_cache(name, dtype):
    attend = real(name, dtype)
    generator = torch.Generator("cpu").manual_seed(0)
    plan = make_plan(LENS, [0] * len(LENS), [0] * len(LENS), "cuda")
    q, k, v = (torch.randn(sum(LENS), h, 128, generator=generator).to("cuda", dtype) for h in (8, 2, 2))
    for window in WINDOWS:
        want = tiled(eager)(q.float(), k.float(), v.float(), StepKeys(window), plan)
        # The plan's memo belongs to one backend and dtype in use; a fresh plan asks no favours of it.
        fresh = make_plan(LENS, [0] * len(LENS), [0] * len(LENS), "cuda")
        assert error([attend(q, k, v, StepKeys(window), fresh)], [want]) < BUDGETS[dtype]


@pytest.mark.parametrize("name", ["flash", "xformers", "sdpa"])
def test_gradients(name):
    """Training goes through cache=None; grouped heads and windows have their own backward kernels."""
    attend = real(name, torch.bfloat16)
    lens = [300, 1, 77]
    generator = torch.Generator("cpu").manual_seed(0)
    inputs = [torch.randn(sum(lens), h, 128, generator=generator).to("cuda", torch.bfloat16) for h in (8, 2, 2)]
    toward = torch.randn(sum(lens), 8, 128, generator=generator).to("cuda")
    for window in (50, None):
        grads = []
        for function, dtype in ((attend, torch.bfloat16), (tiled(eager), torch.float32)):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
            plan = make_plan(lens, [0] * 3, [0] * 3, "cuda")
            with torch.enable_grad():
                (function(*leaves, StepKeys(window), plan).float() * toward).sum().backward()
            grads.append([x.grad.float() for x in leaves])
        for got, want in zip(*grads, strict=True):
            assert (got - want).norm() < 0.02 * want.norm()


def test_auto_takes_flash_in_half_precision(caplog):
    """On a GPU of compute capability 8 with a torch whose varlen_attn has a window, nothing else should be taken."""
    if torch.cuda.get_device_capability() < (8, 0) or torch.__version__.startswith("2.10"):
        pytest.skip("flash needs compute capability 8.0 and torch 2.11")
    with caplog.at_level(logging.INFO, logger="mistral"):
        assert backends.resolve("auto", torch.device("cuda"), torch.bfloat16)[0] == "flash"
    assert caplog.records == []


def test_a_head_size_that_flash_refuses_falls_back(caplog):
    attend = backends.resolve("auto", torch.device("cuda"), torch.bfloat16, head_dim=4)[1]
    plan = make_plan([9], [0], [0], "cuda")
    q, k = torch.rand(9, 4, 4, device="cuda").bfloat16(), torch.rand(9, 2, 4, device="cuda").bfloat16()
    want = tiled(eager)(q.float(), k.float(), k.float(), StepKeys(3), plan)
    assert error([attend(q, k, k, StepKeys(3), make_plan([9], [0], [0], "cuda"))], [want]) < 2.5e-2


@pytest.mark.parametrize("name", ["flash", "xformers", "sdpa"])
def test_a_whole_model_in_bf16(name):
    """Log-probs stay as near to fp32's as the plain kernel's in bf16 do, within a factor of 2."""
    attend = real(name, torch.bfloat16, head_dim=64)
    args = tiny_args(dim=256, head_dim=64, hidden_dim=512, n_heads=8, n_kv_heads=2, n_layers=3, sliding_window=140)
    lens = [500, 3, 260]
    ids = torch.cat(ragged(lens, args.vocab_size)).cuda()

    def logprobs(function, dtype):
        model = tiny_model(args, attend=function).to("cuda", dtype)
        return model.forward(ids, lens).log_softmax(-1)

    truth = logprobs(tiled(eager), torch.float32)
    budget = 2 * (logprobs(tiled(eager), torch.bfloat16) - truth).abs().max()
    assert (logprobs(attend, torch.bfloat16) - truth).abs().max() < budget


@pytest.mark.parametrize("window", [7, 300, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured_steps_are_the_plain_ones(dtype, window):
    """Graphs of real CUDA against the plain steps, over buckets that grow and rows that bring nothing."""
    args = tiny_args(n_layers=3, sliding_window=window)
    state = {name: w.to("cuda", dtype) for name, w in tiny_model(args, seed=1).state_dict().items()}
    lens = [300, 20, 1, 77]
    prompts = [p.cuda() for p in ragged(lens, args.vocab_size, seed=1)]
    found = []
    for kind in (Transformer, CudaGraphTransformer):
        with torch.device("meta"):
            model = kind(args, tiled(eager) if kind is Transformer else None)
        model.load_state_dict(state, assign=True)
        cache = RollingBufferCache(args, len(lens), device="cuda", dtype=dtype)
        with torch.inference_mode():
            found.append(torch.cat(play(model, prompts, prefill_then_decode(lens, 60), cache)))
    apart = (found[0] - found[1]).abs().max()
    assert apart < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("captured", [False, True])
def test_weights_in_few_bits(bits, captured):
    """Compiled products, alone and in captured steps, against the plain model of the weights that are meant."""
    args = tiny_args(n_layers=3, sliding_window=60)
    plain = tiny_model(args, seed=1)
    state, expected = plain.state_dict(), parameters(args)
    there = {n: quant.quantize(p, state[n], bits, torch.device("cuda")) for n, p in expected.items() if p.quantized}
    dequantize = {n: module.rows(0, module.out_features).cpu() for n, module in there.items()}
    plain.load_state_dict(plain.state_dict() | dequantize)
    model = (CudaGraphTransformer if captured else Transformer)(args)
    model.load_state_dict(plain.state_dict())
    model = model.to("cuda")
    quant.put_quantized(model, there)
    lens = [100, 20, 3]
    prompts = ragged(lens, args.vocab_size, seed=1)
    found = []
    with torch.inference_mode():
        for m, device in ((plain, "cpu"), (model, "cuda")):
            cache = RollingBufferCache(args, len(lens), device=device)
            ids = [p.to(device) for p in prompts]
            found.append(torch.cat(play(m, ids, prefill_then_decode(lens, 20), cache)).cpu())
    assert (found[0] - found[1]).abs().max() < 1e-3
