"""The weight product: every matrix of the model goes through this one class.

Weights may be narrower than the arithmetic: a CPU without bf16 units keeps bf16 weights and
computes in fp32. Other kinds of storage subclass `Linear` and are put in place at load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDEN_ROWS = 1024


class Linear(nn.Linear):
    """`x @ weight.T`, without a bias: [..., in_features] to [..., out_features], in x's dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype:
            return F.linear(x, self.weight)
        return widened_product(x, self.weight)


def widened_product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` with the weight cast to x's dtype a tile of rows at a time.

    Never holds more than WIDEN_ROWS widened rows, so the memory stays that of the narrow weight.
    """
    tiles = [F.linear(x, rows.to(x.dtype)) for rows in weight.split(WIDEN_ROWS)]
    return torch.cat(tiles, dim=-1)
