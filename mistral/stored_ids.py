"""Ids in a file, read as they are asked for: a prompt of ten million takes no more memory than one of ten.

A file is NumPy's `.npy` with one dimension of whole numbers. Nothing in it is executed; knows nothing about models.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.lib import format as npy

from mistral.util.arguments import path_of
from mistral.util.errors import FormatError
from mistral.util.files import reason_of, regular

BLOCK = 1 << 16  # ids read at once where all are asked for, one after the other


class StoredIds(Sequence[int]):
    """The ids of a `.npy` file, as a sequence of ints. The file is opened for each access and must not change.

    Args:
        path: a one-dimensional array of whole numbers, of any size and byte order.

    Raises:
        FormatError: no such file, or not such an array.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path_of("ids", path, FormatError)
        try:
            with open(self.path, "rb", opener=regular) as file:
                version = npy.read_magic(file)
                if version not in ((1, 0), (2, 0)):
                    known = f"version {version[0]}.{version[1]} of the format is not known"
                    raise FormatError(f"{path} cannot be read as a .npy file: {known}")
                read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, _, self._dtype = read(file)
                self._begin = file.tell()
                size = os.fstat(file.fileno()).st_size - self._begin
        except OSError as error:
            raise FormatError(f"{path} cannot be read as a .npy file: {reason_of(error)}") from None
        except FormatError:
            raise
        except ValueError:  # in NumPy's words
            why = "it does not begin as one, or is not complete"
            raise FormatError(f"{path} cannot be read as a .npy file: {why}") from None
        if len(shape) != 1 or self._dtype.kind not in "iu":
            raise FormatError(f"{path} holds {self._dtype} {list(shape)}; it must be one dimension of whole numbers")
        (self._length,) = shape
        if size != self._length * self._dtype.itemsize:
            needed = self._length * self._dtype.itemsize
            raise FormatError(f"{path} has {size:,} bytes of ids, but {needed:,} are needed: it is not complete")

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> list[int]: ...
    def __getitem__(self, at: int | slice) -> int | list[int]:
        if isinstance(at, slice):
            start, stop, step = at.indices(self._length)
            if step == 1:
                return self._read(start, max(0, stop - start))
            return [self[i] for i in range(start, stop, step)]
        place = operator.index(at)
        place += self._length if place < 0 else 0
        if not 0 <= place < self._length:
            raise IndexError(f"no id {at} in a file of {self._length}")
        return self._read(place, 1)[0]

    def __iter__(self) -> Iterator[int]:
        for first in range(0, self._length, BLOCK):
            yield from self[first : first + BLOCK]

    def _read(self, first: int, count: int) -> list[int]:
        # Read, not mapped: pages of a mapping would count as memory of this process.
        with open(self.path, "rb", opener=regular) as file:
            file.seek(self._begin + first * self._dtype.itemsize)
            return np.fromfile(file, self._dtype, count).tolist()

    def __repr__(self) -> str:
        return f"<{self._length:,} ids in {self.path}>"
