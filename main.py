"""Run a Mistral model from the command line.

python -m main demo
python -m main interactive FOLDER
python -m main complete FOLDER "Once upon a time"
python -m main inspect FOLDER
python -m main --help
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mistral.cli import main

if TYPE_CHECKING:
    from mistral.generate import generate

__all__ = ["generate", "main"]


def __getattr__(name: str) -> Any:
    # `from main import generate` works as it always did; --help need not wait for torch.
    if name == "generate":
        from mistral.generate import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(main())
