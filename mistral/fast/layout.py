"""How quantized weights lie in memory and on disk: names, shapes, bytes. Arithmetic on shapes, without PyTorch.

Rows are interleaved in blocks of 16 and columns filled up to groups of 32, as csrc/kernels.c reads them; what the bits
mean is in quant/rounding.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mistral.fast.ggml_types import IQ4_VALUES
from mistral.parameters import Parameter

GROUP = 32  # columns that share a scale
SUPER = 8  # groups that share the scale of their scales, in GGML's types that end in K
ROWS = 16  # rows that are interleaved
QUANTS = ("int8", "int4")  # what may be asked for
SYMMETRIC = "int4-symmetric"  # what int4 was at first: such folders are read, and no longer written


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
    """ "int8", or `quant`: the output matrix has 8 at least, since it is small and every token's choice hangs on it."""
    return "int8" if weight.role in ("output", "embedding") else quant


def stored_as(weight: Parameter, quant: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and dtypes of the tensors that stand for one weight that is quantized."""
    path, (n, k) = weight.name.removesuffix(".weight"), weight.shape
    match bits_of(weight, quant):
        case "int8":
            return {f"{path}.packed": (int8_shape(n, k), "int8"), f"{path}.scale": ((n,), "float32")}
        case "int4":
            packed, scale = affine4_shapes(n, k)
            return {f"{path}.packed": (packed, "uint8"), f"{path}.scale": (scale, "float16")}
    return {f"{path}.packed": (int4_shape(n, k), "uint8")}


def bytes_of(weight: Parameter, quant: str | None, itemsize: int) -> int:
    """Bytes that a weight takes in a quantized model; one that stays as it is takes `itemsize` a number."""
    if quant is None or not weight.quantized:
        return weight.numel * itemsize
    sizes = {"int8": 1, "uint8": 1, "float16": 2, "float32": 4}
    return sum(math.prod(s) * sizes[dtype] for s, dtype in stored_as(weight, quant).values())


@dataclass(frozen=True)
class Blocks:
    """A way in which blocks of few bits lie in memory: that of one or more types of GGML, exactly.

    For a block of ROWS rows and a group of columns: the numbers q, interleaved; then the scales of the rows.

    Args:
        name: for people.
        number: the kernels' for it.
        bits: of each q.
        offset: what is taken off each q.
        scales: "fp16" d: a weight is d * (q - offset). "fp16 and minimum" d, m: d * q + m. "factors" s, m: bytes; with
            an fp16 S and M for SUPER groups, apart: S * s * q - M * m. "factor": a signed byte; with an fp16 S:
            S * s * (q - offset). "two factors": the same, each for half a group. "two nibbles": a byte for half a
            group, s in its low four bits and m in the others; with S and M as "factors".
        table: what a number of the file stands for is table[q], in the place of q - offset; empty: there is none.
    """

    name: str
    number: int
    bits: int
    offset: int
    scales: Literal["fp16", "fp16 and minimum", "factors", "factor", "two factors", "two nibbles"]
    table: tuple[int, ...] = ()

    @property
    def q_bytes(self) -> int:
        """Bytes of the numbers q of a group."""
        return ROWS * GROUP * self.bits // 8

    @property
    def group_bytes(self) -> int:
        """Bytes of a group, with its scales."""
        return self.q_bytes + {"fp16 and minimum": 4, "factor": 1}.get(self.scales, 2) * ROWS

    @property
    def supers(self) -> int:
        """Numbers for SUPER groups of a row, apart."""
        return {"factors": 2, "two nibbles": 2, "factor": 1, "two factors": 1}.get(self.scales, 0)

    def packed_shape(self, n: int, columns: int) -> tuple[int, int, int]:
        """Of [n, columns] weights: blocks, groups, bytes."""
        return -(-n // ROWS), groups(columns), self.group_bytes

    def scale_shape(self, n: int, columns: int) -> tuple[int, int, int, int]:
        """Of what lies apart, fp16; empty where nothing does."""
        return -(-n // ROWS), -(-groups(columns) // SUPER), self.supers, ROWS

    def nbytes(self, n: int, columns: int) -> int:
        """Bytes of [n, columns] weights."""
        return math.prod(self.packed_shape(n, columns)) + 2 * math.prod(self.scale_shape(n, columns))


AFFINE4 = Blocks("affine4", 10, 4, 0, "factors")
# By the types of GGML whose weights they hold as they are.
BLOCKS = {
    "Q8_0": Blocks("Q8_0", 5, 8, 128, "fp16"),
    "Q4_0": Blocks("Q4_0", 6, 4, 8, "fp16"),
    "Q4_1": Blocks("Q4_1", 7, 4, 0, "fp16 and minimum"),
    "Q5_0": Blocks("Q5_0", 8, 5, 16, "fp16"),
    "Q5_1": Blocks("Q5_1", 9, 5, 0, "fp16 and minimum"),
    "Q4_K": AFFINE4,
    "Q5_K": Blocks("Q5_K", 11, 5, 0, "factors"),
    "Q6_K": Blocks("Q6_K", 12, 6, 32, "two factors"),
    "Q2_K": Blocks("Q2_K", 13, 2, 0, "two nibbles"),
    "Q3_K": Blocks("Q3_K", 14, 3, 4, "two factors"),
    "IQ4_NL": Blocks("IQ4_NL", 15, 4, 0, "fp16", IQ4_VALUES),
    "IQ4_XS": Blocks("IQ4_XS", 16, 4, 0, "factor", IQ4_VALUES),
}


def affine4_shapes(n: int, columns: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """[n, columns] weights of 4 bits with a minimum: the shapes of `packed` (bytes) and `scale` (fp16)."""
    return AFFINE4.packed_shape(n, columns), AFFINE4.scale_shape(n, columns)
