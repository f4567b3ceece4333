"""One layer's keys and values: a rolling buffer, and how numbers are kept in it.

Position i of a sequence lives in slot i % C. What is stored of a key depends on the buffer: the number itself, rounded
to the storage's dtype; in float16, unless one does not fit; or whole numbers of 8 bits with a scale. Knows nothing
about masks or lengths.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mistral.plan import Plan, Run, Tile
from mistral.window import block_for, slots_for

log = logging.getLogger("mistral")
INT8_MOST = 127  # of a number in an Int8Buffer: its scale is that of the largest
LEAST_SCALE = 1e-30  # what a vector is divided by at least: one of zeros has a scale of 0


class RollingBuffer:
    """Keys and values in a floating-point dtype: two zeroed [B, C, K, D] tensors, position i in slot i % C.

    It holds numbers, not their history: gradients do not flow through it (train without a cache).

    Args:
        window: W, or None to keep every key.
        rows: B, the number of sequences.
        n_kv_heads, head_dim: K and D.
        device, dtype: of the storage.
    """

    names: ClassVar[tuple[str, ...]] = ("k", "v")  # of the tensors of its storage, each [B, C, K, ...]

    def __init__(
        self,
        window: int | None,
        rows: int,
        n_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.window = window
        self.block = block_for(window)
        self.written = False  # by a step that has not been committed
        self.k = torch.zeros(rows, 0, n_kv_heads, head_dim, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)

    @property
    def storage(self) -> list[Tensor]:
        """All tensors that it keeps, in the order of `names`."""
        return [getattr(self, name) for name in self.names]

    @property
    def capacity(self) -> int:
        """C, the slots of a sequence."""
        return self.k.shape[1]

    def capacity_for(self, length: int) -> int:
        """Slots that a sequence of `length` positions needs: all of them, or enough to roll."""
        return slots_for(self.window, length)

    def holds(self, length: int, now: int, origin: int) -> bool:
        """Whether a sequence that had reached `now` at most still has all that a token at `length` sees."""
        first = origin if self.window is None else max(origin, length - self.window + 1)
        # Slots whose newer position is forgotten are taken to hold the one before it, C earlier: out of the window.
        return now - first <= self.capacity

    @torch.inference_mode(False)  # storage outlives the block it was made in, and may be used outside
    @torch.no_grad()
    def grow(self, capacity: int, starts: Sequence[int], origins: Sequence[int]) -> None:
        """Move to `capacity` slots of a row for each start; every position still held keeps its key."""
        old, rows = self.k.shape[1], self.k.shape[0]
        for name, storage in zip(self.names, self.storage, strict=True):
            wider = storage.new_zeros(len(starts), capacity, *storage.shape[2:])
            for row, (start, origin) in enumerate(zip(starts[:rows], origins[:rows], strict=True)):
                held = torch.arange(max(origin, start - old), start, device=storage.device)
                wider[row, held % capacity] = storage[row, held % old] if old else storage[row]
            setattr(self, name, wider)

    def tile(self, plan: Plan, run: Run, start: int, stop: int) -> Tile:
        q_pos = run.pick(plan.device_positions)[:, start:stop]
        last = q_pos[:, -1:]
        rows = range(run.rows.start, run.rows.stop)
        end = max(plan.starts[row] for row in rows) + stop
        # Read only slots in use; a sequence that began further on may be anywhere in the buffer.
        used = min(end, self.capacity)
        # Slot s holds the newest position p up to the last one written with p % C = s; below 0 there is none.
        k_pos = last - (last - torch.arange(used, device=last.device)) % self.capacity
        k_pos = torch.where(k_pos >= plan.device_origins[run.rows, None], k_pos, -1)
        return Tile(run, start, stop, q_pos, k_pos, q_pos % self.capacity)

    def extend(self, tile: Tile, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.written = True
        rows = tile.run.rows
        row = torch.arange(rows.start, rows.stop, device=k.device)[:, None]
        new = self.encode(*(x[:, tile.start : tile.stop].detach() for x in (k, v)))
        for storage, stored in zip(self.storage, new, strict=True):
            storage[row, tile.slots] = stored
        used = tile.k_pos.shape[1]
        return self.decode([storage[rows, :used] for storage in self.storage], k.dtype)

    def encode(self, k: Tensor, v: Tensor) -> list[Tensor]:
        """What each tensor of the storage keeps of keys and values [.., K, D]."""
        return [k.to(self.k.dtype), v.to(self.v.dtype)]

    def decode(self, stored: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values [.., K, D] that parts of the storage mean; attention casts them to what it computes in.

        Args:
            stored: a part of each tensor, in the order of `names`.
            dtype: that attention computes in.
        """
        k, v = stored
        return k, v


class HalfBuffer(RollingBuffer):
    """Keys and values in float16, which has numbers up to 65,504: where one is larger, all move to float32.

    What was held is the same afterwards, bit for bit. A key that is infinite by itself stays so.
    """

    def encode(self, k: Tensor, v: Tensor) -> list[Tensor]:
        stored = super().encode(k, v)
        if self.k.dtype == torch.float16 and k.dtype != torch.float16 and _overflowed((k, v), stored):
            self.widen()
            return super().encode(k, v)
        return stored

    @torch.inference_mode(False)
    @torch.no_grad()
    def widen(self) -> None:
        """Move to float32, and log it."""
        log.warning("keys or values of a layer exceed 65,504, the most of float16: its cache moves to float32")
        self.k, self.v = self.k.float(), self.v.float()


def _overflowed(given: Sequence[Tensor], stored: Sequence[Tensor]) -> bool:
    return any(
        bool(s.isinf().any()) and not torch.equal(s.isinf(), x.isinf()) for x, s in zip(given, stored, strict=True)
    )


class Int8Buffer(RollingBuffer):
    """Keys and values as whole numbers of 8 bits, with an fp32 scale for each head and position.

    A vector of D numbers x is kept as round(x / s), where s is its largest magnitude over 127. What is not finite makes
    the whole vector NaN.
    """

    names = ("k", "v", "k_scale", "v_scale")

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.k_scale = torch.zeros(self.k.shape[:-1], device=self.k.device)
        self.v_scale = torch.zeros_like(self.k_scale)

    def encode(self, k: Tensor, v: Tensor) -> list[Tensor]:
        (k, k_scale), (v, v_scale) = to_int8(k), to_int8(v)
        return [k, v, k_scale, v_scale]

    def decode(self, stored: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k, v, k_scale, v_scale = stored
        return (k * k_scale[..., None]).to(dtype), (v * v_scale[..., None]).to(dtype)


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """[.., D] as int8 and a scale [..] in fp32: see `Int8Buffer`."""
    wide = x.float()
    scale = wide.abs().amax(-1) / INT8_MOST
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    q = (wide / scale.clamp(min=LEAST_SCALE)[..., None]).round()
    return q.nan_to_num(nan=0.0).to(torch.int8), scale


BUFFERS: dict[torch.dtype, type[RollingBuffer]] = {torch.float16: HalfBuffer, torch.int8: Int8Buffer}


def buffer_for(dtype: torch.dtype) -> type[RollingBuffer]:
    """The kind of buffer that keeps numbers in a dtype."""
    return BUFFERS.get(dtype, RollingBuffer)
