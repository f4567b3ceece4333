"""A step of many tokens, such as a prompt, by the kernels: norms, rotation, attention and gates, a call each.

The walk is that of model.py, and so are the numbers, in fp32. Products are the modules' own, with one exception: where
the model was loaded for it, inputs are rounded to bf16 in products of tokens that the plan calls a prompt. These then
have the same bits whatever is beside them and however they are divided into steps; other tokens are not rounded.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from mistral.attention import sdpa, tiled
from mistral.cache import NoCache, RollingBufferCache
from mistral.fast.kernels import library, pointer
from mistral.fast.known import unknown_module
from mistral.fast.linear import HasMatrix
from mistral.fast.tiles import BF16, product_many
from mistral.model import FeedForward, RMSNorm, Transformer, TransformerBlock
from mistral.plan import Plan
from mistral.rope import Angles, Rope

POSITIONS = 64  # whose cosines are made together: a multiple of every vector, so no value is made by a loop's tail
FEW_QUERIES = 8  # of a sequence in a step: transposing the keys for fewer takes longer than PyTorch's attention


class Queries(ctypes.Structure):
    """Queries, keys and values as queries.h has them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "mask", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "n", "positions", "n_heads", "n_kv_heads", "head_dim")),
        *((name, ctypes.c_int64) for name in ("next_query", "next_queries", "next_keys")),
    )


def _threads() -> ctypes.c_int64:
    return ctypes.c_int64(torch.get_num_threads())


def _heads_together(x: Tensor) -> Tensor:
    """x [R, n, heads, D] in fp32, with what belongs to a position in one stretch of memory."""
    x = x.float()
    return x if x.stride()[1:] == (x.shape[2] * x.shape[3], x.shape[3], 1) else x.contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention by the kernels, in fp32. See `attention.Kernel`."""
    R, n, H, D = q.shape
    S, K = k.shape[1:3]
    wide, keys, values, seen = _heads_together(q), _heads_together(k), _heads_together(v), mask.contiguous()
    if keys.stride() != values.stride():
        keys, values = keys.contiguous(), values.contiguous()
    out = torch.empty(R, n, H, D)
    places = (x.data_ptr() for x in (wide, keys, values, seen, out))
    given = Queries(*places, R, n, S, H, K, D, H * D, wide.stride(0), keys.stride(0))
    library().attend_many(ctypes.byref(given), _threads())
    return out.to(q.dtype)


def attend_or_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`attend`, but for few queries PyTorch's attention."""
    return (sdpa if q.shape[1] < FEW_QUERIES else attend)(q, k, v, mask)


def norm(x: Tensor, by: RMSNorm) -> Tensor:
    """`by(x)` for x [T, dim] fp32."""
    out = torch.empty_like(x)
    weight = by.weight.detach().float().contiguous()
    rows, n = (ctypes.c_int64(size) for size in x.shape)
    library().norm_rows(pointer(x), pointer(weight), rows, n, ctypes.c_double(by.eps), pointer(out), _threads())
    return out


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` in place: x [T, heads, D] fp32, contiguous; cos, sin [T, D/2]."""
    shape = (ctypes.c_int64(size) for size in x.shape)
    library().rotate_rows(pointer(x), pointer(cos), pointer(sin), *shape, _threads())
    return x


def gate(x: Tensor, up: Tensor) -> Tensor:
    """silu(x) * up, in place of x; both fp32, contiguous."""
    library().gate_rows(pointer(x), pointer(up), ctypes.c_int64(x.numel()), _threads())
    return x


def aligned_angles(positions: Tensor, rope: Rope) -> Angles:
    """Angles made for whole blocks of positions, so that neighbours change no bit."""
    blocks, place = (positions // POSITIONS).unique(return_inverse=True)
    every = [torch.arange(POSITIONS) + block * POSITIONS for block in blocks.tolist()]
    made = [rope.angles(each) for each in every]
    at = place * POSITIONS + positions % POSITIONS
    cos, sin, grown = (torch.cat([parts.expand(POSITIONS, -1) for parts in x])[at] for x in zip(*made, strict=True))
    return cos, sin, grown


# Which tokens of a step are rounded: neighbours together, in their order.
Parts = list[tuple[slice, bool]]


def parts_of(plan: Plan, rounds: bool) -> Parts:
    """The tokens of a step, divided into those that are rounded and those that are not."""
    parts: Parts = []
    end = 0
    for row, n in enumerate(plan.seqlens):
        begin, end, rounded = end, end + n, rounds and row in plan.prompts
        if n and parts and parts[-1][1] == rounded:
            begin = parts.pop()[0].start
        if n:
            parts.append((slice(begin, end), rounded))
    return parts


def multiply(linear: nn.Module, x: Tensor, parts: Parts) -> Tensor:
    """`linear(x)`, in which inputs of some rows are rounded to bf16 if the weights are in bf16."""
    matrix = linear.matrix() if isinstance(linear, HasMatrix) else None
    if matrix is None or matrix.kind != BF16 or not any(rounded for _, rounded in parts):
        y: Tensor = linear(x)
        return y
    ys = [product_many(matrix, x[at], rounds=True) if rounded else linear(x[at]) for at, rounded in parts]
    return ys[0] if len(ys) == 1 else torch.cat(ys)


def takes(model: Transformer) -> bool:
    """Whether `step` can take the steps of a model: nothing in it is unknown, and no hook looks at what is between."""
    hooks = (vars(m)[kind] for m in model.modules() for kind in ("_forward_hooks", "_forward_pre_hooks"))
    plain = model.device.type == "cpu" and model.dtype == torch.float32 and not torch.is_grad_enabled()
    return plain and unknown_module(model, growing=True) is None and not any(hooks)


def step(
    model: Transformer, input_ids: Tensor, plan: Plan, cache: RollingBufferCache | NoCache, rounds: bool = False
) -> Tensor:
    """`model.step` for a model that `takes` takes.

    Args:
        rounds: whether inputs of products are rounded to bf16 for the prompts of the plan.
    """
    parts = parts_of(plan, rounds)
    look = tiled(attend if any(rounded for _, rounded in parts) else attend_or_sdpa)
    cos, sin, q_scale = aligned_angles(plan.positions, model.rope)
    q_cos, q_sin = cos * q_scale, sin * q_scale
    h = model.tok_embeddings(input_ids).to(torch.float32).contiguous()
    for i, block in enumerate(model.layers):
        assert isinstance(block, TransformerBlock)  # as `takes` has seen
        attention, ffn = block.attention, block.feed_forward
        assert isinstance(ffn, FeedForward)
        store: Any = cache.layer(i)  # a `LayerStore`, but for attributes that it cannot set
        with model.share_cores():
            x = norm(h, block.attention_norm)
            q, k, v = (
                multiply(w, x, parts).unflatten(-1, (-1, attention.head_dim))
                for w in (attention.wq, attention.wk, attention.wv)
            )
            which = look if attention.attend == tiled(sdpa) else attention.attend
            seen = which(turn(q, q_cos, q_sin), turn(k, cos, sin), v, store, plan)
            h += multiply(attention.wo, seen.flatten(-2), parts)
            x = norm(h, block.ffn_norm)
            h += multiply(ffn.w2, gate(multiply(ffn.w1, x, parts), multiply(ffn.w3, x, parts)), parts)
    return norm(h, model.norm)
