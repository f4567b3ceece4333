"""Rotary position embedding (RoFormer, arXiv 2104.09864): angles for the positions asked for, and the rotation.

Real arithmetic only (no complex tensors, so it runs on every device), and no table: there is
no largest position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral.args import ModelArgs


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """theta ** (-2i / D) for i < D/2: [D/2] fp32 on the CPU.

    This spelling is the released models' own, bit for bit; others differ in the last bit, which
    at position 130,000 moves a cosine by 8e-3.
    """
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)


class Rope:
    """By which angle each pair of a head turns at a position. The one place that knows theta.

    Args:
        args: the shape.

    Attributes:
        frequencies: [D/2] fp32 on the CPU, radians per position. No buffer: no cast of a model may round them.
        scale: factor of cosines and sines, 1.0 but for scaled positions.
    """

    def __init__(self, args: ModelArgs) -> None:
        self.frequencies = inverse_frequencies(args.head_dim, args.rope_theta)
        self.scale = 1.0

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of position x frequency, times scale: two [T, D/2] fp32 tensors on the CPU.

        Args:
            positions: [T] absolute positions, int64, on the CPU (devices differ in the last bits).
        """
        angles = torch.outer(positions.float(), self.frequencies)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.scale == 1.0 else (cos * self.scale, sin * self.scale)


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
