"""The weight product: every matrix of the model goes through this one class.

Weights may be narrower than the arithmetic: a CPU without bf16 units keeps bf16 weights and
computes in fp32. Other kinds of storage subclass `Linear` and are put in place at load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Numbers widened at once: few enough that they stay in a CPU's cache until they are multiplied.
WIDEN = 2**20
ROWS = 64  # tiles are multiples of this, so that every row is summed up as it is in the whole product


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

    Never holds more than about WIDEN widened numbers, so the memory stays that of the narrow weight.
    """
    rows = max(ROWS, WIDEN // weight.shape[1] // ROWS * ROWS)
    # One place for all tiles: memory taken again for each may be the system's to find and clear, which is slower than
    # the product. Backward wants every tile to stay as it was.
    place = None if torch.is_grad_enabled() else x.new_empty(rows, weight.shape[1])
    tiles = []
    for tile in weight.split(rows):
        wide = tile.to(x.dtype) if place is None else place[: len(tile)].copy_(tile)
        tiles.append(F.linear(x, wide))
    return torch.cat(tiles, dim=-1)
