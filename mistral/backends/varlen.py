"""Attention over packed sequences: what every variable-length kernel needs around it.

A kernel gets the sequences' queries and keys one after the other, in order of position, and
applies the window itself. What lies in the rolling buffer is gathered for it; steps too short to
be worth the gathering are left to the tiles of attention.py. Knows no library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mistral.attention import eager, sdpa, tiled
from mistral.buffers import RollingBuffer
from mistral.plan import LayerStore, Plan, Run
from mistral.window import visible

# (q_lens, k_lens, window, device) -> the kernel's own description of who sees what; made once a step and
# window. A sequence's last query is at the position of its last key; the window is as in `visible`.
Describe = Callable[[tuple[int, ...], tuple[int, ...], int | None, torch.device], Any]
# (q [T, H, D], k [S, K, D], v [S, K, D], description) -> [T, H, D]
VarlenKernel = Callable[[Tensor, Tensor, Tensor, Any], Tensor]

_tiles = tiled(sdpa)


@dataclass(frozen=True)
class VarlenKeys:
    """Sequences of a step with every key their queries reach, in order of position and without padding.

    Args:
        q_lens: new tokens of each sequence.
        k_lens: keys of each: the held ones within the window of its first query, then the new ones.
        held: flat slots (row * C + slot) of the held keys, sequence after sequence.
        order: [S] where in (held keys, new keys) each packed key is; None if nothing is held.
        kept: which new keys the storage keeps.
        slots: the flat slots they go to.
    """

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    held: Tensor | None = None
    order: Tensor | None = None
    kept: Tensor | None = None
    slots: Tensor | None = None


def varlen_keys(store: LayerStore, plan: Plan, rows: Sequence[int]) -> VarlenKeys:
    """What the sequences `rows`, each of which contributes tokens, look at when packed."""
    q_lens = tuple(plan.seqlens[row] for row in rows)
    if not isinstance(store, RollingBuffer):
        return VarlenKeys(q_lens, q_lens)
    C = store.capacity
    behind = [plan.starts[row] - plan.origins[row] for row in rows]
    if store.window is not None:
        behind = [min(m, store.window - 1) for m in behind]
    held, order, kept, slots = [], [], [], []
    old, new = 0, 0  # where among the held keys, and among the new ones, the next sequence's own begin
    for row, n, m in zip(rows, q_lens, behind, strict=True):
        start, last = plan.starts[row], min(n, C)
        held.append(row * C + torch.arange(start - m, start, device="cpu") % C)
        order.append(torch.arange(old, old + m, device="cpu"))
        order.append(sum(behind) + torch.arange(new, new + n, device="cpu"))
        kept.append(torch.arange(new + n - last, new + n, device="cpu"))
        slots.append(row * C + torch.arange(start + n - last, start + n, device="cpu") % C)
        old, new = old + m, new + n
    device = plan.device_positions.device
    moved = [torch.cat(x).to(device) for x in (held, order, kept, slots)]
    k_lens = tuple(n + m for n, m in zip(q_lens, behind, strict=True))
    return VarlenKeys(q_lens, k_lens, moved[0], moved[1] if any(behind) else None, moved[2], moved[3])


def exchange(store: LayerStore, pack: VarlenKeys, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Store the packed sequences' new k, v [T, K, D]; return the keys and values to look at, [S, K, D]."""
    if not isinstance(store, RollingBuffer):
        return k, v
    store.written = True
    # Encoded also where it is not read back: numbers must not depend on the chunking.
    encoded = store.encode(k.detach(), v.detach())
    packed = []
    for storage, new in zip(store.storage, encoded, strict=True):
        flat = storage.view(-1, *storage.shape[2:])
        # Read before anything is written: the new keys may land on the held ones.
        packed.append(new if pack.order is None else torch.cat([flat[pack.held], new])[pack.order])
        flat[pack.slots] = new[pack.kept]
    return store.decode(packed, k.dtype)


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
    pack: VarlenKeys
    description: Any
    rest: Tensor
    rest_plan: Plan


def _rows(runs: list[Run]) -> list[int]:
    return [row for run in runs for row in range(run.rows.start, run.rows.stop)]


def _tokens(runs: list[Run], device: torch.device) -> Tensor:
    spans = [torch.arange(run.tokens.start, run.tokens.stop, device="cpu") for run in runs]
    return torch.cat(spans).to(device) if spans else torch.empty(0, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class VarlenAttention:
    """An `Attend` on a variable-length kernel.

    Args:
        describe: see `Describe`.
        kernel: see `VarlenKernel`.
    """

    describe: Describe
    kernel: VarlenKernel

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, store: LayerStore, plan: Plan) -> Tensor:
        parts = self._parts(plan, store)
        if parts is None:
            return _tiles(q, k, v, store, plan)
        keys, values = exchange(store, parts.pack, k[parts.packed], v[parts.packed])
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
        pack = varlen_keys(store, plan, _rows(runs))
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
        error = (out - eager(q[None], k[None], v[None], mask[None])[0]).abs().max().item()
        if not error < 0.1:  # one key too many or too few is off by more; NaN fails too
            raise ArithmeticError(f"its result is off by {error:.2g}")
