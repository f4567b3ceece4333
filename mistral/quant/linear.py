"""Kinds of `Linear` whose weights have 8 or 4 bits, and an `Embedding` of such a table.

Many rows at once are PyTorch's to multiply, by weights that are widened a tile at a time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mistral.fast import layout, pages
from mistral.fast.kernels import INT4, INT8, KernelsUnavailable, Matrix, library, pointer
from mistral.fast.linear import FEW, few, product, stored
from mistral.linear import ROWS, WIDEN
from mistral.model import outside_vocabulary
from mistral.quant import rounding


def blocks(first: int, last: int) -> slice:
    """The blocks that interleaved rows first .. last are in."""
    return slice(first // layout.ROWS, -(-last // layout.ROWS))


def source(weight: Tensor) -> Matrix | None:
    """Weights as the kernels round them; None if there are no kernels, or none for these."""
    try:
        library()
    except KernelsUnavailable:
        return None
    return stored(weight)


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`rounding.int8`, interleaved, by the kernels where they can: it takes a tenth of the time."""
    matrix = source(weight)
    if matrix is None:
        q, scale = rounding.int8(weight)
        return rounding.interleave(q), scale
    packed = pages.empty(layout.int8_shape(*weight.shape), torch.int8)
    scale = torch.empty(len(weight))
    library().to_int8(ctypes.byref(matrix), pointer(packed), pointer(scale), ctypes.c_int64(torch.get_num_threads()))
    return packed, scale


