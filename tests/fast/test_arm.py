"""The kernels built for Arm by a cross compiler, and for plainer x86-64, compute what they compute here.

Whole numbers, and what is summed column by column, have the same bits. Sums of floats in LANES parts need not have
them: their difference is bounded by the roundings of both.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mistral.cache import RollingBufferCache
from mistral.fast.kernels import KernelsUnavailable, library, pointer
from mistral.fast.layout import BLOCKS
from mistral.model import Transformer
from mistral.quant import blocks, rounding
from mistral.quant.affine import affine4
from mistral.quant.linear import QuantizedEmbedding, QuantizedLinear, int8
from tests.fast.test_kernels import DTYPES, ROUNDED_TOLERANCE, fast_twin, make_linear
from tests.quant.test_blocks import make_linear as make_blocks
from tests.quant.test_blocks import raw_blocks
from tests.support.builds import Build, Call, here, recorded, replay
from tests.support.tiny import TOLERANCE, make_cache, tiny_args, tiny_model

try:
    library()
except KernelsUnavailable as reason:
    pytest.skip(f"no kernels here: {reason}", allow_module_level=True)


def on_arm(march: str, cpu: str) -> Build:
    return Build(march, "aarch64-linux-gnu-gcc", ("qemu-aarch64", "-cpu", cpu))


BUILDS = {  # the first two on processors that have no more than that
    "Arm": on_arm("armv8-a", "cortex-a53"),
    "Arm with dotprod": on_arm("armv8.2-a+dotprod", "cortex-a76"),
    "Arm with i8mm and bf16": on_arm("armv8.6-a+i8mm+bf16", "max"),
    "x86-64-v3": Build("x86-64-v3", "gcc"),
    "x86-64": Build("x86-64", "gcc", fused=False),
}
ROWS = (1, 2, 7)  # of inputs: tiles of so many, or of 4 and 3
N, K = 37, 512
LANES = 4  # the fewest of any build, so the longest sums
INEXACT = ("product", "decode")  # all other functions leave the same bits everywhere

Check = Callable[[Tensor, Tensor, Build], None]


class Recording:
    """Calls of the kernels, and how what they leave is compared: (what, call, tensor, check)."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        self.checks: list[tuple[str, int, Tensor, Check]] = []
        self.generator = torch.Generator().manual_seed(5)

    def random(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) - 0.5

    def add(self, what: str, function: Callable[[], tuple[Tensor, ...]], check: Check) -> None:
        """Call a function that calls the kernels; what it returns is compared after the last of these calls."""
        before = len(self.calls)
        with torch.inference_mode():
            tensors = function()
        assert len(self.calls) > before, f"{what}: the kernels were not called"
        self.checks += [(what, len(self.calls) - 1, tensor, check) for tensor in tensors]

    def exact(self, function: Callable[..., object], *given: object) -> None:
        """Call a function that calls kernels which leave the same bits everywhere."""
        self.add(str(function), lambda: (function(*given), ())[1], within(0))


def within(bound: Tensor | float) -> Check:
    def check(found: Tensor, want: Tensor, build: Build) -> None:
        assert ((found.double() - want.double()).abs() <= bound).all()

    return check


def same_if_fused(bound: Tensor) -> Check:
    """The same bits where products and sums are rounded once; else within a bound."""
    return lambda found, want, build: within(0.0 if build.fused else bound)(found, want, build)


def sum_bound(terms: int, size: Tensor) -> Tensor:
    """How far two sums of so many products may differ; size: the sums of their absolute values.

    Each product and each sum of a part is rounded, by half a unit in the last of 24 bits, and so are the sums of LANES
    parts. All that twice, once for each side.
    """
    return 2 * (2 * terms / LANES + LANES) * 2.0**-24 * size


def record_rounding(record: Recording) -> None:
    weight = record.random(N, 300)
    for dtype in DTYPES.values():
        for function in (int8, affine4):
            record.exact(function, weight.to(dtype))
    for kind in BLOCKS:
        record.exact(blocks.repack, kind, raw_blocks(kind, N, K, record.generator), N, K)


