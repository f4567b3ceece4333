"""Weights rounded to AFFINE4: a weight is s * q - m, q in 0 .. 15, where 32 neighbours of a row share s and m.

s is S * sc and m is M * mn: sc and mn are bytes, and S and M are fp16 numbers that 256 neighbours share; 4.625 bits a
weight in all. A group with a minimum of its own uses all sixteen steps, which one that is symmetric rarely does.

What is looked for is the least squared error, where each column may have a weight of its own (loader/calibration.py).
For given q the best s and m are those of a least-squares line; for given s and m the best q are the nearest. So each
group starts from several scales and does both in turn (`search`), and again among the codes that are near (`coded`).
fast/csrc/affine.h does the same by the kernels and sums in another order: where two choices are as good, they may
differ.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mistral.fast import pages
from mistral.fast.kernels import library, pointer
from mistral.fast.layout import AFFINE4, GROUP, ROWS, SUPER, affine4_shapes, groups
from mistral.quant.blocks import BlockLinear, pack_affine4
from mistral.quant.linear import source

# Into how many steps a group's range is divided at first; 15 reach from its least weight to its largest.
STARTS = (13.0, 13.3125, 13.625, 13.9375, 14.25, 14.5625, 14.875, 15.1875, 15.5)
REFITS = 2  # of each start
ROUNDS = 2  # of the codes, with the code of s and NEAR on each side of it
NEAR = 1
STEPS, CODES = 15, 255  # the largest q, and the largest code
PIECE = 2**20  # weights that the plain path works on at a time
# What the largest weight of a matrix may be: fp16 numbers cannot express scales outside.
LEAST, MOST = 2.0**-16, 2.0**23


class Affine4Linear(BlockLinear):
    """Four bits a weight, with scales and minima; what `--quant int4` makes. See `QuantizedLinear`."""

    def __init__(self, in_features: int, out_features: int, packed: Tensor, scale: Tensor) -> None:
        super().__init__(AFFINE4, in_features, out_features, packed, scale)

    @classmethod
    def of(cls, weight: Tensor, columns: Tensor | None = None) -> Affine4Linear:
        return cls(weight.shape[1], weight.shape[0], *affine4(weight, columns))


def affine4(weight: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round weights, by the kernels where they can.

    Args:
        weight: [n, k] of any floating-point dtype; its largest is 0 or within LEAST .. MOST.
        columns: [k] how much the squared error of each column counts, 0 or more; None: all the same.

    Returns:
        packed and scale, see `layout.affine4_shapes`.
    """
    n, k = weight.shape
    h = torch.ones(k) if columns is None else columns.float() / columns.mean().clamp(min=1e-30).float()
    h = F.pad(h, (0, -k % GROUP)).contiguous()
    matrix = source(weight)
    if matrix is None:
        parts = [_plain(rows.float(), h) for rows in weight.split(max(1, PIECE // k))]
        return pack_affine4(*(torch.cat(part) for part in zip(*parts, strict=True)))
    threads = ctypes.c_int64(torch.get_num_threads())
    starts, blocks = torch.tensor(STARTS), -(-n // ROWS)
    s, m = (torch.empty(blocks, groups(k), ROWS) for _ in range(2))
    tries = (ctypes.c_int64(i) for i in (len(STARTS), REFITS))
    library().affine4_search(ctypes.byref(matrix), pointer(h), pointer(starts), *tries, pointer(s), pointer(m), threads)
    scale = torch.stack([shared(x.transpose(1, 2)).transpose(1, 2) for x in (s, m)], dim=2).contiguous()
    packed, wide = pages.empty(affine4_shapes(n, k)[0], torch.uint8), scale.float()
    found = (pointer(x) for x in (h, s, m, wide))
    tries = (ctypes.c_int64(i) for i in (NEAR, ROUNDS))
    library().to_affine4(ctypes.byref(matrix), *found, *tries, pointer(packed), threads)
    return packed, scale


def _plain(rows: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """What `pack_affine4` takes, of rows [r, k] in fp32."""
    k = rows.shape[1]
    x, h = F.pad(rows, (0, -k % GROUP)).unflatten(-1, (-1, GROUP)), h.view(-1, GROUP)
    s, m = search(x, h)
    S, M = shared(s), shared(m)
    sc, mn, q = coded(x, h, s, m, S, M)
    return q.flatten(1)[:, :k].byte(), sc.byte(), mn.byte(), S, M


class _Sums(NamedTuple):
    """Over each group, each column with its weight h: h w, h q, h q q, h q w, and the squared error; [r, groups]."""

    w: Tensor
    q: Tensor
    qq: Tensor
    qw: Tensor
    error: Tensor


def nearest(x: Tensor, s: Tensor, m: Tensor) -> Tensor:
    """The best q for groups x [r, groups, 32] with s and m [r, groups]."""
    return ((x + m[..., None]) * _inverse(s)[..., None]).clamp_(0, STEPS).round_()


def search(x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The best s and m >= 0, [r, groups] each, of groups x [r, groups, 32] with columns' weights h [groups, 32]."""
    low, high = x.amin(-1).clamp(max=0), x.amax(-1)  # m >= 0, so low <= 0
    s, m, best = torch.zeros_like(low), torch.zeros_like(low), torch.full_like(low, torch.inf)
    for steps in STARTS:
        s1, m1 = (high - low) / steps, -low
        for _ in range(REFITS + 1):
            sums = _sums(x, h, s1, m1)
            better = sums.error < best
            best, s, m = (torch.where(better, a, b) for a, b in ((sums.error, best), (s1, s), (m1, m)))
            s1, m1 = _fit(sums, h, s1, m1)
    return s, m


def shared(values: Tensor) -> Tensor:
    """What the codes of SUPER groups are multiplied by, [..., groups] to [..., supers] fp16: rounded up."""
    filled = F.pad(values, (0, -values.shape[-1] % SUPER)).unflatten(-1, (-1, SUPER))
    exact = filled.amax(-1) / CODES
    half = exact.half()
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float() < exact, above, half)


def coded(x: Tensor, h: Tensor, s: Tensor, m: Tensor, S: Tensor, M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The codes of s and m, [r, groups] each, and q, for what they are multiplied by, [r, supers] each."""
    S, M = (over.float().repeat_interleave(SUPER, 1)[:, : x.shape[1]] for over in (S, M))
    total = h.sum(-1).clamp(min=1e-30)
    sc, mn = _code(s, S), _code(m, M)
    sums = _sums(x, h, sc * S, mn * M)
    for _ in range(ROUNDS):
        middle, _ = _fit(sums, h, sc * S, mn * M)
        best = sums.error
        for off in range(-NEAR, NEAR + 1):
            sc1 = (_code(middle, S) + off).clamp_(0, CODES)
            mn1 = _code((sc1 * S * sums.q - sums.w) / total, M)
            error = _sums(x, h, sc1 * S, mn1 * M).error
            better = error < best
            best, sc, mn = (torch.where(better, a, b) for a, b in ((error, best), (sc1, sc), (mn1, mn)))
        sums = _sums(x, h, sc * S, mn * M)
    return sc, mn, nearest(x, sc * S, mn * M)


def _code(values: Tensor, over: Tensor) -> Tensor:
    return (values * _inverse(over)).clamp_(0, CODES).round_()


def _inverse(x: Tensor) -> Tensor:
    """1 / x; 0 where x is not above 0."""
    return torch.where(x > 0, 1 / torch.where(x > 0, x, 1), 0)


def _sums(x: Tensor, h: Tensor, s: Tensor, m: Tensor) -> _Sums:
    q = nearest(x, s, m)
    hq = q * h
    off = (s[..., None] * q).sub_(m[..., None]).sub_(x)
    return _Sums((x * h).sum(-1), hq.sum(-1), (hq * q).sum(-1), (hq * x).sum(-1), off.square_().mul_(h).sum(-1))


def _fit(sums: _Sums, h: Tensor, s: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """The s and m of the least squares for these q, with m >= 0; as they were where all q are one number."""
    total = h.sum(-1)
    det = sums.qq * total - sums.q * sums.q
    over = _inverse(det)
    s1, m1 = (sums.qw * total - sums.q * sums.w) * over, (sums.q * sums.qw - sums.qq * sums.w) * over
    s1, m1 = torch.where(m1 < 0, sums.qw * _inverse(sums.qq), s1), m1.clamp(min=0)
    good = (det > 0) & (s1 > 0)
    return torch.where(good, s1, s), torch.where(good, m1, m)
