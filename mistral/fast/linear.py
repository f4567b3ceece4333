"""`Linear` for a CPU: products by the kernels; of many rows where they are faster than PyTorch's."""

from __future__ import annotations

import ctypes
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mistral.fast import layout
from mistral.fast.kernels import INT8, KINDS, Matrix, library, pointer
from mistral.fast.tiles import product_many
from mistral.linear import Linear

FEW = 32  # rows of activations up to which the kernels are faster than one large product
MANY = 512  # rows that a product with quantized weights rounds at once
COMPUTE = (torch.float32, torch.bfloat16)  # dtypes of activations that the kernels take; they sum up in fp32


@runtime_checkable
class HasMatrix(Protocol):
    """A kind of `Linear` whose weights the kernels may be able to read."""

    def matrix(self) -> Matrix | None:
        """The weights as the kernels have them; None if they are not for them."""


def few(x: Tensor) -> bool:
    """Whether a product with x is one for the kernels."""
    rows = x.numel() // max(1, x.shape[-1])
    return 0 < rows <= FEW and x.dtype in COMPUTE and x.device.type == "cpu" and not torch.is_grad_enabled()


def many(x: Tensor) -> bool:
    """Whether a product with x, of more rows than few, is one for the kernels where weights are floats."""
    fits = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()
    return fits and x.numel() > FEW * x.shape[-1] and bool(library().takes_many_floats())


def stored(weight: Tensor) -> Matrix | None:
    """Weights as the kernels have them; None if they are not for them."""
    if weight.device.type != "cpu" or weight.dtype not in KINDS or not weight.is_contiguous():
        return None
    return Matrix(weight.data_ptr(), None, KINDS[weight.dtype], *weight.shape)


def room_for_inputs(rows: int, columns: int) -> Tensor:
    """Memory for the rounded inputs of a product with quantized weights."""
    return torch.empty(rows * layout.groups(columns) * library().inputs_bytes(), dtype=torch.uint8)


def product(matrix: Matrix, x: Tensor, threads: int | None = None) -> Tensor:
    """x [..., k] times a matrix [n, k], by the kernels: [..., n] in x's dtype, summed up in fp32.

    Args:
        threads: None takes as many as PyTorch has. No bit depends on it.
    """
    flat = x.reshape(-1, matrix.k)
    width = matrix.k
    rounds = matrix.kind >= INT8
    if rounds and matrix.k % layout.GROUP:
        width = layout.groups(matrix.k) * layout.GROUP
        flat = F.pad(flat, (0, width - matrix.k))
    flat = flat.float().contiguous()
    y = flat.new_empty(len(flat), matrix.n)
    rounded = room_for_inputs(min(len(flat), MANY), matrix.k) if rounds else y
    for first in range(0, len(flat), MANY):
        rows = flat[first : first + MANY]
        library().product(
            ctypes.byref(matrix),
            pointer(rows),
            ctypes.c_int64(width),
            ctypes.c_int64(len(rows)),
            pointer(rounded),
            pointer(y[first:]),
            ctypes.c_int64(threads or torch.get_num_threads()),
        )
    return y.to(x.dtype).view(*x.shape[:-1], matrix.n)


class FastLinear(Linear):
    """`Linear` whose products are the kernels'; the weights are where and what they were."""

    def matrix(self) -> Matrix | None:
        """The weights as the kernels have them; None if they are not for them."""
        return stored(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        are_few = few(x)
        matrix = self.matrix() if are_few or many(x) else None
        if matrix is None:
            return super().forward(x)
        return product(matrix, x) if are_few else product_many(matrix, x)


def use_kernels(model: nn.Module) -> None:
    """Have products made by the kernels; the weights stay what and where they are."""
    linears = [(name, module) for name, module in model.named_modules() if type(module) is Linear]
    for name, module in linears:
        with torch.device("meta"):
            fast = FastLinear(module.in_features, module.out_features)
        fast.weight = module.weight
        model.set_submodule(name, fast)
