"""Flash attention from PyTorch itself, `torch.nn.attention.varlen`: CUDA, fp16 and bf16.

Needs a torch whose varlen_attn takes a window (2.11 and later); whether it runs here is found out by
running it. No package beside torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mistral.backends.varlen import VarlenAttention

# cu_seq_q [B + 1] and cu_seq_k [B + 1], int32; the longest of each; (left, right) of the window
Bounds = tuple[Tensor, Tensor, int, int, tuple[int, int]]


def bounds(q_lens: tuple[int, ...], k_lens: tuple[int, ...], window: int | None, device: torch.device) -> Bounds:
    """Where sequences begin and end, and the window as keys to the left and right of a query's own."""
    cu_q, cu_k = (torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=device) for lens in (q_lens, k_lens))
    # W keys, the query's own included, reach W - 1 to the left; (-1, 0) is causal without a window.
    return cu_q, cu_k, max(q_lens), max(k_lens), (-1 if window is None else window - 1, 0)


def backend(varlen: Callable[..., Any] = varlen_attn) -> VarlenAttention:
    """The `Attend` on `varlen`, a function with the interface of `torch.nn.attention.varlen.varlen_attn`."""
    # Grouped heads always worked; since torch 2.12 they must also be asked for.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen).parameters else {}

    def kernel(q: Tensor, k: Tensor, v: Tensor, where: Bounds) -> Tensor:
        *spans, window = where
        return varlen(q, k, v, *spans, window_size=window, **grouped)

    return VarlenAttention(bounds, kernel)
