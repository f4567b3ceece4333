"""Decode steps on a GPU: layers compiled by PyTorch, a step captured once and replayed as one launch.

What is captured reads and writes tensors at fixed places only. Host ints choose what is replayed, by the number of rows
and a bucket of slots; before that ids, positions and angles are copied to their places. Rows that add nothing take
part, keep what they hold, and are left out of the result. Compiling joins what lies between two products into one
launch; it is done once for all layers, and takes some seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mistral.attention import sdpa
from mistral.buffers import RollingBuffer
from mistral.cache import NoCache, RollingBufferCache
from mistral.fast.known import report, unknown_module
from mistral.model import Attention, Transformer
from mistral.plan import Plan
from mistral.window import visible

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
        ids, positions, origins: [B] int64; a row that contributes nothing has the position that comes next.
        active: [B] bool, whether a row contributes a token.
        cos, sin: [B, D/2] fp32.
    """

    ids: Tensor
    positions: Tensor
    origins: Tensor
    active: Tensor
    cos: Tensor
    sin: Tensor


class FixedStore:
    """A rolling buffer's storage, for one token a row; its first `used` slots are read."""

    def __init__(self, buffer: RollingBuffer, places: Places, used: int) -> None:
        self.window, self.capacity = buffer.window, buffer.capacity
        self.k, self.v = buffer.k, buffer.v
        self.places, self.used = places, min(used, buffer.capacity)
        self.mask = torch.empty(0)  # [B, 1, used], of the step under way

    def seen(self) -> Tensor:
        """What each row's token sees: [B, 1, used] bool."""
        last = self.places.positions[:, None]
        # As in RollingBuffer.tile: slot s holds the newest position p up to the last one with p % C = s.
        k_pos = last - (last - torch.arange(self.used, device=last.device)) % self.capacity
        return visible(last, torch.where(k_pos >= self.places.origins[:, None], k_pos, -1), self.window)


def fixed(q: Tensor, k: Tensor, v: Tensor, store: Any, plan: object) -> Tensor:
    """An `Attend` over a `FixedStore`: the keys of rows that contribute a token are written, then all rows look."""
    row = torch.arange(len(q), device=q.device)
    slots, active = store.places.positions % store.capacity, store.places.active[:, None, None]
    for storage, new in ((store.k, k), (store.v, v)):
        storage[row, slots] = torch.where(active, new.to(storage.dtype), storage[row, slots])
    return sdpa(q[:, None], store.k[:, : store.used], store.v[:, : store.used], store.mask)[:, 0]


def _layer(layer: nn.Module, h: Tensor, cos: Tensor, sin: Tensor, store: FixedStore) -> Tensor:
    return layer(h, cos, sin, None, store)


@contextmanager
def attending_to_fixed_stores(model: nn.Module) -> Iterator[None]:
    """Have a model's layers attend by `fixed`."""
    modules = [m for m in model.modules() if isinstance(m, Attention)]
    attends = [module.attend for module in modules]
    for module in modules:
        module.attend = fixed
    try:
        yield
    finally:
        for module, attend in zip(modules, attends, strict=True):
            module.attend = attend


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """A layer, compiled: once for all of them, and again at most once for each size that turns out to change."""
    return torch.compile(_layer, fullgraph=True)


@dataclass
class _Captured:
    """A step that can be replayed: what it reads, how, and where its hidden states come out, [B, dim]."""

    places: Places
    replay: Callable[[], object]
    hidden: Tensor


# What was captured for a cache, by slots read, and where its storage and the weights were then.
_kept: WeakKeyDictionary[RollingBufferCache, tuple[tuple[int, ...], dict[int, _Captured]]] = WeakKeyDictionary()


class CudaGraphTransformer(Transformer):
    """`Transformer` whose decode steps on a GPU are captured. What was captured goes when its cache's storage does."""

    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    record: ClassVar[Record] = staticmethod(cuda_graph)
    layer: ClassVar[Callable[[], Callable[..., Tensor]]] = staticmethod(compiled)

    def step(self, input_ids: Tensor, plan: Plan, cache: RollingBufferCache | NoCache) -> Tensor:
        if not isinstance(cache, RollingBufferCache) or not self._is_for_replay(plan):
            return super().step(input_ids, plan, cache)
        step = self._captured(cache, bucket(plan))
        if step is None:
            return super().step(input_ids, plan, cache)
        rows = [row for row, n in enumerate(plan.seqlens) if n]
        positions = torch.tensor(plan.starts)
        cos, sin = self.rope.cos_sin(positions)
        at, p = torch.tensor(rows).to(self.device), step.places
        p.ids.index_copy_(0, at, input_ids)
        for place, value in ((p.positions, positions), (p.origins, plan.device_origins), (p.cos, cos), (p.sin, sin)):
            place.copy_(value)
        p.active.copy_(torch.tensor([n > 0 for n in plan.seqlens]))
        for layer in cache.layers:
            layer.written = True
        step.replay()
        return step.hidden[at]

    def _is_for_replay(self, plan: Plan) -> bool:
        return self.device.type in self.devices and max(plan.seqlens, default=0) == 1 and not torch.is_grad_enabled()

    def stands_aside(self) -> str | None:
        """Why no step of this model is captured; None if steps are."""
        module = unknown_module(self)
        return None if module is None else f"the fast path cuda_graph does not know the module {module}"

    def _captured(self, cache: RollingBufferCache, used: int) -> _Captured | None:
        """The step for this many slots, captured at its first use; None for a model that is not to be captured."""
        # Storage that grew has moved, and weights may have been replaced: then nothing that was captured is right.
        read = (*(layer.k for layer in cache.layers), *self.parameters(), *self.buffers())
        at = (id(self), *(x.data_ptr() for x in read))
        before, kept = _kept.get(cache, (at, {}))
        if before != at:
            kept = {}
        if used not in kept:
            if (reason := self.stands_aside()) is not None:
                report(self, reason)
                return None
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
        one = type(self).layer()

        def run() -> Tensor:
            masks: dict[tuple[int | None, int], Tensor] = {}
            h = self.tok_embeddings(places.ids).to(self.dtype)
            with attending_to_fixed_stores(self):
                for layer, store in zip(self.layers, stores, strict=True):
                    kind = store.window, store.capacity
                    if kind not in masks:
                        masks[kind] = store.seen()
                    store.mask = masks[kind]
                    h = one(layer, h, places.cos, places.sin, store)
            return self.norm(h)

        replay, hidden = type(self).record(run)
        return _Captured(places, replay, hidden)


def bucket(plan: Plan) -> int:
    """Slots that a decode step reads: the next power of two of the longest sequence's position."""
    longest = max((start + 1 for start, n in zip(plan.starts, plan.seqlens, strict=True) if n), default=1)
    return max(LEAST, 1 << (longest - 1).bit_length())
