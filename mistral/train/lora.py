"""Low-rank adapters (LoRA, arXiv 2106.09685) that are trained: A and B beside weights that stay as they are.

The weights may be of any kind that `loader` makes, quantized ones included: a gradient flows through them, and not
into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mistral.linear import ROWS, WIDEN, Linear
from mistral.model import Transformer
from mistral.quant.linear import QuantizedLinear

Rows = Callable[[int, int], Tensor]


class _FrozenProduct(torch.autograd.Function):
    """A product whose weights are read a tile at a time, and again for the gradient: none is kept widened."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, of: nn.Module, rows: Rows) -> Tensor:
        ctx.rows, ctx.out = rows, of.out_features
        y: Tensor = of(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x: Tensor | None = None
        for first, last in _tiles(ctx.out, grad):
            part = grad[..., first:last] @ ctx.rows(first, last).to(grad.dtype)
            x = part if x is None else x.add_(part)
        assert x is not None
        return x, None, None


class _Product(torch.autograd.Function):
    """x W^T + s (x A^T) B^T, of which A and B get gradients: each part is added to the large product in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = F.linear(x, a).mul_(scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return F.linear(x, weight).addmm_(low, b.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, weight, a, b, low = ctx.saved_tensors
        back = (grad @ b).mul_(ctx.scale)
        dx = torch.mm(grad, weight).addmm_(back, a) if ctx.needs_input_grad[0] else None
        return dx, None, back.t() @ x, grad.t() @ low, None


def _tiles(out: int, grad: Tensor) -> Iterator[tuple[int, int]]:
    rows = max(ROWS, WIDEN // max(1, grad.shape[-1]) // ROWS * ROWS)
    for first in range(0, out, rows):
        yield first, min(first + rows, out)


class FrozenLinear(nn.Module):
    """A `Linear` through which gradients flow to its input alone; inputs that it rounds are taken as they were.

    Args:
        of: a `Linear` whose weights are narrower than the arithmetic, or one with quantized weights.
    """

    def __init__(self, of: Linear | QuantizedLinear) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _FrozenProduct.apply(x, self.of, self._rows)
        return y

    def _rows(self, first: int, last: int) -> Tensor:
        if isinstance(self.of, QuantizedLinear):
            return self.of.rows(first, last)
        return self.of.weight[first:last]


class LoraLinear(nn.Module):
    """`of(x) + scale * B(A(x))`: [..., in] to [..., out], in x's dtype.

    Args:
        of: a `Linear` in the dtype of the arithmetic, or a `FrozenLinear`.
        a, b: [rank, in] and [out, rank] fp32, trained.
        scale: what B @ A is multiplied by.
        dropout: share of the inputs of A that are 0 while training.
    """

    def __init__(self, of: nn.Module, a: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.of, self.scale, self.dropout = of, scale, dropout
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        y: Tensor
        if isinstance(self.of, Linear) and not self.dropout:
            y = _Product.apply(x, self.of.weight, a, b, self.scale)
            return y
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        y = self.of(x)
        return y + F.linear(F.linear(dropped, a) * self.scale, b)


def freeze(model: Transformer) -> None:
    """Have no weight of a model trained, and gradients flow through every product.

    Raises:
        UsageError: weights of a kind through which none can.
    """
    model.requires_grad_(False)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name.startswith("tok_embeddings."):  # a table that is tied: no gradient goes on from what is looked up
            continue
        narrow = isinstance(module, Linear) and module.weight.dtype != model.dtype
        if isinstance(module, QuantizedLinear) or narrow:
            model.set_submodule(name, FrozenLinear(module))  # type: ignore[arg-type]


def put_lora(
    model: Transformer, start: dict[str, tuple[Tensor, Tensor]], scale: float, dropout: float = 0.0
) -> dict[str, nn.Parameter]:
    """Put adapters beside frozen weights.

    Args:
        start: A and B of each matrix, fp32, by Mistral's name of its weight.

    Returns:
        What is trained, by name: "layers.0.attention.wq.lora_A.weight", as mistral-finetune calls it.
    """
    trained: dict[str, nn.Parameter] = {}
    for name, (a, b) in start.items():
        path = name.removesuffix(".weight")
        module = LoraLinear(model.get_submodule(path), a.to(model.device), b.to(model.device), scale, dropout)
        model.set_submodule(path, module)
        trained |= {f"{path}.lora_A.weight": module.a, f"{path}.lora_B.weight": module.b}
    return trained


def fresh(shapes: dict[str, tuple[int, ...]], rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B at the start: A uniform as PEFT draws it (Kaiming, a = sqrt 5), B zero, so that nothing is changed yet.

    Args:
        shapes: [out, in] of each matrix, by name.
    """
    generator = torch.Generator().manual_seed(seed)
    start = {}
    for name, (out, inner) in shapes.items():
        a = (torch.rand(rank, inner, generator=generator) * 2 - 1) * inner**-0.5
        start[name] = a, torch.zeros(out, rank)
    return start
