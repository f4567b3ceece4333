"""Mistral 7B to read, to run and to check. Start at mistral/model.py.

Importing this package imports nothing else; torch comes with the name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mistral.loader.load import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from mistral.loader.load import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
