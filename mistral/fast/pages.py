"""Memory for weights, in huge pages where the system has them: reading a gigabyte in small ones is 250,000 look-ups.

A step reads every weight once, from one end to the other, so that nearly each page is another one for the processor.
Weights that are mapped from a file stay where they are (formats/mapped_tensors.py).
"""

from __future__ import annotations

import math
import mmap
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

SMALL = 2**16  # bytes below which a tensor is not worth it
CHUNK = 2**26  # bytes that are asked for together: many a matrix is smaller than a huge page
HUGE = 2**21  # the size of a huge page on most machines, where chunks begin
LINE = 64  # bytes that come from memory together, where tensors begin


@dataclass
class Chunk:
    """A stretch of memory that tensors take one after the other. It is given back when none of them is left."""

    raw: Tensor
    used: int = 0
    lock: ClassVar[threading.Lock] = threading.Lock()

    def take(self, nbytes: int) -> Tensor | None:
        """The next bytes; None if there are too few left."""
        first, self.used = self.used, self.used + -(-nbytes // LINE) * LINE
        return self.raw[first : first + nbytes] if first + nbytes <= len(self.raw) else None


@dataclass
class Pages:
    """Where the next tensors come from."""

    chunk: Chunk = field(default_factory=lambda: Chunk(torch.empty(0, dtype=torch.uint8)))

    def take(self, nbytes: int) -> Tensor:
        """So many bytes, of whatever value, uint8."""
        with Chunk.lock:
            found = self.chunk.take(nbytes)
            if found is None:
                self.chunk = Chunk(_mapped(max(CHUNK, nbytes)))
                found = self.chunk.take(nbytes)
        assert found is not None
        return found


_pages = Pages()


def _mapped(nbytes: int) -> Tensor:
    """New memory that begins with a huge page, uint8; nothing is taken before it is written to."""
    mapping = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(mapping, dtype=torch.uint8)
    first = -raw.data_ptr() % HUGE
    return raw[first : first + nbytes]


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor for weights on the CPU; what is in it may be anything."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    return _pages.take(nbytes).view(dtype).view(shape)


def copied(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of a weight, rounded to a dtype, in such memory."""
    return empty(tuple(weight.shape), dtype).copy_(weight)