def widen(linear: QuantizedLinear) -> None:
    k = linear.in_features
    x = torch.rand(2, k, generator=torch.Generator().manual_seed(k))
    seen, wide = torch.zeros(2, k), torch.zeros(k, N)
    first, count, two, columns, span = (ctypes.c_int64(n) for n in (0, N, 2, k, linear.span))
    library().widen(ctypes.byref(linear.matrix()), first, count, pointer(wide), two)
    library().through_16_bits(pointer(x), columns, two, span, pointer(seen), two)


def record_products(record: Recording) -> None:
    weight = record.random(N, 300)
    linears = {kind: make_linear(kind, weight) for kind in (*DTYPES, "int8", "int4", "int4-symmetric")}
    linears |= {kind: make_blocks(kind, N, K)[0] for kind in BLOCKS}
    for kind, linear in linears.items():
        quantized = isinstance(linear, QuantizedLinear)
        for rows in ROWS:
            x = record.random(rows, linear.in_features)
            seen = rounding.rounded(x, linear.span) if quantized else x
            if quantized:
                meant = linear.rows(0, N).abs()
                meant = meant + 2 * meant.amax(-1, keepdim=True)  # of weights with a minimum, each of the two parts
            else:
                meant = linear.weight.abs()
            bound = sum_bound(linear.in_features, seen.double().abs() @ meant.double().T)
            check = same_if_fused(bound) if quantized else within(bound)
            record.add(f"{rows} rows times {kind}", lambda f=linear, x=x: (f(x),), check)
        if quantized:
            record.exact(widen, linear)
        if kind in BLOCKS:
            record.exact(QuantizedEmbedding(linear), torch.arange(N).flip(0))


def decode(fast: Transformer, lens: list[int], cache: RollingBufferCache) -> tuple[Tensor, ...]:
    """Hidden states, and what is in the cache then."""
    h = fast.forward_partial(torch.arange(sum(lens)), lens, cache)
    return h, *(x for layer in cache.layers for x in (layer.k, layer.v))


def record_decode(record: Recording) -> None:
    """Steps of one token and of several, in a window and without; two of the sequences are far beyond theirs."""
    args = tiny_args(sliding_window=(None, 9), n_heads=6, n_kv_heads=2, head_dim=18, hidden_dim=50)
    for kind in (*DTYPES, "int8", "int4"):
        fast, _ = fast_twin(tiny_model(args, seed=4), kind)
        cache = make_cache(fast, 3, positions=300)
        for storage in (x for layer in cache.layers for x in layer.storage):  # as if there had been prompts
            storage.copy_(record.random(*storage.shape))
        cache.lengths[:] = cache._reached[:] = [150, 3, 20]
        check = within(TOLERANCE if kind in DTYPES else ROUNDED_TOLERANCE)
        for lens in ([1, 1, 1], [2, 0, 1]):
            record.add(f"decode {lens} with {kind}", functools.partial(decode, fast, lens, cache), check)


@functools.cache
def recording() -> Recording:
    with recorded() as calls:
        record = Recording(calls)
        record_rounding(record)
        record_products(record)
        record_decode(record)
    return record


@pytest.mark.parametrize("name", [pytest.param(b, marks=[] if "Arm" in b else pytest.mark.long) for b in BUILDS])
def test_other_builds_compute_the_same(name: str, tmp_path: Path) -> None:
    build, record = BUILDS[name], recording()
    if (reason := build.missing()) is not None:
        pytest.skip(f"{name}: {reason}")
    found, want = replay(record.calls, build, tmp_path), here(record.calls)
    for i, call in enumerate(record.calls):
        assert call.name in INEXACT or found.blocks(i) == want.blocks(i), f"{call.name}, call {i}"
    for what, call, tensor, check in record.checks:
        print(what)  # pytest shows it where a check fails
        check(found.of(call, tensor), want.of(call, tensor), build)
