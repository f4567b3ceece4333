"""Attention from xformers, which the original Mistral package runs on. Imported when it is asked for.

The masks are xformers' block-diagonal ones, anchored at the last query and the last key of each
sequence. Which of its kernels runs is xformers' choice; whether one runs here is found out by running it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mistral.backends.varlen import VarlenAttention


def bias(q_lens: tuple[int, ...], k_lens: tuple[int, ...], window: int | None, device: torch.device) -> Any:
    """The mask of packed sequences; xformers' window counts as ours does, the query's own key included."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    blocks = BlockDiagonalMask.from_seqlens(list(q_lens), list(k_lens), device=device)
    if window is None:
        return blocks.make_causal_from_bottomright()
    return blocks.make_local_attention_from_bottomright(window)


def backend(attention: Callable[..., Tensor] | None = None) -> VarlenAttention:
    """The `Attend` on xformers, or on another function with memory_efficient_attention's interface.

    Raises:
        ImportError: xformers is not installed, or does not fit this torch.
    """
    if attention is None:
        # Its own complaint about a mismatched build is a page; what comes of it is said in one line.
        log = logging.getLogger("xformers")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            from xformers.ops import memory_efficient_attention
        finally:
            log.setLevel(level)

        attention = memory_efficient_attention
    attend = attention

    def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        # xformers takes grouped heads as [1, T, K, H / K, D], the keys expanded without a copy.
        q = q.unflatten(1, (k.shape[1], -1))[None]
        k, v = (x[None, :, :, None].expand(-1, -1, -1, q.shape[3], -1) for x in (k, v))
        return attend(q, k, v, attn_bias=mask)[0].flatten(1, 2)

    return VarlenAttention(bias, kernel)
