"""A kind of `Linear` with an adapter beside it at run time: the weights stay as they are, quantized ones included."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mistral.formats.merge import Update
from mistral.model import Transformer


class AdaptedLinear(nn.Module):
    """`of(x) + B(A(x) * scale)`: [..., in] to [..., out], in x's dtype; the sum is of two products, each rounded.

    Args:
        of: any kind of `Linear`.
        a, b: [rank, in] and [out, rank], in the dtype of activations.
        scale: what B @ A is multiplied by.
    """

    a: Tensor
    b: Tensor

    def __init__(self, of: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.of, self.scale = of, scale
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.of(x)
        return y + F.linear(F.linear(x, self.a) * self.scale, self.b)


def put_adapted(model: Transformer, found: dict[str, Update], device: torch.device, dtype: torch.dtype) -> None:
    """Put an adapter, not one with DoRA, beside the weights of a model that is in memory."""
    for name, update in found.items():
        path = name.removesuffix(".weight")
        a, b = (reader().to(device, dtype, copy=True) for reader in (update.a, update.b))
        model.set_submodule(path, AdaptedLinear(model.get_submodule(path), a, b, update.scale))
