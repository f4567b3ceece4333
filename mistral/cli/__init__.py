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
    except Exception as error:
        if _interrupted(error):
            return 130
        raise


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: a library written in C that it meets while it is imported says ImportError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
