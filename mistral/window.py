"""The sliding window: what a query sees, and how many slots of a cache that takes.

`visible` is the one definition of the window. A rolling buffer has C = W + block - 1 slots, so that a tile of
`block` tokens never overwrites a key that one of its own queries still sees (cache.py holds the tensors).
Imported without torch; knows nothing about models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Window = int | None

QUERY_BLOCK = 128  # most tokens a sequence writes before they are attended to


def block_for(window: Window) -> int:
    """Tokens per tile: QUERY_BLOCK, or W when that is smaller, so that the buffer stays below 2 W."""
    return QUERY_BLOCK if window is None else min(QUERY_BLOCK, window)


def slots_for(window: Window, length: int) -> int:
    """Slots that a sequence of `length` positions needs in a layer: all of them, or enough to roll."""
    return length if window is None else min(length, window + block_for(window) - 1)


def visible(q_pos: Tensor, k_pos: Tensor, window: Window) -> Tensor:
    """Which keys each query sees: key k for query q iff 0 <= q - k < window, and k is not empty.

    Args:
        q_pos: [..., n] absolute positions of the queries.
        k_pos: [..., S] absolute positions of the keys, in any order; -1 marks an empty slot.
        window: W keys, the query's own included; None for all before it.

    Returns:
        [..., n, S] bool. With ordered keys its rows sum to 1, 2, .., W, W, ..
    """
    distance = q_pos[..., :, None] - k_pos[..., None, :]
    seen = (distance >= 0) & (k_pos[..., None, :] >= 0)
    return seen if window is None else seen & (distance < window)


def shortest_pattern(windows: tuple[Window, ...]) -> Window | list[Window]:
    """One window if all layers have it, else the shortest list that repeats to these."""
    for n in range(1, len(windows) + 1):
        if len(windows) % n == 0 and windows[:n] * (len(windows) // n) == windows:
            return windows[0] if n == 1 else list(windows[:n])
    raise AssertionError("a list repeats itself")
