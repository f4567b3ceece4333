"""Rotary position embedding: angles for the positions asked for, and the rotation.

Real arithmetic only (no complex tensors, so it runs on every device), and no table: there is
no largest position.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """theta ** (-2i / D) for i < D/2: [D/2] fp32 on the CPU.

    This spelling is the released models' own, bit for bit; others differ in the last bit, which
    at position 130,000 moves a cosine by 8e-3.
    """
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)


def cos_sin(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position x frequency: two [T, D/2] fp32 tensors on the CPU.

    Args:
        positions: [T] absolute positions, int64, on the CPU (devices differ in the last bits).
        frequencies: [D/2] fp32, from `inverse_frequencies`.
    """
    angles = torch.outer(positions.float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each adjacent pair (2i, 2i+1) of every head by its position's angle i.

    Args:
        x: [T, heads, D].
        cos, sin: [T, D/2] fp32, on x's device.

    Returns:
        [T, heads, D] in x's dtype; the arithmetic is in fp32, or float64 if x is.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
