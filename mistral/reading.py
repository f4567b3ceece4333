"""Small files, read whole: up to a size that none of them has, for in memory they may take twenty times as much."""

from __future__ import annotations

import errno
from pathlib import Path

MOST = 40_000_000  # bytes; the largest, a tekken.json, has 20 MB


def read_small(path: Path, most: int = MOST) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: it cannot be read, or has more than `most` bytes.
    """
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes, which no such file has", str(path))
    return content
