"""How quantized weights lie in memory and on disk: names, shapes, bytes. Arithmetic on shapes, without PyTorch.

Rows are interleaved in blocks of 16 and columns filled up to groups of 32, as fast/kernels.c reads them; what the bits
mean is in quant/rounding.py.
"""

from __future__ import annotations

import math

from mistral.parameters import Parameter

GROUP = 32  # columns that share a scale in int4
ROWS = 16  # rows that are interleaved
QUANTS = ("int8", "int4")


def groups(columns: int) -> int:
    """Groups in a row; the last may be filled up with zeros."""
    return -(-columns // GROUP)


def int8_shape(n: int, columns: int) -> tuple[int, int, int]:
    """[n, columns] weights of 8 bits: blocks, groups, bytes."""
    return -(-n // ROWS), groups(columns), GROUP * ROWS


def int4_shape(n: int, columns: int) -> tuple[int, int, int]:
    """[n, columns] weights of 4 bits: blocks, groups, bytes with the bf16 scales."""
    return -(-n // ROWS), groups(columns), GROUP // 2 * ROWS + 2 * ROWS


def bits_of(weight: Parameter, quant: str) -> str:
    """ "int8" or "int4": the output matrix has 8 at least, since it is small and every token's choice hangs on it."""
    return "int8" if weight.role == "output" else quant


def stored_as(weight: Parameter, quant: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and dtypes of the tensors that stand for one weight that is quantized."""
    path, (n, k) = weight.name.removesuffix(".weight"), weight.shape
    if bits_of(weight, quant) == "int8":
        return {f"{path}.packed": (int8_shape(n, k), "int8"), f"{path}.scale": ((n,), "float32")}
    return {f"{path}.packed": (int4_shape(n, k), "uint8")}


def bytes_of(weight: Parameter, quant: str | None, itemsize: int) -> int:
    """Bytes that a weight takes in a quantized model; one that stays as it is takes `itemsize` a number."""
    if quant is None or not weight.quantized:
        return weight.numel * itemsize
    sizes = {"int8": 1, "uint8": 1, "float32": 4}
    return sum(math.prod(s) * sizes[dtype] for s, dtype in stored_as(weight, quant).values())
