"""What fits: memory left on a device, container limits honoured, and the refusal when it is too little.

Knows nothing about models; callers say how much they need, for what, and what the user may change.
PyTorch is imported only to ask about a device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mistral.util.errors import MistralError

if TYPE_CHECKING:
    import torch


# What a process that computes with others makes of the bytes that it sees: all of them must decide alike.
agree: Callable[[int | None, torch.device], int | None] | None = None


class OutOfMemory(MistralError):
    """More memory is needed than is left; nothing was allocated."""


def available(device: torch.device | str) -> int | None:
    """Bytes that can still be allocated on a device; None where nobody can say."""
    import torch

    place = torch.device(device)
    left = _available(place)
    return left if agree is None else agree(left, place)


def _available(device: torch.device) -> int | None:
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type == "cpu":
        return available_on_host()
    return None


def available_on_host(root: Path = Path("/")) -> int | None:
    """Bytes left to this process: the machine's, or its control group's where that is less.

    Args:
        root: where /proc and /sys are found (tests give a folder of their own).
    """
    limits = [left for left in (_machine(root), *_control_groups(root)) if left is not None]
    return max(0, min(limits)) if limits else None


def require(needed: int, device: torch.device | str, what: str, advice: str) -> None:
    """Refuse what will not fit, before it is allocated.

    Args:
        needed: bytes.
        what: the subject of the sentence, e.g. "the weights in float32".
        advice: what the user can change.

    Raises:
        OutOfMemory: more is needed than `available`.
    """
    left = available(device)
    if left is not None and needed > left:
        raise OutOfMemory(f"{what} need {as_text(needed)}, but {device} has {as_text(left)} left: {advice}")


def as_text(n: int) -> str:
    """Bytes human-readable: 14.5 GB, 88.0 MB, 2.5 kB, 200 B."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n >= unit:
            return f"{n / unit:.1f} {name}"
    return f"{n} B"


def _machine(root: Path) -> int | None:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        # macOS tells only the total this way; half of it is a fair guess at what is free.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return None


def _control_groups(root: Path) -> list[int]:
    """What each control group above this process, version 1 or 2, leaves to it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            base, limit, used, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, used = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # In a container the path may be the host's; the group's own files are then at the base.
        group = Path(path.strip("/"))
        for folder in (group, *group.parents):
            here = root / base / folder
            try:
                most = int((here / limit).read_text())
                spent = int((here / used).read_text())
            except (OSError, ValueError):  # absent, or "max"
                continue
            left.append(most - spent + _reclaimable(here / "memory.stat", cache))
    return left


def _reclaimable(stat: Path, cache: str) -> int:
    """Cached file pages: they count as used, but are given back on demand."""
    try:
        entries = dict(entry.split() for entry in stat.read_text().splitlines())
        return int(entries.get(cache, 0))
    except (OSError, ValueError):  # the limit holds all the same
        return 0
