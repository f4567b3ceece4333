"""The facts of one step: which rows contribute how many tokens, where they lie, and what attention asks of a store.

Made once from host ints and shared by all layers. Knows nothing about weights, masks, or where keys are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Adjacent sequences that contribute equally many tokens to a step: a rectangle.

    Args:
        rows: the sequences, as a slice of the batch.
        tokens: where their tokens lie in the packed step.
        n: tokens each of them contributes, at least 1.
    """

    rows: slice
    tokens: slice
    n: int

    def pick(self, x: Tensor) -> Tensor:
        """The run's part of a packed tensor: [T, ...] to [R, n, ...], a view."""
        return x[self.tokens].unflatten(0, (-1, self.n))


@dataclass(frozen=True)
class Plan:
    """The facts of one step, made once from host ints and shared by all layers.

    Args:
        seqlens: new tokens of each sequence; may be 0.
        starts: absolute position of each sequence's first new token.
        origins: absolute position at which each sequence began (0 unless it was started further on).
        positions: [T] absolute positions of the packed tokens, int64, on the CPU.
        device_positions: the same on the model's device.
        device_origins: [B] int64, on the model's device.
        runs: the sequences that contribute tokens, grouped.
        prompts: the sequences whose tokens are a prompt that is only to be continued: nobody asked for its numbers,
            and a model that was loaded for it may round them (see `fast.prompt`).
        memo: what an attention backend derived from these facts, kept for the next layer.
    """

    seqlens: tuple[int, ...]
    starts: tuple[int, ...]
    origins: tuple[int, ...]
    positions: Tensor
    device_positions: Tensor
    device_origins: Tensor
    runs: tuple[Run, ...]
    prompts: frozenset[int] = frozenset()
    memo: dict[Any, Any] = field(default_factory=dict, compare=False)


def make_plan(
    seqlens: Sequence[int], starts: Sequence[int], origins: Sequence[int], device: torch.device | str
) -> Plan:
    """The plan of a step in which sequence b contributes seqlens[b] tokens from position starts[b] on."""
    runs: list[Run] = []
    row = token = 0
    while row < len(seqlens):
        n, first = seqlens[row], row
        while row < len(seqlens) and seqlens[row] == n:
            row += 1
        if n:
            count = n * (row - first)
            runs.append(Run(slice(first, row), slice(token, token + count), n))
            token += count
    spans = [torch.arange(start, start + n, device="cpu") for n, start in zip(seqlens, starts, strict=True)]
    positions = torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64, device="cpu")
    return Plan(
        seqlens=tuple(seqlens),
        starts=tuple(starts),
        origins=tuple(origins),
        positions=positions,
        device_positions=positions.to(device),
        device_origins=torch.tensor(origins, dtype=torch.int64, device=device),
        runs=tuple(runs),
    )


@dataclass(frozen=True)
class Tile:
    """Up to `block` tokens of each sequence of a run, and the keys their queries look at.

    Args:
        run: the run it belongs to.
        start, stop: which of the run's n tokens.
        q_pos: [R, stop - start] absolute positions of the queries.
        k_pos: [R, S] absolute position of every key offered, in the order offered; -1 where empty.
        slots: [R, stop - start] where the new keys are written; [R, 0] without a cache.
    """

    run: Run
    start: int
    stop: int
    q_pos: Tensor
    k_pos: Tensor
    slots: Tensor


class LayerStore(Protocol):
    """What attention needs of a place for keys: one layer's."""

    window: int | None
    capacity: int
    block: int

    def tile(self, plan: Plan, run: Run, start: int, stop: int) -> Tile:
        """Where the tokens start..stop of each sequence of `run` go and what they look at."""

    def extend(self, tile: Tile, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a tile of the run's new k, v [R, n, K, D]; return the keys and values to look at, [R, S, K, D]."""
