"""Sliding-window attention: how queries look at the keys that the window shows them.

`Tiled` walks a step in tiles of query rows: a tile's keys are written, then its queries look, by a kernel (`eager` or
`sdpa`). What a query sees is `window.visible`'s to say. The walk asks neither whether a step is prefill or decode nor
where keys are kept; that is the store's business (cache.py, buffers.py).

Shapes: T packed tokens, R sequences, n queries of a tile, S keys, H / K query / key heads, D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mistral.plan import LayerStore, Plan, Run, Tile
from mistral.window import visible

# (q [R, n, H, D], k [R, S, K, D], v [R, S, K, D], mask [R, n, S] bool) -> [R, n, H, D]
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# (q [T, H, D], k [T, K, D], v [T, K, D], store, plan) -> [T, H, D]
Attend = Callable[[Tensor, Tensor, Tensor, LayerStore, Plan], Tensor]


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention as in the paper, spelled out; softmax in fp32 or float64. See `Kernel`."""
    R, n, H, D = q.shape
    K = k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.view(R, n, K, H // K, D).to(wide)
    scores = torch.einsum("rnkgd,rskd->rkgns", grouped, k.to(wide)) * D**-0.5
    scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    # A query that sees nothing yields 0: subtracting a finite maximum keeps its row of exp at 0.
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)
    weights = (scores - top).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
    out = torch.einsum("rkgns,rskd->rnkgd", weights, v.to(wide))
    return out.reshape(R, n, H, D).to(q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """PyTorch's scaled_dot_product_attention. See `Kernel`; every query must see a key."""
    R, n, H, D = q.shape
    S, K = k.shape[1:3]
    G = H // K
    # The G query heads of a group become G * n query rows of one head, so keys are never repeated.
    rows = q.view(R, n, K, G, D).permute(0, 2, 3, 1, 4).reshape(R, K, G * n, D)
    # Added to the scores rather than given as bools, which the CPU kernel would convert at every call.
    bias = torch.zeros(R, 1, 1, n, S, dtype=q.dtype, device=q.device).masked_fill_(~mask[:, None, None], float("-inf"))
    bias = bias.expand(R, 1, G, n, S).reshape(R, 1, G * n, S)
    k, v = k.to(q.dtype).transpose(1, 2), v.to(q.dtype).transpose(1, 2)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=bias)
    return out.view(R, K, G, n, D).permute(0, 3, 1, 2, 4).reshape(R, n, H, D)


def _facts(plan: Plan, store: LayerStore, run: Run, start: int, stop: int) -> tuple[Tile, Tensor]:
    """Where a tile's keys are and what its queries see: the same for all layers of one window."""
    key = (store.window, store.capacity, run.rows.start, start)
    if key in plan.memo:
        return plan.memo[key]
    tile = store.tile(plan, run, start, stop)
    facts = tile, visible(tile.q_pos, tile.k_pos, store.window)
    # A long prompt has many tiles: kept, their masks would grow with its length times the window.
    if run.n <= store.block:
        plan.memo[key] = facts
    return facts


@dataclass(frozen=True)
class Tiled:
    """An `Attend` that runs a kernel over tiles: the memory of one tile, whatever the prompt's length."""

    kernel: Kernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, store: LayerStore, plan: Plan) -> Tensor:
        out = []
        for run in plan.runs:
            q_run, k_run, v_run = run.pick(q), run.pick(k), run.pick(v)
            pieces = []
            for start in range(0, run.n, store.block):
                stop = min(start + store.block, run.n)
                tile, mask = _facts(plan, store, run, start, stop)
                keys, values = store.extend(tile, k_run, v_run)
                pieces.append(self.kernel(q_run[:, start:stop], keys, values, mask))
            out.append(torch.cat(pieces, dim=1).flatten(0, 1))
        return torch.cat(out) if out else torch.empty_like(q)


def tiled(kernel: Kernel) -> Attend:
    """The `Attend` of a kernel."""
    return Tiled(kernel)
