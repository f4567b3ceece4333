"""The gradient of one batch: the library's forward without a cache, and a loss that never holds all logits.

Logits are computed only of tokens that have a weight, some at a time, and each part goes backward at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from mistral.model import Transformer

LOGITS = 2**23  # numbers of logits held at a time


@dataclass(frozen=True)
class Batch:
    """Sequences packed one after the other, and what each token should predict.

    Args:
        ids: [T] int64.
        seqlens: of the sequences; sums to T.
        targets: [T] int64, the id that follows each token.
        weights: [T] fp32, how much its prediction counts; 0 where it does not.
    """

    ids: Tensor
    seqlens: tuple[int, ...]
    targets: Tensor
    weights: Tensor

    @property
    def total(self) -> float:
        """Sum of the weights."""
        return float(self.weights.double().sum())

    def to(self, device: torch.device) -> Batch:
        return Batch(self.ids.to(device), self.seqlens, self.targets.to(device), self.weights.to(device))


def add_gradients(model: Transformer, batch: Batch, total: float) -> float:
    """Add to every `.grad` that of the batch's sum of weight * nll, divided by `total`.

    A step adds batches with the weight of all of them as `total`: the gradient is that of one large batch.

    Returns:
        The sum of weight * nll in nats, not divided.
    """
    hidden = model.forward_partial(batch.ids, batch.seqlens)
    wanted = batch.weights.nonzero()[:, 0]
    rows = hidden[wanted]
    leaf = rows.detach().requires_grad_()
    nats = 0.0
    for part in _parts(len(wanted), model.args.vocab_size):
        logits = model.logits(leaf[part])
        edge = get_gradient_edge(logits)  # the gradient comes into the logits' own place, which no longer holds them
        loss, grad = _loss_and_gradient(logits.detach(), batch.targets[wanted[part]], batch.weights[wanted[part]])
        torch.autograd.backward(edge, grad.div_(total))
        nats += loss
    rows.backward(leaf.grad)  # type: ignore[no-untyped-call]
    return nats


@torch.no_grad()
def _loss_and_gradient(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """The sum of weight * nll, and its gradient weight * (p - 1 at the target), in the place of the logits [n, V]."""
    top = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, targets[:, None])
    sums = logits.sub_(top).exp_().sum(-1, keepdim=True)
    nll = sums.log() + top - chosen
    grad = logits.mul_(weights[:, None] / sums)
    grad.scatter_add_(-1, targets[:, None], -weights[:, None].to(grad.dtype))
    return float((nll[:, 0] * weights).sum()), grad


@torch.no_grad()
def nats_of(model: Transformer, batch: Batch) -> float:
    """The sum of weight * nll of a batch, in nats."""
    hidden = model.forward_partial(batch.ids, batch.seqlens)
    wanted = batch.weights.nonzero()[:, 0]
    parts = _parts(len(wanted), model.args.vocab_size)
    return sum(_loss(model, hidden[wanted[part]], batch, wanted[part]).item() for part in parts)


def _parts(rows: int, vocab_size: int) -> Iterator[slice]:
    size = max(16, LOGITS // vocab_size)
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def _loss(model: Transformer, h: Tensor, batch: Batch, at: Tensor) -> Tensor:
    """The sum of weight * nll of the tokens at some places, from their hidden states [n, dim]."""
    nll = F.cross_entropy(model.logits(h), batch.targets[at], reduction="none")
    return (nll * batch.weights[at]).sum()
