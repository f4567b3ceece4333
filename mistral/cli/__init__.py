"""The command line: check flags, load, run, print. Text goes to stdout, everything else to stderr.

Exit codes: 0 done, 1 checks failed, 2 a usage error or a broken file (one line names it), 130 interrupted. This file
imports next to nothing, so that Ctrl-C is handled from the first moment on.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as `typing` has it, which is not imported here
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit code."""
    try:
        from mistral.cli.run import run

        return run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        return 130
