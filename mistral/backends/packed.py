"""Attention over packed sequences: what every variable-length kernel needs around it.

A kernel gets the sequences' queries and keys one after the other, in order of position, and
applies the window itself. What lies in the rolling buffer is gathered for it; steps too short to
be worth the gathering are left to the tiles of attention.py. Knows no library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mistral.attention import plain, sdpa, tiled, visible
from mistral.cache import LayerStore, Pack, Plan, Run

# (q_lens, k_lens, window, device) -> the kernel's own description of who sees what; made once a step and
# window. A sequence's last query is at the position of its last key; the window is as in `visible`.
Describe = Callable[[tuple[int, ...], tuple[int, ...], int | None, torch.device], Any]
# (q [T, H, D], k [S, K, D], v [S, K, D], description) -> [T, H, D]
PackedKernel = Callable[[Tensor, Tensor, Tensor, Any], Tensor]

_tiles = tiled(sdpa)


@dataclass(frozen=True)
class _Parts:
    """How a step is divided, for all layers of one window.

    Args:
        packed: tokens of the sequences given to the kernel; all of them as slice(None).
        pack: those sequences' keys.
        description: what the kernel's `Describe` made of them.
        rest: tokens of the other sequences.
        rest_plan: the step, with only their runs.
    """

    packed: Tensor | slice
    pack: Pack
    description: Any
    rest: Tensor
    rest_plan: Plan


def _rows(runs: list[Run]) -> list[int]:
    return [row for run in runs for row in range(run.rows.start, run.rows.stop)]


def _tokens(runs: list[Run], device: torch.device) -> Tensor:
    spans = [torch.arange(run.tokens.start, run.tokens.stop, device="cpu") for run in runs]
    return torch.cat(spans).to(device) if spans else torch.empty(0, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Packed:
    """An `Attend` on a variable-length kernel.

    Args:
        describe: see `Describe`.
        kernel: see `PackedKernel`.
    """

    describe: Describe
    kernel: PackedKernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, store: LayerStore, plan: Plan) -> Tensor:
        parts = self._parts(plan, store)
        if parts is None:
            return _tiles(q, k, v, store, plan)
        keys, values = store.exchange(parts.pack, k[parts.packed], v[parts.packed])
        out = self.kernel(q[parts.packed], keys.to(q.dtype), values.to(q.dtype), parts.description)
        if not parts.rest_plan.runs:
            return out
        whole = torch.empty_like(q)
        whole[parts.packed] = out
        whole[parts.rest] = _tiles(q, k, v, store, parts.rest_plan)
        return whole

    def _parts(self, plan: Plan, store: LayerStore) -> _Parts | None:
        """How to divide the step; None when no sequence goes to the kernel."""
        key = (self, store.window, store.capacity)
        if key not in plan.memo:
            plan.memo[key] = self._divide(plan, store)
        return plan.memo[key]

    def _divide(self, plan: Plan, store: LayerStore) -> _Parts | None:
        def worth(run: Run) -> bool:
            # Up to a tile of tokens reads the buffer in place; gathering it first would cost more than attending.
            return run.n > store.block or all(plan.starts[row] == plan.origins[row] for row in _rows([run]))

        runs = [run for run in plan.runs if worth(run)]
        if not runs:
            return None
        others = [run for run in plan.runs if not worth(run)]
        device = plan.device_positions.device
        pack = store.pack(plan, _rows(runs))
        return _Parts(
            packed=_tokens(runs, device) if others else slice(None),
            pack=pack,
            description=self.describe(pack.q_lens, pack.k_lens, store.window, device),
            rest=_tokens(others, device),
            rest_plan=replace(plan, runs=tuple(others)),
        )

    def prove(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        """Run the kernel once, on 3 queries and 4 keys with W = 2 and two heads a group.

        Raises:
            Exception: whatever the kernel raises where it cannot run.
            ArithmeticError: it ran, and its numbers are wrong.
        """
        random = torch.Generator("cpu").manual_seed(0)
        q, k, v = (
            torch.randn(n, heads, head_dim, generator=random, device="cpu") for n, heads in ((3, 4), (4, 2), (4, 2))
        )
        q, k, v = (x.to(device, dtype) for x in (q, k, v))
        out = self.kernel(q, k, v, self.describe((3,), (4,), 2, q.device))
        mask = visible(torch.arange(1, 4, device=device), torch.arange(4, device=device), 2)
        error = (out - plain(q[None], k[None], v[None], mask[None])[0]).abs().max().item()
        if not error < 0.1:  # one key too many or too few is off by more; NaN fails too
            raise ArithmeticError(f"its result is off by {error:.2g}")
