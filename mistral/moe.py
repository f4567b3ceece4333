"""A mixture of experts (Mixtral, arXiv 2401.04088): a router sends each token through a few feed-forwards of many."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mistral.args import ModelArgs, Moe
from mistral.linear import Linear


def route(logits: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights: two [T, chosen] tensors, the weights in the logits' dtype.

    The weights are the softmax of the chosen logits alone, in at least fp32; ties go to the lowest expert.

    Args:
        logits: [T, experts] of the router, in the compute dtype.
    """
    best, experts = logits.sort(dim=-1, descending=True, stable=True)
    wide = best[:, :chosen].to(torch.promote_types(logits.dtype, torch.float32))
    return experts[:, :chosen], wide.softmax(-1).to(logits.dtype)


class MixtureOfExperts(nn.Module):
    """The weighted sum of what a token's experts make of it: [T, dim] to [T, dim], in x's dtype.

    An expert takes all of its tokens in one call, and is not read where it has none.
    """

    def __init__(self, args: ModelArgs, moe: Moe, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.num_experts_per_tok = moe.num_experts_per_tok
        self.gate = Linear(args.dim, moe.num_experts)
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights = route(self.gate(x), self.num_experts_per_tok)
        out = torch.zeros_like(x)
        if len(x) == 1:  # nothing to gather, and calls of PyTorch would take as long as a small product
            for expert, weight in sorted(zip(chosen[0].tolist(), weights[0].unbind(), strict=True)):
                out = out + weight * self.experts[expert](x)
            return out
        for expert in chosen.unique().tolist():
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            out = out.index_add(0, tokens, weights[tokens, place, None] * self.experts[expert](x[tokens]))
        return out
