"""Tensors as mappings of their own part of a file: nothing is copied, and nothing written to them reaches the file.

A mapped tensor's memory is the file's pages in the system's cache, shared with every other program that maps it.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mistral.util.files import regular, stamp_of

if TYPE_CHECKING:
    from torch import Tensor

# Told how many more bytes are in memory. Where it is None, bytes come into memory when somebody looks at them.
Progress = Callable[[int], object] | None

PIECE = 2**26  # bytes brought in between two calls of Progress
POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14: have a range's pages in memory, as if each had been read


@dataclass
class Part:
    """Bytes `begin` to `end` of a file, mapped while any tensor of theirs is alive.

    Adjacent tensors share one part: each mapping keeps the file open once more, and macOS allows 256 open files.

    Args:
        stamp: `files.stamp_of` the file when its header was read; None: it is not compared. Bytes of another file at
            the same places would be numbers too.
    """

    path: Path
    begin: int
    end: int
    stamp: tuple[int, int] | None = None
    _mapping: weakref.ref[mmap.mmap] | None = field(default=None, repr=False)

    def tensor(self, begin: int, end: int, shape: tuple[int, ...], dtype: str, progress: Progress = None) -> Tensor:
        """The tensor at bytes begin to end of the file, on the CPU.

        Raises:
            OSError: the file cannot be read, or is another one than it was.
        """
        import torch

        kind = getattr(torch, dtype)
        if begin == end:
            return torch.empty(shape, dtype=kind)
        mapping, start = self._mapped()
        raw = torch.frombuffer(mapping, dtype=torch.uint8, offset=begin - start, count=end - begin)
        if progress is not None:
            _in_huge_pages(mapping, begin - start, end - start)
            for at in range(begin, end, PIECE):
                stop = min(at + PIECE, end)
                if not _populate(mapping, at - start, stop - start):
                    touch(raw[at - begin : stop - begin])
                progress(stop - at)
        if begin % kind.itemsize:  # a header need not end where a number may begin
            raw = raw.clone()
        return raw.view(kind).view(shape)

    def _mapped(self) -> tuple[mmap.mmap, int]:
        """The mapping, and the byte of the file that it begins with."""
        start = self.begin - self.begin % mmap.ALLOCATIONGRANULARITY
        mapping = self._mapping() if self._mapping is not None else None
        if mapping is None:
            with open(self.path, "rb", opener=regular) as file:
                # A page beyond the end of a file can be mapped, and kills the process that reads it.
                if os.fstat(file.fileno()).st_size < self.end:
                    raise OSError(f"{self.path} has become shorter since its header was read")
                if self.stamp is not None and stamp_of(file.fileno()) != self.stamp:
                    raise OSError(f"{self.path} has been written or replaced since its header was read: try again")
                mapping = mmap.mmap(file.fileno(), self.end - start, access=mmap.ACCESS_COPY, offset=start)
            self._mapping = weakref.ref(mapping)
        return mapping, start


def _in_huge_pages(mapping: mmap.mmap, begin: int, end: int) -> None:
    """Have what is not in memory yet of a range brought there in huge pages, where system and disk can do that."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        page = begin - begin % mmap.PAGESIZE
        with suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE, page, end - page)


def _populate(mapping: mmap.mmap, begin: int, end: int) -> bool:
    """Have the system bring in a range of a mapping; False where it does not offer that."""
    if sys.platform != "linux":
        return False
    page = begin - begin % mmap.PAGESIZE
    try:
        mapping.madvise(POPULATE_READ, page, end - page)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def touch(tensor: Tensor) -> None:
    """Read a byte of every page of a mapped tensor, so that all of them are in memory."""
    import torch

    tensor.flatten().view(torch.uint8)[:: mmap.PAGESIZE].sum()
