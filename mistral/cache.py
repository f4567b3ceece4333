"""Where keys and values of a batch are: a buffer for each layer, and the plan of a step.

A step is `plan = cache.plan(seqlens)`, the layers (which write through `LayerStore.extend`), and
`cache.commit(plan)`. Lengths are host ints and move only in commit. Knows nothing about weights,
masks or what the step is for.

Position i of a sequence lives in slot i % C. A step is written in tiles of at most `block`
tokens, each read before the next is written; with C = W + block - 1 slots no write touches a key
that the tile's queries still see, so nothing is ever copied aside, rotated back or concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mistral.args import CACHE_BYTES, LARGEST, ModelArgs
from mistral.buffers import RollingBuffer, buffer_for
from mistral.plan import LayerStore, Plan, Run, Tile, make_plan
from mistral.util import memory
from mistral.util.arguments import require_integer, require_kind
from mistral.util.errors import UsageError, short_repr
from mistral.window import block_for

MOST_ROWS = 1 << 20  # of a cache: nothing computes so many sequences in a step
GROWTH = 256  # capacity that nobody reserved grows to the next power of two, from here


class CacheError(UsageError):
    """A step or a reset that the cache cannot take; nothing was written."""


class StepKeys:
    """No cache: a tile looks at the keys of its own step, and nothing is kept. Differentiable."""

    capacity = 0

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.block = block_for(window)

    def _first(self, start: int) -> int:
        return 0 if self.window is None else max(0, start - self.window + 1)

    def tile(self, plan: Plan, run: Run, start: int, stop: int) -> Tile:
        positions = run.pick(plan.device_positions)
        seen = positions[:, self._first(start) : stop]
        return Tile(run, start, stop, positions[:, start:stop], seen, slots=positions[:, :0])

    def extend(self, tile: Tile, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        span = slice(self._first(tile.start), tile.stop)
        return k[:, span], v[:, span]


class NoCache:
    """The plan and stores of a forward without a cache: every sequence begins and ends in it."""

    def __init__(self, args: ModelArgs, device: torch.device | str) -> None:
        self.device = device
        self._stores = {window: StepKeys(window) for window in set(args.windows)}
        self._windows = args.windows

    def layer(self, i: int) -> LayerStore:
        return self._stores[self._windows[i]]

    def plan(self, seqlens: Sequence[int]) -> Plan:
        zeros = [0] * len(seqlens)
        return make_plan(seqlens, zeros, zeros, self.device)

    def commit(self, plan: Plan) -> None:
        """Nothing is kept."""


class RollingBufferCache:
    """Keys and values of a batch of sequences, for all layers (Mistral 7B, section 2, "rolling buffer").

    Args:
        args: the model's shape; each layer's window is its own.
        rows: B, sequences held.
        device, dtype: of the storage; float16 and int8 have a kind of buffer of their own, see `buffers`.
        positions: positions each sequence is expected to reach; storage for them is allocated at
            once. Sequences may grow past it: the storage then moves to a larger one.

    Raises:
        CacheError: a size, dtype or device that cannot be.
        OutOfMemory: so many positions do not fit.
    """

    def __init__(
        self,
        args: ModelArgs,
        rows: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        positions: int = 0,
    ) -> None:
        _check_new(args, rows, positions, device, dtype)
        self.device = device
        self.lengths = [0] * rows  # positions each sequence has reached; the next token's position
        self.origins = [0] * rows
        self._reached = [0] * rows  # positions written, also those that were rewound: they took others' slots
        kind = buffer_for(dtype)
        self.layers = [kind(w, rows, args.n_kv_heads, args.head_dim, device, dtype) for w in args.windows]
        for layer in self.layers:
            layer.grow(layer.capacity_for(positions), self.lengths, self.origins)

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(storage.nbytes for layer in self.layers for storage in layer.storage)

    def layer(self, i: int) -> RollingBuffer:
        """The store of layer i."""
        return self.layers[i]

    def check_shape(self, args: ModelArgs, device: torch.device) -> None:
        """Refuse a model of another shape or device. Its windows may differ: those of the cache are used.

        Raises:
            CacheError: its layers, key heads, their width or its device are others.
        """
        k = self.layers[0].k
        mine, its = (len(self.layers), *k.shape[2:]), (args.n_layers, args.n_kv_heads, args.head_dim)
        if mine != its:
            shapes = (f"{layers} layers of {heads} key heads of {dim}" for layers, heads, dim in (mine, its))
            raise CacheError(f"the cache is of {next(shapes)}, the model of {next(shapes)}: use model.make_cache(rows)")
        if k.device != device:
            raise CacheError(f"the cache is on {k.device}, and the model on {device}: use model.make_cache(rows)")

    def grow(self, rows: int, positions: int) -> None:
        """Make room for `rows` sequences of up to `positions`; what is held stays, and nothing shrinks.

        Raises:
            CacheError: a number that cannot be.
        """
        require_integer("rows", rows, 0, MOST_ROWS, error=CacheError)
        require_integer("positions", positions, 0, LARGEST, error=CacheError)
        for counts in (self.lengths, self.origins, self._reached):
            counts += [0] * (rows - len(counts))
        for layer in self.layers:
            layer.grow(max(layer.capacity, layer.capacity_for(positions)), self.lengths, self.origins)

    def reset(self, row: int | None = None, position: int = 0) -> None:
        """Forget a sequence (all of them if row is None); the next one begins at `position`.

        Raises:
            CacheError: there is no such row, or position is negative.
        """
        if row is not None:
            self._check_row(row)
        require_integer("position", position, 0, error=CacheError)
        if row is None:
            self._settle()
        for r in range(len(self.lengths)) if row is None else [row]:
            self.lengths[r] = self.origins[r] = self._reached[r] = position

    @torch.no_grad()
    def copy(self, source: int, target: int) -> None:
        """Have row `target` hold the sequence of row `source`, to go on from it in another way.

        Raises:
            CacheError: there is no such row, or the last step was broken off.
        """
        self._check_row(source)
        self._check_row(target)
        if any(layer.written for layer in self.layers):
            raise CacheError("the last step on this cache did not finish, and its keys are lost: reset() it")
        for layer in self.layers:
            used = min(self._reached[source] - self.origins[source], layer.capacity)
            # A sequence that began further on may be anywhere in the buffer.
            slots = slice(None) if self.origins[source] else slice(0, used)
            for storage in layer.storage:
                storage[target, slots] = storage[source, slots]
        for counts in (self.lengths, self.origins, self._reached):
            counts[target] = counts[source]

    @torch.no_grad()
    def wipe(self, row: int) -> None:
        """Forget a sequence and zero its storage: a NaN or infinity left in it would harm the next one even unseen."""
        self.reset(row)
        for layer in self.layers:
            for storage in layer.storage:
                storage[row] = 0

    def rewind(self, row: int, length: int) -> int:
        """Forget a sequence's newest positions, to go on from an earlier one; return the length that is left.

        A layer that has rolled holds C positions, of which the next token wants W - 1: it goes back C - W + 1,
        that is block, from the furthest position that was ever reached, and no further. Where `length` is out of
        reach in any layer, or the last step was broken off, the sequence (then: every sequence) is forgotten as a
        whole, back to its origin.

        Raises:
            CacheError: there is no such row, or its sequence does not reach from its origin to `length`.
        """
        self._check_row(row)
        require_integer("length", length, 0, error=CacheError)
        origin, now = self.origins[row], self.lengths[row]
        if not origin <= length <= now:
            raise CacheError(f"row {row} holds positions {origin} to {now}; it cannot be rewound to {length}")
        if any(layer.written for layer in self.layers):
            self.lengths, self._reached = list(self.origins), list(self.origins)
            self._settle()
        elif all(layer.holds(length, max(now, self._reached[row]), origin) for layer in self.layers):
            self.lengths[row] = length
        else:
            self.lengths[row] = self._reached[row] = origin
        return self.lengths[row]

    def plan(self, seqlens: Sequence[int]) -> Plan:
        """The plan of a step that contributes seqlens[b] new tokens (0 or more) to sequence b.

        Storage that is too small grows here. Fewer seqlens than rows leave the last rows alone.

        Raises:
            CacheError: more sequences than rows, a negative length, or the last step was broken off, so that
                some layers have taken it in and others have not.
        """
        if any(layer.written for layer in self.layers):
            raise CacheError("the last step on this cache did not finish, and its keys are lost: reset() it")
        if len(seqlens) > len(self.lengths):
            raise CacheError(f"{len(seqlens)} sequences for a cache of {len(self.lengths)} rows; make a larger cache")
        if any(n < 0 for n in seqlens):
            raise CacheError(f"negative sequence length in {list(seqlens)}")
        counts = [*seqlens, *[0] * (len(self.lengths) - len(seqlens))]
        longest = max(start + n - origin for start, n, origin in zip(self.lengths, counts, self.origins, strict=True))
        for layer in self.layers:
            if layer.capacity < layer.capacity_for(longest):
                roomy = max(GROWTH, 1 << (longest - 1).bit_length())
                layer.grow(layer.capacity_for(roomy), self.lengths, self.origins)
        return make_plan(counts, self.lengths, self.origins, self.device)

    def commit(self, plan: Plan) -> None:
        """Advance the lengths by a step that every layer has processed."""
        self._settle()
        for row, n in enumerate(plan.seqlens):
            self.lengths[row] += n
            self._reached[row] = max(self._reached[row], self.lengths[row])

    def _settle(self) -> None:
        for layer in self.layers:
            layer.written = False

    def _check_row(self, row: object) -> None:
        if not isinstance(row, int) or not 0 <= row < len(self.lengths):
            raise CacheError(f"no row {short_repr(row)} in a cache of {len(self.lengths)} rows")


def _check_new(args: ModelArgs, rows: int, positions: int, device: torch.device | str, dtype: torch.dtype) -> None:
    require_kind("args", args, ModelArgs, error=CacheError)
    require_integer("rows", rows, 1, MOST_ROWS, error=CacheError)
    require_integer("positions", positions, 0, LARGEST, error=CacheError)
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, torch.dtype) or name not in CACHE_BYTES:
        raise CacheError(
            f"dtype is {short_repr(dtype)}; it must be torch.float32 or another of {', '.join(CACHE_BYTES)}"
        )
    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, TypeError, AssertionError, NotImplementedError):
        raise CacheError(
            f"device is {short_repr(device)}, which this machine or PyTorch has not: use model.device"
        ) from None
    if positions:
        needed = rows * args.cache_bytes(positions, name)
        memory.require(needed, device, f"{rows} rows of {positions} positions", "ask for fewer, or for another dtype")
