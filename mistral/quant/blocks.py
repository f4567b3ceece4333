"""Blocks of few bits as files have them, kept as they are: `Linear` whose weights are a GGML type's.

What a block holds is in fast/layout.py; here is what its bits mean, in PyTorch, slow and exact. The kernels multiply.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from mistral.fast import pages
from mistral.fast.kernels import Matrix, library, pointer
from mistral.fast.layout import AFFINE4, BLOCKS, GROUP, ROWS, SUPER, Blocks, groups
from mistral.quant.linear import QuantizedLinear, blocks

LOW = 4 * ROWS * 4  # bytes of the lowest four bits of a group


def _rows(x: Tensor, n: int) -> Tensor:
    """[blocks, m, ROWS] to [n, m]: what lies beside the rows of a block, row by row."""
    return x.transpose(1, 2).reshape(-1, x.shape[1])[:n]


def _beside(x: Tensor) -> Tensor:
    """[n, m] to [blocks, m, ROWS], filled up with zeros."""
    return F.pad(x, (0, 0, 0, -len(x) % ROWS)).view(-1, ROWS, x.shape[1]).transpose(1, 2)


def _numbers(kind: Blocks, packed: Tensor, n: int) -> Tensor:
    """The numbers q of every weight, [n, groups * GROUP] uint8."""
    g = packed.shape[1]
    if kind.bits < 4:
        q = _units(packed[..., : 2 * ROWS * 4], 2)
        if kind.bits == 3:
            q = q | _units(packed[..., 2 * ROWS * 4 : kind.q_bytes], 1) << 2
        return q.reshape(-1, g * GROUP)[:n]
    count = 8 if kind.bits == 8 else 4
    words = packed[..., : count * ROWS * 4].reshape(-1, g, count, ROWS, 4).permute(0, 3, 1, 2, 4)  # word, byte last
    if kind.bits == 8:  # units of even and of odd columns
        q = words.unflatten(3, (4, 2)).transpose(-1, -2)
    else:
        q = torch.stack((words & 15, words >> 4), dim=-1)  # row, group, word of 8 columns, byte, nibble
    if kind.bits in (5, 6):
        q = q | _units(packed[..., LOW : kind.q_bytes], kind.bits - 4) << 4
    return q.reshape(-1, g * GROUP)[:n]


def _units(packed: Tensor, bits: int) -> Tensor:
    """Numbers of one or two bits, in whose words units follow each other: rows, groups, and 8 columns of 4 times."""
    each = 8 // bits  # units in a word
    words = packed.reshape(-1, packed.shape[1], 8 // each, ROWS, 4).permute(0, 3, 1, 2, 4)
    fields = torch.stack([words >> bits * i & (1 << bits) - 1 for i in range(each)], dim=4)  # word, field, byte
    return fields.reshape(*words.shape[:3], 4, 2, 4).transpose(-1, -2)


def _scales(kind: Blocks, packed: Tensor, scale: Tensor | None, n: int) -> tuple[Tensor, Tensor | None]:
    """What q is multiplied by, and what is taken off then, if anything is: [n, groups, 1 or 2] fp32."""
    after = packed[..., kind.q_bytes :]
    if scale is None or not kind.supers:
        halves = after.contiguous().view(torch.float16)
        low = -_rows(halves[..., ROWS:], n).float()[..., None] if kind.scales == "fp16 and minimum" else None
        return _rows(halves[..., :ROWS], n).float()[..., None], low
    over = [
        _rows(scale[:, :, i], n).float().repeat_interleave(SUPER, 1)[:, : packed.shape[1]] for i in range(kind.supers)
    ]
    each = torch.stack([_rows(part, n) for part in after.split(ROWS, dim=-1)], dim=-1)
    if kind.scales == "factors":
        return (over[0] * each[..., 0])[..., None], (over[1] * each[..., 1])[..., None]
    if kind.scales == "two nibbles":
        return over[0][..., None] * (each & 15), over[1][..., None] * (each >> 4)
    return over[0][..., None] * each.contiguous().view(torch.int8), None


def dequantize(kind: Blocks, packed: Tensor, scale: Tensor | None, n: int, columns: int) -> Tensor:
    """The weights that blocks stand for, [n, columns] fp32: bit for bit those of the type's own definition."""
    step, low = _scales(kind, packed, scale, n)
    q = _numbers(kind, packed, n)
    values = torch.tensor(kind.table, dtype=torch.float32)[q.int()] if kind.table else q.float().sub_(kind.offset)
    wide = values.view(n, step.shape[1], step.shape[2], -1).mul_(step[..., None])
    if low is not None:
        wide.sub_(low[..., None])
    return wide.flatten(1)[:, :columns].contiguous()


