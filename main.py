"""Run a Mistral model from the command line.

python -m main demo
python -m main interactive FOLDER
python -m main complete FOLDER "Once upon a time"
python -m main inspect FOLDER
python -m main --help
"""

from __future__ import annotations

import sys

from mistral.cli import main

TYPE_CHECKING = False  # as `typing` has it, which is not imported here: Ctrl-C is to be handled soon
if TYPE_CHECKING:
    from typing import Any

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
