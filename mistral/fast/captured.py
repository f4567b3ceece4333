"""Decode steps on a GPU, captured once and replayed: a step is one launch and not a thousand.

What is captured reads and writes tensors at fixed places only. Host ints choose what is replayed, by the number of rows
and a bucket of slots; before that ids, positions and angles are copied to their places. Rows that bring nothing take
part, keep what they hold, and are left out of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mistral.attention import sdpa, tiled
from mistral.cache import NoCache, Plan, RollingBuffer, RollingBufferCache, Run, Tile, make_plan
from mistral.model import Attention, Transformer
from mistral.rope import cos_sin

LEAST = 256  # slots of the smallest bucket
WARM = 3  # runs before a capture, in which libraries set up what a capture must not contain

# A function to one that does again what it did, on what is then at the same places; and its result.
Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


def cuda_graph(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """See `Record`: by a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


@dataclass
class Places:
    """Where a captured step finds what it is about, a row for each sequence of the cache.

    Args:
        ids, positions, origins: [B] int64; a row that brings nothing has the position that comes next.
        active: [B] bool, whether a row brings a token.
        cos, sin: [B, D/2] fp32.
    """

    ids: Tensor
    positions: Tensor
    origins: Tensor
    active: Tensor
    cos: Tensor
    sin: Tensor


class FixedStore:
    """A `LayerStore` over a rolling buffer's storage, for one token a row, which reads its first `used` slots."""

    def __init__(self, buffer: RollingBuffer, places: Places, used: int) -> None:
        self.window, self.capacity, self.block = buffer.window, buffer.capacity, buffer.block
        self._k, self._v = buffer.k, buffer.v
        self._places, self._used = places, min(used, buffer.capacity)

    def tile(self, plan: Plan, run: Run, start: int, stop: int) -> Tile:
        last = self._places.positions[:, None]
        # As in RollingBuffer.tile: slot s holds the newest position p up to the last one with p % C = s.
        k_pos = last - (last - torch.arange(self._used, device=last.device)) % self.capacity
        k_pos = torch.where(k_pos >= self._places.origins[:, None], k_pos, -1)
        return Tile(run, start, stop, last, k_pos, last % self.capacity)

    def extend(self, tile: Tile, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        row = torch.arange(len(self._k), device=self._k.device)[:, None]
        active = self._places.active[:, None, None, None]
        for storage, new in ((self._k, k), (self._v, v)):
            storage[row, tile.slots] = torch.where(active, new.to(storage.dtype), storage[row, tile.slots])
        return self._k[:, : self._used], self._v[:, : self._used]


@dataclass
class _Captured:
    """A step that can be replayed: what it reads, how, and where its hidden states come out, [B, dim]."""

    places: Places
    replay: Callable[[], object]
    hidden: Tensor


# What was captured for a cache, by slots read, and where its storage and the weights were then.
_kept: WeakKeyDictionary[RollingBufferCache, tuple[tuple[int, ...], dict[int, _Captured]]] = WeakKeyDictionary()


class CapturedTransformer(Transformer):
    """`Transformer` whose decode steps on a GPU are captured. What was captured goes when its cache's storage does."""

    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    record: ClassVar[Record] = staticmethod(cuda_graph)

    def step(self, input_ids: Tensor, plan: Plan, cache: RollingBufferCache | NoCache) -> Tensor:
        if not self._is_for_replay(plan, cache):
            return super().step(input_ids, plan, cache)
        assert isinstance(cache, RollingBufferCache)
        step = self._captured(cache, bucket(plan))
        rows = [row for row, n in enumerate(plan.seqlens) if n]
        positions = torch.tensor(plan.starts)
        cos, sin = cos_sin(positions, self._frequencies)
        at, p = torch.tensor(rows).to(self.device), step.places
        p.ids.index_copy_(0, at, input_ids)
        for place, value in ((p.positions, positions), (p.origins, plan.device_origins), (p.cos, cos), (p.sin, sin)):
            place.copy_(value)
        p.active.copy_(torch.tensor([n > 0 for n in plan.seqlens]))
        for layer in cache.layers:
            layer.written = True
        step.replay()
        return step.hidden[at]

    def _is_for_replay(self, plan: Plan, cache: RollingBufferCache | NoCache) -> bool:
        return (
            isinstance(cache, RollingBufferCache)
            and self.device.type in self.devices
            and max(plan.seqlens, default=0) == 1
            and not torch.is_grad_enabled()
        )

    def _captured(self, cache: RollingBufferCache, used: int) -> _Captured:
        """The step for this many slots, captured at its first use."""
        # Storage that grew has moved, and weights may have been replaced: then nothing that was captured is right.
        read = (*(layer.k for layer in cache.layers), *self.parameters(), *self.buffers())
        at = (id(self), *(x.data_ptr() for x in read))
        before, kept = _kept.get(cache, (at, {}))
        if before != at:
            kept = {}
        if used not in kept:
            kept[used] = self._capture(cache, used)
        _kept[cache] = at, kept
        return kept[used]

    def _capture(self, cache: RollingBufferCache, used: int) -> _Captured:
        B, half = len(cache.lengths), self.args.head_dim // 2
        here: dict[str, Any] = {"device": self.device}
        with torch.inference_mode(False):  # they outlive the block they are made in, as the cache's storage does
            places = Places(
                ids=torch.zeros(B, dtype=torch.int64, **here),
                positions=torch.zeros(B, dtype=torch.int64, **here),
                origins=torch.zeros(B, dtype=torch.int64, **here),
                active=torch.zeros(B, dtype=torch.bool, **here),  # nothing is written while it is tried
                cos=torch.ones(B, half, **here),
                sin=torch.zeros(B, half, **here),
            )
        stores = [FixedStore(layer, places, used) for layer in cache.layers]

        def run() -> Tensor:
            # A plan of its own, so that masks are made anew; of it only runs and memo are looked at.
            plan = make_plan([1] * B, [0] * B, [0] * B, self.device)
            h = self.tok_embeddings(places.ids).to(self.dtype)
            for layer, store in zip(self.layers, stores, strict=True):
                h = layer(h, places.cos, places.sin, plan, store)
            return self.norm(h)

        modules = [m for m in self.modules() if isinstance(m, Attention)]
        attends = [module.attend for module in modules]
        for module in modules:
            module.attend = tiled(sdpa)
        try:
            replay, hidden = type(self).record(run)
        finally:
            for module, attend in zip(modules, attends, strict=True):
                module.attend = attend
        return _Captured(places, replay, hidden)


def bucket(plan: Plan) -> int:
    """Slots that a decode step reads: the next power of two of the longest sequence's position."""
    longest = max((start + 1 for start, n in zip(plan.starts, plan.seqlens, strict=True) if n), default=1)
    return max(LEAST, 1 << (longest - 1).bit_length())
