"""Quantized weights on a GPU: row by row, for products that PyTorch compiles to one launch.

Few rows are multiplied with the bytes as they are read, which is what saves time; many are PyTorch's to multiply, by
weights that are widened. Inputs are not rounded: a GPU waits for memory and not for arithmetic.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mistral.fast.layout import GROUP, SUPER
from mistral.quant import rounding
from mistral.quant.affine import Affine4Linear
from mistral.quant.blocks import unpack_affine4
from mistral.quant.linear import Int4Linear, Int8Linear, QuantizedLinear

FEW = 4  # rows of activations up to which reading the bytes again for each costs less than widening them
WIDEN = 2**26  # numbers widened at once: many, since each tile costs a few launches


def int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [k] times [n, k] int8 weights with [n] scales: [n] in x's dtype, summed up in fp32."""
    return ((x.float() * weight.float()).sum(-1) * scale).to(x.dtype)


def int4_product(x: Tensor, pairs: Tensor, scale: Tensor) -> Tensor:
    """x [groups * 32] times [n, groups, 16] bytes, two weights in each, with [n, groups] scales: likewise."""
    each = x.float().view(-1, GROUP // 2, 2)
    low, high = (pairs & 15).float() - 8, (pairs >> 4).float() - 8
    return (((low * each[..., 0] + high * each[..., 1]).sum(-1) * scale.float()).sum(-1)).to(x.dtype)


def affine4_product(x: Tensor, pairs: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x [groups * 32] times weights of AFFINE4: likewise.

    Args:
        pairs: [n, groups, 16] bytes, two weights in each.
        codes: [n, groups, 2] bytes: those of the scales and of the minima.
        scale: [n, supers, 2] fp16, what they are multiplied by.
    """
    each = x.float().view(-1, GROUP // 2, 2)
    sums = ((pairs & 15).float() * each[..., 0] + (pairs >> 4).float() * each[..., 1]).sum(-1)
    wide = factors(codes, scale)
    return (sums * wide[..., 0] - each.sum((-1, -2)) * wide[..., 1]).sum(-1).to(x.dtype)


def factors(codes: Tensor, scale: Tensor) -> Tensor:
    """The scale and the minimum of every group, [n, groups, 2] fp32."""
    return scale.float().repeat_interleave(SUPER, 1)[:, : codes.shape[1]] * codes.float()


def two_in_a_byte(q: Tensor) -> Tensor:
    """[n, groups * 32] uint8 below 16 to [n, groups, 16] bytes."""
    nibbles = q.view(len(q), -1, GROUP // 2, 2)
    return nibbles[..., 0] | nibbles[..., 1] << 4


def apart(pairs: Tensor) -> Tensor:
    """What `two_in_a_byte` was given."""
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function as one launch, for each shape of its own."""
    return torch.compile(function, dynamic=False)


def launched(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What the function makes of tensors, in one launch; within a layer that is compiled, as a part of that."""
    return (function if torch.compiler.is_compiling() else compiled(function))(*tensors)


class CudaLinear(QuantizedLinear):
    """Quantized weights, row by row. See `QuantizedLinear`."""

    def of_row(self, x: Tensor) -> Tensor:
        """The product with one row of activations, [in_features] to [out_features]."""
        raise NotImplementedError

    def matrix(self) -> None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if 0 < len(flat) <= FEW and not torch.is_grad_enabled():
            return torch.stack([self.of_row(row) for row in flat]).view(*x.shape[:-1], self.out_features)
        rows = max(1, WIDEN // self.in_features)
        starts = range(0, self.out_features, rows)
        tiles = (self.rows(first, min(first + rows, self.out_features)).to(x.dtype) for first in starts)
        return torch.cat([F.linear(x, tile) for tile in tiles], dim=-1)


class CudaInt8Linear(CudaLinear):
    """A byte a weight, [n, k], and a scale a row."""

    packed: Tensor
    scale: Tensor

    def __init__(self, of: Int8Linear, device: torch.device) -> None:
        super().__init__(of.in_features, of.out_features)
        weight = rounding.separate(of.packed, self.out_features, self.in_features).contiguous()
        self.register_buffer("packed", weight.to(device))
        self.register_buffer("scale", of.scale.to(device))

    def of_row(self, x: Tensor) -> Tensor:
        return launched(int8_product, x, self.packed, self.scale)

    def rows(self, first: int, last: int) -> Tensor:
        return self.packed[first:last].float() * self.scale[first:last, None]

    def part(self, first: int, last: int) -> CudaInt8Linear:
        part = copy.copy(self)
        part._buffers = {"packed": self.packed[first:last], "scale": self.scale[first:last]}
        part.out_features = last - first
        return part

    def lookup(self, ids: Tensor) -> Tensor:
        return self.packed[ids].float() * self.scale[ids, None]


class CudaInt4Linear(CudaLinear):
    """Two weights a byte, [n, groups, 16], and [n, groups] scales in bf16."""

    packed: Tensor
    scale: Tensor

    def __init__(self, of: Int4Linear, device: torch.device) -> None:
        super().__init__(of.in_features, of.out_features)
        q, scale = rounding.unpack(of.packed, self.out_features, self.in_features)
        self.register_buffer("packed", two_in_a_byte((q + 8).view(torch.uint8)).to(device))
        self.register_buffer("scale", scale.contiguous().to(device))

    def of_row(self, x: Tensor) -> Tensor:
        return launched(int4_product, F.pad(x, (0, -self.in_features % GROUP)), self.packed, self.scale)

    def rows(self, first: int, last: int) -> Tensor:
        q = apart(self.packed[first:last]).view(torch.int8).sub(8)
        return rounding.dequantize(q, self.scale[first:last], self.in_features)


class CudaAffine4Linear(CudaLinear):
    """Two weights a byte, [n, groups, 16]; codes of scales and minima, [n, groups, 2]; and [n, supers, 2] fp16."""

    packed: Tensor
    codes: Tensor
    scale: Tensor

    def __init__(self, of: Affine4Linear, device: torch.device) -> None:
        super().__init__(of.in_features, of.out_features)
        columns = of.in_features + -of.in_features % GROUP
        assert of.scale is not None
        q, sc, mn, S, M = unpack_affine4(of.packed, of.scale.view(torch.float16), self.out_features, columns)
        self.register_buffer("packed", two_in_a_byte(q).to(device))
        self.register_buffer("codes", torch.stack((sc, mn), dim=-1).to(device))
        self.register_buffer("scale", torch.stack((S, M), dim=-1).to(device))

    def of_row(self, x: Tensor) -> Tensor:
        filled = F.pad(x, (0, -self.in_features % GROUP))
        return launched(affine4_product, filled, self.packed, self.codes, self.scale)

    def rows(self, first: int, last: int) -> Tensor:
        wide = factors(self.codes[first:last], self.scale[first:last])
        q = apart(self.packed[first:last]).float().unflatten(-1, (-1, GROUP))
        return (q * wide[..., :1] - wide[..., 1:]).flatten(1)[:, : self.in_features].contiguous()
