"""Products of many rows with weights in bf16, by the kernels' bf16 arithmetic."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mistral.fast.kernels import KINDS, Matrix, library, pointer

BF16 = KINDS[torch.bfloat16]


def product_bf16(matrix: Matrix, x: Tensor, pieces: int = 1, threads: int | None = None) -> Tensor:
    """x [..., k] fp32 times a matrix [n, k] of bf16: [..., n] fp32. Inputs are rounded; sums are fp32.

    Args:
        pieces: 1 rounds inputs to bf16 (relative error 2 ** -8 at most); 2 makes each the sum of two numbers in bf16 (2 ** -16).
        threads: None takes as many as PyTorch has. No bit depends on it, nor on the number of rows.
    """
    if matrix.kind != BF16:
        raise ValueError("product_bf16 is for weights in bfloat16")
    flat = x.reshape(-1, matrix.k).float().contiguous()
    rows, count = ctypes.c_int64(len(flat)), ctypes.c_int64(pieces)
    room = torch.empty(library().tiles_bytes(ctypes.c_int64(matrix.k), rows, count), dtype=torch.uint8)
    y = flat.new_empty(len(flat), matrix.n)
    number = ctypes.c_int64(threads or torch.get_num_threads())
    library().product_bf16(ctypes.byref(matrix), pointer(flat), rows, count, pointer(room), pointer(y), number)
    return y.view(*x.shape[:-1], matrix.n)
