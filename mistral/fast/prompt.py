"""A step of many tokens, such as a prompt: all but the products' arithmetic by the kernels, a call for each row-wise part.

The walk is that of model.py, and so are the numbers, in fp32. Products are the modules' own.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mistral.attention import Attend, sdpa, tiled
from mistral.cache import NoCache, RollingBufferCache
from mistral.fast.kernels import library, pointer
from mistral.fast.known import unknown_module
from mistral.model import RMSNorm, Transformer
from mistral.plan import Plan

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
    """Attention by the kernels, in fp32; by PyTorch where a sequence has few queries. See `attention.Kernel`."""
    R, n, H, D = q.shape
    if n < FEW_QUERIES:
        return sdpa(q, k, v, mask)
    S, K = k.shape[1:3]
    wide, keys, values, seen = _heads_together(q), _heads_together(k), _heads_together(v), mask.contiguous()
    if keys.stride() != values.stride():
        keys, values = keys.contiguous(), values.contiguous()
    out = torch.empty(R, n, H, D)
    places = (x.data_ptr() for x in (wide, keys, values, seen, out))
    given = Queries(*places, R, n, S, H, K, D, H * D, wide.stride(0), keys.stride(0))
    library().attend_many(ctypes.byref(given), _threads())
    return out.to(q.dtype)


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


def takes(model: Transformer) -> bool:
    """Whether `step` can take the steps of a model: nothing in it is unknown, and nobody wants to see what is between."""
    hooks = (vars(m)[kind] for m in model.modules() for kind in ("_forward_hooks", "_forward_pre_hooks"))
    plain = model.device.type == "cpu" and model.dtype == torch.float32 and not torch.is_grad_enabled()
    return plain and unknown_module(model) is None and not any(hooks)


def step(model: Transformer, input_ids: Tensor, plan: Plan, cache: RollingBufferCache | NoCache) -> Tensor:
    """`model.step` for a model that `takes` takes."""
    cos, sin = (x.contiguous() for x in model.rope.cos_sin(plan.positions))
    h = model.tok_embeddings(input_ids).to(torch.float32).contiguous()
    for i, block in enumerate(model.layers):
        attention, ffn = block.attention, block.feed_forward
        look: Attend = tiled(attend) if attention.attend == tiled(sdpa) else attention.attend
        x = norm(h, block.attention_norm)
        q, k, v = (w(x).unflatten(-1, (-1, attention.head_dim)) for w in (attention.wq, attention.wk, attention.wv))
        seen = look(turn(q, cos, sin), turn(k, cos, sin), v, cache.layer(i), plan)
        h += attention.wo(seen.flatten(-2))
        x = norm(h, block.ffn_norm)
        h += ffn.w2(gate(ffn.w1(x), ffn.w3(x)))
    return norm(h, model.norm)
