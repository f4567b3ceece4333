"""Products of many rows with weights that are floats, by the kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mistral.fast.kernels import INT8, KINDS, Matrix, library, pointer

BF16 = KINDS[torch.bfloat16]


def product_many(matrix: Matrix, x: Tensor, rounds: bool = False, threads: int | None = None) -> Tensor:
    """x [..., k] fp32 times a matrix [n, k] of floats: [..., n] fp32, summed up in fp32.

    Args:
        rounds: whether inputs are rounded to bf16, relative error 2 ** -8 at most: for weights in bf16.
        threads: None takes as many as PyTorch has. No bit depends on it, nor on the number of rows.
    """
    if matrix.kind >= INT8 or (rounds and matrix.kind != BF16):
        raise ValueError("product_many is for weights that are floats, rounded for bfloat16")
    flat = x.reshape(-1, matrix.k).float().contiguous()
    rows, room = ctypes.c_int64(len(flat)), None
    if rounds:
        room = torch.empty(library().tiles_bytes(ctypes.c_int64(matrix.k), rows), dtype=torch.uint8)
    y = flat.new_empty(len(flat), matrix.n)
    number = ctypes.c_int64(threads or torch.get_num_threads())
    at = None if room is None else pointer(room)
    library().product_many(ctypes.byref(matrix), pointer(flat), rows, at, pointer(y), number)
    return y.view(*x.shape[:-1], matrix.n)
