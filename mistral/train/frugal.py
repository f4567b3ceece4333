"""Norms, gates, rotations, ends with gradients of their own: fewer passes over memory, less kept, than by operations.

The forward is the library's, bit for bit. What the gradient needs beside the inputs is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mistral.linear import Linear
from mistral.model import Attention, FeedForward, RMSNorm, Transformer, widen
from mistral.plan import LayerStore, Plan
from mistral.rope import rotate


class _Norm(torch.autograd.Function):
    """y = x * r * w with r = 1 / rms(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = widen(x)
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        return (wide * r).to(x.dtype) * weight.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        normed = widen(x) * r
        wide = widen(grad)
        dweight = (wide * normed).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        wide = wide * weight
        # d(x r)/dx = r (1 - normed normed^T / n)
        share = (wide * normed).mean(-1, keepdim=True)
        return wide.sub_(normed.mul_(share)).mul_(r).to(x.dtype), dweight, None


class _Gate(torch.autograd.Function):
    """y = silu(a) * b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        db = F.silu(a).mul_(grad)
        da: Tensor = torch.ops.aten.silu_backward(grad * b, a)
        return da, db


class _Rotation(torch.autograd.Function):
    """`rotate`, whose gradient is turned back by the same angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


class _Product(torch.autograd.Function):
    """y = x @ weight.T, whose weight has its gradient added in place: one of a vocabulary's size is large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        x, weight = ctx.saved_tensors
        if weight.grad is None:
            weight.grad = grad.T @ x
        else:
            weight.grad.addmm_(grad.T, x)
        return grad @ weight if ctx.needs_input_grad[0] else None, None


class _Rows(torch.autograd.Function):
    """y = embed(ids), whose weight has the gradient of its rows added in place."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(ids, weight)
        return embed(ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ids, weight = ctx.saved_tensors
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids, grad)
        return None, None, None


def _output(part: Linear, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if x.dim() != 2 or x.dtype != part.weight.dtype:
        return product(x)
    y: Tensor = _Product.apply(x, part.weight)
    return y


def _embeddings(part: nn.Embedding, embed: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    y: Tensor = _Rows.apply(part.weight, ids, embed)
    return y


def _norm(norm: RMSNorm, x: Tensor) -> Tensor:
    y: Tensor = _Norm.apply(x, norm.weight, norm.eps)
    return y


def _attention(
    part: Attention,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    plan: Plan,
    store: LayerStore,
    q_scale: Tensor | float = 1.0,
) -> Tensor:
    q, k, v = (w(x).unflatten(-1, (-1, part.head_dim)) for w in (part.wq, part.wk, part.wv))
    q = _Rotation.apply(q, cos * q_scale, sin * q_scale)
    out = part.attend(q, _Rotation.apply(k, cos, sin), v, store, plan)
    y: Tensor = part.wo(out.flatten(-2))
    return y


def _feed_forward(part: FeedForward, x: Tensor, again: bool = True) -> Tensor:
    """The library's; where `again`, what w2 multiplies is not kept for its gradient, but computed again."""
    a, b = part.w1(x), part.w3(x)
    gated: Tensor = _Gate.apply(a, b)
    if not again:
        return part.w2(gated)  # type: ignore[no-any-return]
    where = gated.data_ptr()

    def keep(tensor: Tensor) -> Tensor | None:
        return None if tensor.data_ptr() == where and tensor.shape == a.shape else tensor

    def give(kept: Tensor | None) -> Tensor:
        return F.silu(a.detach()).mul_(b.detach()) if kept is None else kept

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        return part.w2(gated)  # type: ignore[no-any-return]


def make_frugal(model: Transformer, again: bool) -> None:
    """Have every norm, attention and feed-forward of a model use the gradients above; its ends too, if trained."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            use(module, partial(_norm, module))
        elif isinstance(module, Attention):
            use(module, partial(_attention, module))
        elif isinstance(module, FeedForward):
            use(module, partial(_feed_forward, module, again=again))
    ends = model.tok_embeddings, model.output
    if isinstance(ends[0], nn.Embedding) and ends[0].weight.requires_grad:
        use(ends[0], partial(_embeddings, ends[0], ends[0].forward))
    if type(ends[1]) is Linear and ends[1].weight.requires_grad:
        use(ends[1], partial(_output, ends[1], ends[1].forward))


def use(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Have one module compute by another function; names of modules and parameters stay as they are."""
    module.__dict__["forward"] = forward
