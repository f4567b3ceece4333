"""Mistral 7B to read, to run and to check. Start at mistral/model.py.

Importing this package imports nothing else; torch comes with the name that needs it.
"""

from __future__ import annotations

import os

# Spelled out, for type checkers: importing `typing` would take a tenth of the time until Ctrl-C is handled.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mistral.chat.conversation import Chat as Chat
    from mistral.generate import complete as complete
    from mistral.generate import stream as stream
    from mistral.loader.load import load as load
    from mistral.loader.options import LoadOptions as LoadOptions
    from mistral.loader.save import save as save
    from mistral.sampling_params import SamplingParams as SamplingParams
    from mistral.util.errors import FormatError as FormatError
    from mistral.util.errors import MistralError as MistralError
    from mistral.util.errors import Unavailable as Unavailable
    from mistral.util.errors import UsageError as UsageError
    from mistral.util.memory import OutOfMemory as OutOfMemory

__version__ = "0.1.0"

# GCC's OpenMP, which PyTorch brings, has a thread that waits spin for milliseconds before it sleeps. Beside another
# busy program that takes the core from the very thread that all wait for. It reads this when torch is imported.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "20000"  # some 0.1 ms: as long as the waits of a step that nobody disturbs

# Where each public name lives.
_HOMES = {
    "load": "mistral.loader.load",
    "save": "mistral.loader.save",
    "LoadOptions": "mistral.loader.options",
    "SamplingParams": "mistral.sampling_params",
    "Chat": "mistral.chat.conversation",
    "complete": "mistral.generate",
    "stream": "mistral.generate",
    "MistralError": "mistral.util.errors",
    "UsageError": "mistral.util.errors",
    "FormatError": "mistral.util.errors",
    "Unavailable": "mistral.util.errors",
    "OutOfMemory": "mistral.util.memory",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
