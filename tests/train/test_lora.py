"""Adapters that are trained: beside weights of every kind, against the gradient through merged weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mistral.linear import Linear
from mistral.model import Transformer
from mistral.parameters import parameters
from mistral.quant import put_quantized, quantize
from mistral.quant.linear import QuantizedLinear
from mistral.train.attention import shared_masks
from mistral.train.lora import FrozenLinear, LoraLinear, _Product, freeze, fresh, put_lora
from mistral.train.recompute import recompute
from mistral.train.step import Batch, add_gradients
from tests.support.tiny import ragged, tiny_args, tiny_model

ARGS = tiny_args()
NAMES = [name for name, p in parameters(ARGS).items() if p.role == "matrix"]
SHAPES = {name: parameters(ARGS)[name].shape for name in NAMES}
RANK, SCALE = 3, 1.5


def a_batch() -> Batch:
    lens = (11, 3, 8)
    ids, targets = (torch.cat(ragged(lens, 61, i)) for i in range(2))
    return Batch(ids, lens, targets, torch.ones(len(ids)))


def start(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B that are both not zero."""
    generator = torch.Generator().manual_seed(seed)
    return {n: (a, torch.rand(b.shape, generator=generator) - 0.5) for n, (a, b) in fresh(SHAPES, RANK, seed).items()}


def adapted(model: Transformer, what: str = "none") -> dict[str, nn.Parameter]:
    freeze(model)
    for layer in model.layers:
        layer.attention.attend = shared_masks
    trained = put_lora(model, start(), SCALE)
    recompute(model, what, False)
    return trained


def through_merged(model: Transformer, batch: Batch) -> dict[str, Tensor]:
    """Gradients of A and B, by the chain rule from that of W + scale * B @ A."""
    pairs = start()
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            model.get_parameter(name).add_(SCALE * b @ a)
    add_gradients(model, batch, batch.total)
    found = {}
    for name, (a, b) in pairs.items():
        grad = model.get_parameter(name).grad
        path = name.removesuffix(".weight")
        found |= {f"{path}.lora_A.weight": SCALE * b.T @ grad, f"{path}.lora_B.weight": SCALE * grad @ a.T}
    return found


def differences(trained: dict[str, nn.Parameter], want: dict[str, Tensor]) -> float:
    """The largest difference, beside the largest gradient of its tensor."""
    assert trained.keys() == want.keys()
    return max(float((p.grad - want[n]).abs().max() / want[n].abs().max()) for n, p in trained.items())


@pytest.mark.parametrize("what", ["none", "cheap", "layers"])
def test_gradients_are_those_through_merged_weights(what: str) -> None:
    model, batch = tiny_model(ARGS), a_batch()
    trained = adapted(model, what)
    add_gradients(model, batch, batch.total)
    assert differences(trained, through_merged(tiny_model(ARGS), batch)) < 1e-4


def test_one_product_has_the_gradients_of_its_parts() -> None:
    """The product with an adapter in it, against numerical gradients."""
    generator = torch.Generator().manual_seed(0)
    x, w, a, b = (
        torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5 for shape in ((6, 5), (4, 5), (2, 5), (4, 2))
    )
    assert torch.autograd.gradcheck(
        lambda x, a, b: _Product.apply(x, w, a, b, 1.5), [t.requires_grad_() for t in (x, a, b)]
    )
    with torch.no_grad():
        assert torch.allclose(_Product.apply(x, w, a, b, 1.5), x @ (w + 1.5 * b @ a).T)


def test_it_starts_as_the_model_that_it_is_beside() -> None:
    model, batch = tiny_model(ARGS), a_batch()
    before = model.forward(batch.ids, batch.seqlens)
    freeze(model)
    put_lora(model, fresh(SHAPES, RANK, 0), SCALE)
    assert torch.equal(model.forward(batch.ids, batch.seqlens), before)


def test_nothing_but_the_adapter_gets_a_gradient() -> None:
    model, batch = tiny_model(ARGS), a_batch()
    trained = adapted(model)
    add_gradients(model, batch, batch.total)
    with_grad = {id(p) for p in model.parameters() if p.grad is not None}
    assert with_grad == {id(p) for p in trained.values()}


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_beside_quantized_weights(quant: str) -> None:
    """Gradients are those beside dense weights of the same values, but for inputs that products round."""
    dense, model, batch = tiny_model(ARGS), tiny_model(ARGS), a_batch()
    quantized: dict[str, QuantizedLinear] = {}
    for name, parameter in parameters(ARGS).items():
        if parameter.quantized:
            quantized[name] = quantize(parameter, model.get_parameter(name).detach(), quant)
            quantized[name].by_kernels = False
            with torch.no_grad():
                dense.get_parameter(name).copy_(quantized[name].rows(0, parameter.shape[0]))
    put_quantized(model, quantized)
    found = []
    for one in (model, dense):
        trained = adapted(one, "cheap")
        add_gradients(one, batch, batch.total)
        found.append(trained)
    assert isinstance(model.output, FrozenLinear)
    assert differences(found[0], {name: p.grad for name, p in found[1].items()}) < 2e-3


def test_weights_narrower_than_the_arithmetic_are_not_kept_widened() -> None:
    dense, model, batch = tiny_model(ARGS).bfloat16().float(), tiny_model(ARGS).bfloat16(), a_batch()
    model.compute_dtype = torch.float32
    trained, wide = adapted(model), adapted(dense)
    for one in (model, dense):
        add_gradients(one, batch, batch.total)
    assert differences(trained, {name: p.grad for name, p in wide.items()}) < 1e-5
    assert isinstance(model.layers[0].attention.wq.of, FrozenLinear)


def test_a_product_in_pieces_has_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral.train.lora.WIDEN", 1)
    weight, x = torch.rand(150, 24), torch.rand(5, 24, requires_grad=True)
    linear = Linear(24, 150)
    linear.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
    cotangent = torch.rand(5, 150)
    (got,) = torch.autograd.grad((FrozenLinear(linear)(x) * cotangent).sum(), x)
    assert torch.allclose(got, cotangent @ weight.bfloat16().float(), rtol=1e-5)


def test_dropout_only_while_training() -> None:
    a, b = torch.rand(RANK, 24), torch.rand(16, RANK)
    linear = Linear(24, 16)
    layer, x = LoraLinear(linear, a, b, SCALE, 0.5), torch.rand(4, 24)
    layer.eval()
    assert torch.allclose(layer(x), x @ (linear.weight + SCALE * b @ a).T, atol=1e-5)
    layer.train()
    assert not torch.allclose(layer(x), layer.eval()(x), atol=1e-3)


def test_the_start_follows_from_the_seed() -> None:
    one, same, other = (fresh(SHAPES, RANK, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name][0], same[name][0]) for name in NAMES)
    assert not any(torch.equal(one[name][0], other[name][0]) for name in NAMES)
    assert all(not b.any() and 0.1 < a.abs().max() * a.shape[1] ** 0.5 <= 1 for a, b in one.values())
