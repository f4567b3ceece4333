"""Files in and out: what a folder holds, from its headers, and folders written. Knows nothing about running a model."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # The door until 0.1, kept for one release: `from mistral import load` is the same.
    if name == "load":
        from mistral import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
