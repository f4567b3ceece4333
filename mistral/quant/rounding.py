"""Weights in fewer bits: what is rounded to what, and how four-bit weights lie in memory.

int8: a byte a weight and an fp32 scale a row. int4 as it was at first, which folders may still hold (today's is in
affine.py): a weight is one of -8 .. 7 times a bf16 scale that 32 neighbours of a row share. Both symmetric: 0 stays 0.
What weights are multiplied with is rounded to 16 bits, in groups of 128 (int8) or 32 (others) neighbours that share a
scale.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mistral.fast.layout import GROUP, ROWS, groups, int8_shape

SPAN = 128  # columns whose inputs share a scale beside int8
INPUTS = 127 * 257  # what the largest input of a group becomes: 127 in its high byte, and in its low one
# Shares of a group's largest weight that may become the -8; the one with the least squared error does.
SHARES = (1.0, 0.93, 0.86)


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[n, k] weights to [n, k] int8 and [n] fp32 scales: weight is about q * scale."""
    q = torch.empty(weight.shape, dtype=torch.int8)
    scale = torch.empty(len(weight), dtype=torch.float32)
    for first in range(0, len(weight), 1024):
        rows = weight[first : first + 1024].float()
        step = rows.abs().amax(-1) / 127
        q[first : first + 1024] = (rows / step.clamp(min=1e-30)[:, None]).round_().clamp_(-127, 127)
        scale[first : first + 1024] = step
    return q, scale


def int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[n, k] weights to [n, groups * 32] int8 in -8 .. 7 and [n, groups] bf16 scales."""
    n, k = weight.shape
    q = torch.empty(n, groups(k) * GROUP, dtype=torch.int8)
    scale = torch.empty(n, groups(k), dtype=torch.bfloat16)
    for first in range(0, n, 1024):
        rows = F.pad(weight[first : first + 1024].float(), (0, groups(k) * GROUP - k)).unflatten(-1, (-1, GROUP))
        q[first : first + 1024], scale[first : first + 1024] = _best(rows)
    return q, scale


def _best(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[r, g, 32] to [r, g * 32] int8 and [r, g] bf16, each group with the scale that fits it best."""
    largest = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))  # with its sign: -8 has no +8 beside it
    found = error = None
    for share in SHARES:
        scale = (largest * (share / -8)).bfloat16()
        step = scale.float()
        q = (rows / torch.where(step == 0, 1.0, step)).round_().clamp_(-8, 7)
        off = (q * step - rows).square_().sum(-1, keepdim=True)
        if found is None or error is None:
            found, error = (q, scale), off
        else:
            better = off < error
            found = torch.where(better, q, found[0]), torch.where(better, scale, found[1])
            error = torch.minimum(off, error)
    assert found is not None
    return found[0].to(torch.int8).flatten(-2), found[1].squeeze(-1)


def dequantize(q: Tensor, scale: Tensor, columns: int) -> Tensor:
    """The weights that `int4` stands for: [n, columns] fp32."""
    return (q.unflatten(-1, (-1, GROUP)).float() * scale.float()[..., None]).flatten(-2)[:, :columns].contiguous()


def rounded(x: Tensor, span: int = GROUP) -> Tensor:
    """Inputs [..., k] of a product with quantized weights: each `span` of them in 16 bits, widened again."""
    grouped = F.pad(x, (0, -x.shape[-1] % span)).unflatten(-1, (-1, span))
    scale = grouped.abs().amax(-1, keepdim=True) / INPUTS
    near = (grouped / scale.clamp(min=1e-30)).round_() * scale
    return near.flatten(-2)[..., : x.shape[-1]]


def interleave(q: Tensor) -> Tensor:
    """[n, k] int8 weights as kernels.c reads them: [blocks of 16 rows, groups, 512], pairs of columns of 16 rows."""
    n, k = q.shape
    filled = F.pad(q, (0, groups(k) * GROUP - k, 0, -n % ROWS))
    pairs = filled.view(-1, ROWS, groups(k), GROUP // 2, 2)
    return pairs.permute(0, 2, 3, 1, 4).reshape(int8_shape(n, k))


def separate(packed: Tensor, n: int, columns: int) -> Tensor:
    """What `interleave` was given."""
    pairs = packed.view(*packed.shape[:2], GROUP // 2, ROWS, 2)
    return pairs.permute(0, 3, 1, 2, 4).reshape(-1, groups(columns) * GROUP)[:n, :columns]


def pack(q: Tensor, scale: Tensor) -> Tensor:
    """What `int4` gives, as kernels.c reads it: [blocks of 16 rows, groups, 288] bytes."""
    n, g = scale.shape
    spare = -n % ROWS
    nibbles = F.pad(q, (0, 0, 0, spare)).add(8).view(torch.uint8)
    pairs = nibbles.view(-1, ROWS, g, 4, 4, 2)  # block, row, group, word, byte, nibble
    packed = (pairs[..., 0] | pairs[..., 1] << 4).permute(0, 2, 3, 1, 4)  # block, group, word, row, byte
    scales = F.pad(scale, (0, 0, 0, spare)).view(-1, ROWS, g).transpose(1, 2).contiguous().view(torch.uint8)
    return torch.cat((packed.reshape(-1, g, 4 * ROWS * 4), scales), dim=-1)


def unpack(packed: Tensor, n: int, columns: int) -> tuple[Tensor, Tensor]:
    """What `pack` was given."""
    g = groups(columns)
    data = packed[..., : 4 * ROWS * 4].view(-1, g, 4, ROWS, 4).permute(0, 3, 1, 2, 4)
    q = torch.stack((data & 15, data >> 4), dim=-1).view(torch.int8).sub(8).reshape(-1, g * GROUP)[:n]
    scale = packed[..., 4 * ROWS * 4 :].contiguous().view(torch.bfloat16).transpose(1, 2).reshape(-1, g)[:n]
    return q, scale
