"""Long measurements that go on in another process: one file of state, replaced as a whole, and what a cache holds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from mistral.cache import RollingBufferCache
from mistral.util.errors import FormatError
from mistral.util.files import write_atomic

BLOCK = 10_000  # tokens between two measurements


def resident() -> int:
    """Bytes of memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Log:
    """Memory and CPU time at every BLOCK tokens.

    Args:
        held: what `to_hold` gave in the process that is gone on from.
    """

    def __init__(self, block: int = BLOCK, held: dict[str, Any] | None = None) -> None:
        held = held or {"points": [], "spent": 0.0, "at": 0, "sitting": 0}
        self.block, self.points = block, list[dict[str, float]](held["points"])
        self.sitting, self._spent = held["sitting"] + 1, held["spent"]
        self._began = time.process_time()
        self.resume(held["at"])

    def resume(self, tokens: int) -> None:
        """Measure from here on."""
        self._cpu, self._at = time.process_time(), tokens

    def at(self, tokens: int) -> bool:
        """Told after every token; returns whether this was a time to measure."""
        if tokens // self.block <= self._at // self.block:
            return False
        rate = (tokens - self._at) / max(time.process_time() - self._cpu, 1e-9)
        self.points.append({"tokens": tokens, "rate": rate, "bytes": resident(), "sitting": self.sitting})
        self.resume(tokens)
        return True

    def skip(self, seconds: float) -> None:
        """Leave CPU seconds out that were spent on something else."""
        self._cpu += seconds

    @property
    def spent(self) -> float:
        """CPU seconds of all processes so far."""
        return float(self._spent + time.process_time() - self._began)

    def to_hold(self) -> dict[str, Any]:
        """What another process goes on from."""
        return {"points": self.points, "spent": self.spent, "at": self._at, "sitting": self.sitting}


class State:
    """What a run needs to go on. Numbers, texts and tensors: reading it executes nothing.

    Args:
        path: the file; None keeps nothing.
        asked: what was asked for; a file of another run is refused.

    Attributes:
        held: what the file holds; empty if there is none yet.

    Raises:
        FormatError: a file that is none of this run.
    """

    def __init__(self, path: str | None = None, asked: dict[str, Any] | None = None) -> None:
        self.path, self.asked, self.held = path, asked or {}, dict[str, Any]()
        if path is None or not Path(path).exists():
            return
        try:
            self.held = torch.load(path, weights_only=True)
            before = self.held["asked"]
        except Exception:
            raise FormatError(f"{path} is there and holds no state of a run: give another --state") from None
        for name, value in self.asked.items():
            if before.get(name) != value:
                raise FormatError(
                    f"{path} is of a run with {name} {before.get(name)}, and this one has {value}: give another --state"
                )

    def save(self, held: dict[str, Any]) -> None:
        """Replace the file, if there is to be one."""
        if self.path is not None:
            with write_atomic(self.path) as beside:
                torch.save({"asked": self.asked, **held}, beside)


def of_row(cache: RollingBufferCache, row: int) -> dict[str, Any]:
    """The sequence of a row, that began at 0: its length, keys and values."""
    layers = [(layer.k[row].clone(), layer.v[row].clone()) for layer in cache.layers]
    return {"length": cache.lengths[row], "layers": layers}


def put_row(cache: RollingBufferCache, row: int, held: dict[str, Any]) -> None:
    """Have a row hold the sequence that `of_row` gave, in a cache that was made with as many `positions`."""
    cache.reset(row, position=held["length"])
    cache.origins[row] = 0
    for layer, (k, v) in zip(cache.layers, held["layers"], strict=True):
        # Slots are positions until a buffer has rolled, and one that has rolled has all the slots it will ever have.
        used = min(held["length"], layer.capacity)
        layer.k[row, :used], layer.v[row, :used] = k[:used], v[:used]
