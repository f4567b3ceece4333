"""Rotary position embedding (RoFormer, arXiv 2104.09864): angles for the positions asked for, and the rotation.

Real arithmetic only (no complex tensors, so it runs on every device), and no table: there is
no largest position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mistral.args import ModelArgs, Yarn

# Of positions: cosines and sines [T, D/2], and the factor of queries, [T, 1] or [1, 1].
Angles = tuple[Tensor, Tensor, Tensor]


def inverse_frequencies(head_dim: int, theta: float) -> Tensor:
    """theta ** (-2i / D) for i < D/2: [D/2] fp32 on the CPU.

    This spelling is the released models' own, bit for bit; others differ in the last bit, which
    at position 130,000 moves a cosine by 8e-3.
    """
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)


def yarn_ramp(head_dim: int, theta: float, yarn: Yarn) -> Tensor:
    """How much of each pair's frequency is slowed down, 0 (none) to 1 (all): [D/2] fp32 on the CPU."""

    def turns(times: float) -> float:
        """The pair, as a fraction of 2i, that turns so many times within the original length."""
        return head_dim * math.log(yarn.original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = math.floor(turns(yarn.beta_fast)), math.ceil(turns(yarn.beta_slow))
    low, high = (min(max(pair, 0), head_dim - 1) for pair in (first, last))
    width = high - low or 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    return ((pairs - low) / width).clamp(0, 1)


def yarn_frequencies(head_dim: int, theta: float, yarn: Yarn) -> Tensor:
    """Frequencies of which slow ones are divided by the factor: [D/2] fp32 on the CPU."""
    kept = inverse_frequencies(head_dim, theta)
    slowed = 1.0 / (yarn.factor * theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim))
    ramp = yarn_ramp(head_dim, theta, yarn)
    return slowed * ramp + kept * (1 - ramp)


class Rope:
    """By which angle each pair of a head turns at a position. The one place that knows theta.

    Args:
        args: the shape.

    Attributes:
        frequencies: [D/2] fp32 on the CPU, radians per position. No buffer: no cast of a model may round them.
        scale: factor of cosines and sines, 1.0 but for YaRN.
        theta, yarn: what the frequencies are made of.
        query_scaling: how queries grow with their position; None: they do not.
    """

    def __init__(self, args: ModelArgs) -> None:
        self.theta, self.query_scaling = args.rope_theta, args.llama_4_scaling
        yarn = self.yarn = args.yarn
        if yarn is None:
            self.frequencies = inverse_frequencies(args.head_dim, args.rope_theta)
        else:
            self.frequencies = yarn_frequencies(args.head_dim, args.rope_theta, yarn)
        self.scale = 1.0 if yarn is None else yarn.attention_factor

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of position x frequency, times scale: two [T, D/2] fp32 tensors on the CPU.

        Args:
            positions: [T] absolute positions, int64, on the CPU (devices differ in the last bits).
        """
        angles = torch.outer(positions.float(), self.frequencies)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.scale == 1.0 else (cos * self.scale, sin * self.scale)

    def query_scale(self, positions: Tensor) -> Tensor:
        """Factor of queries, and of no key, at positions [T] on the CPU: [T, 1] fp32; a single 1 where none grows."""
        if self.query_scaling is None:
            return torch.ones(1, 1)
        lengths = positions // self.query_scaling.original_length  # whole ones that lie behind
        return (1 + self.query_scaling.beta * torch.log(1 + lengths.float()))[:, None]

    def angles(self, positions: Tensor) -> Angles:
        """All that a layer wants to know of positions [T] on the CPU."""
        return *self.cos_sin(positions), self.query_scale(positions)


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