def repack(kind: str, raw: Tensor, n: int, columns: int) -> tuple[Tensor, Tensor]:
    """[nbytes] uint8 of a GGML type, as in its file, in the order that the kernels read: `packed` and `scale`."""
    to = BLOCKS[kind]
    packed = pages.empty(to.packed_shape(n, columns), torch.uint8)
    scale = pages.empty(to.scale_shape(n, columns), torch.float16)
    number, rows, width, threads = (ctypes.c_int64(i) for i in (to.number, n, columns, torch.get_num_threads()))
    library().repack(number, pointer(raw), rows, width, pointer(packed), pointer(scale), threads)
    return packed, scale


def pack_affine4(q: Tensor, sc: Tensor, mn: Tensor, S: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """Weights S * sc * q - M * mn as AFFINE4 has them.

    Args:
        q: [n, k] uint8, 0 .. 15.
        sc, mn: [n, ceil(k / 32)] uint8.
        S, M: [n, ceil(k / 256)] fp16.

    Returns:
        `packed` and `scale`, see `layout.affine4_shapes`.
    """
    (n, k), g = q.shape, groups(q.shape[1])
    pairs = F.pad(q, (0, g * GROUP - k, 0, -n % ROWS)).view(
        -1, ROWS, g, 4, 4, 2
    )  # block, row, group, word, byte, nibble
    data = (pairs[..., 0] | pairs[..., 1] << 4).permute(0, 2, 3, 1, 4).reshape(-1, g, LOW)
    packed = torch.cat((data, _beside(sc), _beside(mn)), dim=-1)
    return packed, torch.stack((_beside(S), _beside(M)), dim=2).contiguous()


def unpack_affine4(
    packed: Tensor, scale: Tensor, n: int, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `pack_affine4` was given."""
    after = packed[..., AFFINE4.q_bytes :]
    codes = _rows(after[..., :ROWS], n), _rows(after[..., ROWS:], n)
    over = _rows(scale[:, :, 0], n), _rows(scale[:, :, 1], n)
    return _numbers(AFFINE4, packed, n)[:, :columns], *codes, *over


class BlockLinear(QuantizedLinear):
    """Weights of few bits in blocks, as a file has them; inputs in 16 bits. See `QuantizedLinear`.

    Args:
        kind: how they lie.
        packed, scale: see `layout.Blocks`; where nothing lies apart, `scale` is empty.
    """

    packed: Tensor
    scale: Tensor | None

    def __init__(self, kind: Blocks, in_features: int, out_features: int, packed: Tensor, scale: Tensor) -> None:
        super().__init__(in_features, out_features)
        self.blocks = kind
        self.register_buffer("packed", packed)
        # As bits, which no change of dtype rounds.
        self.register_buffer("scale", scale.view(torch.int16) if kind.supers else None)

    def matrix(self) -> Matrix | None:
        if not self.by_kernels or self.packed.device.type != "cpu":
            return None
        places = self.packed.data_ptr(), None if self.scale is None else self.scale.data_ptr()
        return Matrix(*places, self.blocks.number, self.out_features, self.in_features)

    def rows(self, first: int, last: int) -> Tensor:
        at = blocks(first, last)
        scale = None if self.scale is None else self.scale[at].view(torch.float16)
        return dequantize(self.blocks, self.packed[at], scale, last - first, self.in_features)