class QuantizedLinear(nn.Module):
    """Quantized weights, and products with them: [..., in_features] to [..., out_features], in x's dtype.

    Inference only: nothing flows back into the weights.
    """

    kind: int
    span = layout.GROUP  # columns whose inputs share a scale
    by_kernels = True  # False: by the plain path alone

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def of(cls, weight: Tensor) -> QuantizedLinear:
        """Weights [out_features, in_features], rounded."""
        raise NotImplementedError

    def matrix(self) -> Matrix | None:
        """The weights as the kernels have them; None if they are not for them."""
        raise NotImplementedError

    def rows(self, first: int, last: int) -> Tensor:
        """Rows first .. last of the weights that are meant, [last - first, in_features] fp32: the plain path.

        first is a multiple of `layout.ROWS`.
        """
        raise NotImplementedError

    def lookup(self, ids: Tensor) -> Tensor:
        """The rows that ids [T] name, [T, in_features] fp32: the plain path."""
        found = [torch.empty(0, self.in_features)]
        for i in ids.tolist():
            first = i // layout.ROWS * layout.ROWS
            found.append(self.rows(first, min(first + layout.ROWS, self.out_features))[i - first : i - first + 1])
        return torch.cat(found)

    def part(self, first: int, last: int) -> QuantizedLinear:
        """Rows first .. last as a product of its own, in the memory where they are; both as in `rows`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrix()
        if matrix is not None and few(x):
            return product(matrix, x)
        if matrix is not None and x.dtype == torch.float32:
            return product(matrix, x.detach()) if library().takes_many() else self._many(matrix, x)
        x = rounding.rounded(x, self.span)
        return torch.cat([F.linear(x, self.rows(*tile).to(x.dtype)) for tile in self._tiles()], dim=-1)

    def _tiles(self) -> Iterator[tuple[int, int]]:
        """The first row of each tile of the weights, and the one after its last."""
        rows = max(ROWS, WIDEN // self.in_features // ROWS * ROWS)
        for first in range(0, self.out_features, rows):
            yield first, min(first + rows, self.out_features)

    def _many(self, matrix: Matrix, x: Tensor) -> Tensor:
        """`forward` for many rows of fp32, rounded and widened by the kernels."""
        flat = x.detach().reshape(-1, self.in_features).contiguous()
        threads = ctypes.c_int64(torch.get_num_threads())
        inputs, y = torch.empty_like(flat), flat.new_empty(len(flat), self.out_features)
        size = (ctypes.c_int64(n) for n in (self.in_features, len(flat), self.span))
        library().through_16_bits(pointer(flat), *size, pointer(inputs), threads)
        wide = None
        for first, last in self._tiles():
            if wide is None:
                wide = x.new_empty((last - first) * self.in_features)  # one place for all, as in `widened_product`
            tile = wide[: self.in_features * (last - first)].view(self.in_features, last - first)
            count = ctypes.c_int64(last - first)
            library().widen(ctypes.byref(matrix), ctypes.c_int64(first), count, pointer(tile), threads)
            torch.mm(inputs, tile, out=y[:, first:last])
        return y.view(*x.shape[:-1], self.out_features)


class Int8Linear(QuantizedLinear):
    """A byte a weight, interleaved as the kernels read them, and a scale a row; inputs in 16 bits."""

    kind = INT8
    span = rounding.SPAN
    packed: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, packed: Tensor, scale: Tensor) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, weight: Tensor) -> Int8Linear:
        return cls(weight.shape[1], weight.shape[0], *int8(weight))

    def matrix(self) -> Matrix | None:
        if not self.by_kernels or self.packed.device.type != "cpu" or self.scale.dtype != torch.float32:
            return None
        return Matrix(self.packed.data_ptr(), self.scale.data_ptr(), INT8, self.out_features, self.in_features)

    def part(self, first: int, last: int) -> Int8Linear:
        part = Int8Linear(self.in_features, last - first, self.packed[blocks(first, last)], self.scale[first:last])
        part.by_kernels = self.by_kernels
        return part

    def rows(self, first: int, last: int) -> Tensor:
        packed = self.packed[blocks(first, last)]
        return rounding.separate(packed, last - first, self.in_features).float() * self.scale[first:last, None]


class Int4Linear(QuantizedLinear):
    """int4 as it was at first: four bits a weight and a scale for 32 of a row, interleaved as the kernels read them."""

    kind = INT4
    packed: Tensor

    def __init__(self, in_features: int, out_features: int, packed: Tensor) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("packed", packed)

    @classmethod
    def of(cls, weight: Tensor) -> Int4Linear:
        return cls(weight.shape[1], weight.shape[0], rounding.pack(*rounding.int4(weight)))

    def matrix(self) -> Matrix | None:
        if not self.by_kernels or self.packed.device.type != "cpu":
            return None
        return Matrix(self.packed.data_ptr(), None, INT4, self.out_features, self.in_features)

    def rows(self, first: int, last: int) -> Tensor:
        q, scale = rounding.unpack(self.packed[blocks(first, last)], last - first, self.in_features)
        return rounding.dequantize(q, scale, self.in_features)


class QuantizedEmbedding(nn.Module):
    """`Embedding` whose rows are widened as they are looked up: [T] int64 ids to [T, dim] fp32.

    Args:
        weight: the table, a row a token; a tied output is this same module.
    """

    def __init__(self, weight: QuantizedLinear) -> None:
        super().__init__()
        self.num_embeddings = weight.out_features
        self.table = weight

    def forward(self, ids: Tensor) -> Tensor:
        if ids.device.type != "cpu":  # asking about the ids would wait for it
            return self.table.lookup(ids)
        given = ids.tolist() if len(ids) <= FEW else [*map(int, ids.aminmax())]  # a list costs less than two launches
        if given and not 0 <= min(given) <= max(given) < self.num_embeddings:
            raise outside_vocabulary(ids, self.num_embeddings)
        table = self.table.matrix()
        if table is None:
            return self.table.lookup(ids)
        ids = ids.contiguous()
        out = torch.empty(len(ids), self.table.in_features)
        count, threads = ctypes.c_int64(len(ids)), ctypes.c_int64(torch.get_num_threads() if len(ids) > FEW else 1)
        library().rows_of(ctypes.byref(table), pointer(ids), count, pointer(out), threads)
        return out
