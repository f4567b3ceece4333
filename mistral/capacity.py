"""How large a cache is: slots of a layer, bytes of a sequence. Arithmetic on a shape, without PyTorch.

A rolling buffer has C = W + block - 1 slots, so that a tile of `block` tokens never overwrites a key
that one of its own queries still sees; see cache.py, which holds the tensors.
"""

from __future__ import annotations

from mistral.args import ModelArgs

QUERY_BLOCK = 128  # most tokens a sequence writes before they are attended to


def block_for(window: int | None) -> int:
    """Tokens per tile: QUERY_BLOCK, or W when that is smaller, so that the buffer stays below 2 W."""
    return QUERY_BLOCK if window is None else min(QUERY_BLOCK, window)


def slots_for(window: int | None, length: int) -> int:
    """Slots that a sequence of `length` positions needs in a layer: all of them, or enough to roll."""
    return length if window is None else min(length, window + block_for(window) - 1)


def row_bytes(args: ModelArgs, positions: int, itemsize: int) -> int:
    """Bytes of keys and values of one sequence of `positions`, all layers, in numbers of `itemsize` bytes."""
    slots = sum(slots_for(window, positions) for window in args.windows)
    return 2 * slots * args.n_kv_heads * args.head_dim * itemsize
