"""Attention while training: tiles as in `mistral.attention`, with masks that all layers share.

Without a cache every sequence begins at position 0, so a tile's mask depends on its place alone. Where the window is
full it is the same for all tiles, and the memory stays linear in the length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mistral.plan import LayerStore, Plan
from mistral.window import visible

KEEP = 2**22  # numbers of a mask that no other tile shares; larger ones are made again in every layer


def shared_masks(q: Tensor, k: Tensor, v: Tensor, store: LayerStore, plan: Plan) -> Tensor:
    """An `Attend` over the keys of one step: q [T, H, D], k and v [T, K, D] to [T, H, D]. Differentiable."""
    out = []
    for run in plan.runs:
        q_run, k_run, v_run = run.pick(q), run.pick(k), run.pick(v)
        pieces = []
        for start in range(0, run.n, store.block):
            stop = min(start + store.block, run.n)
            first = 0 if store.window is None else max(0, start - store.window + 1)
            bias = _bias(plan, store.window, stop - start, stop - first, q.shape[1] // k.shape[1], q)
            pieces.append(_tile(q_run[:, start:stop], k_run[:, first:stop], v_run[:, first:stop], bias))
        out.append((pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)


def _bias(plan: Plan, window: int | None, n: int, keys: int, group: int, like: Tensor) -> Tensor:
    """What is added to the scores of n queries, the last of `keys` positions: [1, 1, group * n, keys], 0 or -inf."""
    key = ("bias", window, n, keys, group, like.dtype)
    if key in plan.memo:
        return plan.memo[key]
    positions = torch.arange(keys, device=like.device)
    mask = visible(positions[keys - n :], positions, window)
    bias = torch.zeros(n, keys, dtype=like.dtype, device=like.device).masked_fill_(~mask, float("-inf"))
    bias = bias.expand(1, group, n, keys).reshape(1, 1, group * n, keys)
    shared = window is not None and keys - n == window - 1
    if shared or bias.numel() <= KEEP:
        plan.memo[key] = bias
    return bias


def _tile(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """q [R, n, H, D], k and v [R, S, K, D] to [R, n, H, D]; the heads of a group are rows of one head, as in `sdpa`."""
    R, n, H, D = q.shape
    K = k.shape[2]
    G = H // K
    rows = q.view(R, n, K, G, D).permute(0, 2, 3, 1, 4).reshape(R, K, G * n, D)
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
    return out.view(R, K, G, n, D).permute(0, 3, 1, 2, 4).reshape(R, n, H, D)
