"""Quantized weights as a GPU has them, on a CPU; tests/fast/test_cuda.py compiles them on a real one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mistral import fast, quant
from mistral.fast.layout import bits_of
from mistral.loader import runtime
from mistral.loader.options import LoadOptions, OptionError
from mistral.parameters import parameters
from mistral.quant import cuda
from tests.support.tiny import TOLERANCE, distance, make_cache, play, prefill_then_decode, ragged, tiny_args, tiny_model

KINDS = ["int8", "int4", "int4-symmetric"]
META = torch.device("meta")  # any but the CPU


def twins(kind: str, weight: torch.Tensor) -> tuple[fast.QuantizedLinear, cuda.CudaLinear]:
    """The same quantized weights, as a CPU and as a GPU has them."""
    here = quant.READ[kind].of(weight)
    return here, quant.on_gpu(here, torch.device("cpu"))


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """Compiling is PyTorch's; what is compiled is tried here."""
    monkeypatch.setattr(cuda, "compiled", lambda function: function)


@pytest.mark.parametrize("kind", KINDS)
@given(n=st.integers(1, 70), k=st.integers(1, 200), rows=st.integers(0, 9), seed=st.integers(0, 2**20))
def test_products_of_any_shape(kind, n, k, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    here, there = twins(kind, torch.rand(n, k, generator=generator) * 2 - 1)
    dequantize = here.rows(0, n)
    assert torch.equal(there.rows(0, n), dequantize)
    assert torch.equal(there.rows(n // 2, n), dequantize[n // 2 :])
    x = torch.rand(rows, k, generator=generator) * 2 - 1
    with torch.inference_mode():
        y = there(x)
    assert y.shape == (rows, n)
    size = x.double().abs() @ dequantize.double().abs().T
    assert ((y - x.double() @ dequantize.double().T).abs() <= 2e-6 * size + 1e-30).all()


@pytest.mark.parametrize("rows", [1, cuda.FEW, cuda.FEW + 1])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_activations_and_leading_dimensions(kind, rows):
    here, there = twins(kind, torch.rand(20, 70) - 0.5)
    x = torch.rand(rows, 1, 70).bfloat16()
    with torch.inference_mode():
        y = there(x)
    assert y.dtype == torch.bfloat16
    assert y.shape == (rows, 1, 20)
    torch.testing.assert_close(y.float(), x.float() @ here.rows(0, 20).T, rtol=0.02, atol=0.05)


def test_many_rows_are_multiplied_by_tiles(monkeypatch):
    here, there = twins("int8", torch.rand(50, 40) - 0.5)
    monkeypatch.setattr(cuda, "WIDEN", 40 * 16)
    x = torch.rand(9, 40)
    with torch.inference_mode():
        torch.testing.assert_close(there(x), x @ here.rows(0, 50).T)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model(kind):
    """Placed by name, with the output matrix in eight bits; the same as the model of the weights that are meant."""
    plain = tiny_model(tiny_args(sliding_window=5), seed=3)
    state = plain.state_dict()
    there = {n: twins(bits_of(p, kind), state[n])[1] for n, p in parameters(plain.args).items() if p.quantized}
    assert type(there["output.weight"]) is cuda.CudaInt8Linear
    plain.load_state_dict(state | {n: module.rows(0, module.out_features) for n, module in there.items()})
    model = tiny_model(plain.args, seed=3)
    quant.put_quantized(model, there)
    lens = [9, 20, 1]
    prompts = ragged(lens, plain.args.vocab_size, seed=3)
    found = []
    for m in (plain, model):
        with torch.inference_mode():
            found.append(play(m, prompts, prefill_then_decode(lens, 6), make_cache(m, 3)))
    assert distance(found[1], found[0]) < TOLERANCE


def test_what_is_placed_elsewhere():
    weight, known = torch.rand(20, 40), parameters(tiny_args())
    assert quant.quantize(known["layers.0.attention.wq.weight"], weight, "int4", META).packed.shape == (20, 2, 16)
    assert quant.quantize(known["output.weight"], weight, "int4", META).packed.shape == (20, 40)
    assert quant.quantize(known["output.weight"], weight, "int4").packed.device.type == "cpu"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_where_few_bits_may_be(device, monkeypatch):
    monkeypatch.setattr(runtime, "pick_device", lambda _: torch.device(device))
    monkeypatch.setattr(runtime, "pick_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(runtime.memory, "available", lambda _: None)
    facts = {"stored": torch.bfloat16, "called": "bfloat16", "parameters": 1, "head_dim": 8}
    if device == "cuda":
        assert runtime.resolve(LoadOptions(device=device, attention="sdpa", quant="int8"), **facts).quant == "int8"
        return
    with pytest.raises(OptionError, match="for a CPU in float32, or for CUDA, not for mps in bfloat16"):
        runtime.resolve(LoadOptions(device=device, attention="sdpa", quant="int8"), **facts)
