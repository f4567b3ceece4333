"""Memory for weights, in huge pages where the system has them: a gigabyte of small ones is 250,000 look-ups.

A step reads every weight once, from one end to the other, so that nearly each small page is another look-up. Weights
that are mapped from a file stay where they are (formats/mapped_tensors.py).
"""

from __future__ import annotations

import math
import mmap
import threading
from contextlib import suppress

import torch
from torch import Tensor

SMALL = 2**16  # bytes below which a tensor is not worth it
CHUNK = 2**26  # bytes that are mapped together: many a matrix is smaller than a huge page
HUGE = 2**21  # bytes of a huge page on most machines
LINE = 64  # bytes that come from memory together, where tensors begin


class _Chunk:
    """A mapping that tensors take parts of, one after the other; it is given back when none of them is left."""

    def __init__(self, nbytes: int) -> None:
        self.mapping = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a system without huge pages
            self.mapping.madvise(mmap.MADV_HUGEPAGE)
        self.next = -torch.frombuffer(self.mapping, dtype=torch.uint8).data_ptr() % HUGE

    def take(self, nbytes: int, dtype: torch.dtype) -> Tensor | None:
        """The next bytes, as a tensor with a storage of its own; None if there are too few left."""
        first, end = self.next, self.next + nbytes
        if end > len(self.mapping):
            return None
        self.next += -(-nbytes // LINE) * LINE
        return torch.frombuffer(self.mapping, dtype=dtype, offset=first, count=nbytes // dtype.itemsize)


_lock = threading.Lock()
_chunk: _Chunk | None = None


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor for weights on the CPU; what is in it may be anything."""
    global _chunk
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    with _lock:
        found = None if _chunk is None else _chunk.take(nbytes, dtype)
        if found is None:
            _chunk = _Chunk(max(CHUNK, nbytes))
            found = _chunk.take(nbytes, dtype)
    assert found is not None
    return found.view(shape)


def copied(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a weight, rounded to a dtype, in such memory."""
    return empty(tuple(weight.shape), dtype).copy_(weight)
