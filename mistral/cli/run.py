"""One command line, from its words to an exit code."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys

import mistral.util.cores  # noqa: F401  (counts what is busy from here on, so that the first step knows)
from mistral import __version__
from mistral.cli import flags, help, terminal
from mistral.cli.commands import COMMANDS, DISAMBIGUATE, RENAMED
from mistral.util.english import did_you_mean
from mistral.util.errors import ChecksFailed, FormatError, MistralError, UsageError, short_repr


def run(words: list[str]) -> int:
    """Run the command; return the exit code.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    _speak_utf8()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    verbose = False
    try:
        words, common = flags.take_common(words)
        verbose = "verbose" in common
        code = 0
        with terminal.quietly("quiet" in common):
            try:
                _dispatch(words)
            except ChecksFailed as failed:
                code = failed.exit_code
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has gone, as `head` does; nothing more is expected
        terminal.drop(sys.stdout)
        return 0
    except ModuleNotFoundError as error:  # most often the environment that has them is not the one in use
        advice = "what requirements.txt lists is missing in it; use the environment that has it, as .venv/bin/python"
        terminal.echo_error(UsageError(f"{error} in {sys.executable}: {advice}"))
        if verbose:
            _trace(error)
        return 2
    except (ImportError, MemoryError) as error:
        what = str(error) or "out of memory"
        terminal.echo_error(UsageError(f"{what}: too little memory, or an installation that is not whole"))
        if verbose:
            _trace(error)
        return 2
    except (ValueError, OSError) as error:
        told: Exception = error
        if isinstance(error, OSError):  # no permission, a full disk
            told = FormatError(_in_words(error))
            terminal.drop(sys.stdout)
        elif not isinstance(error, MistralError):  # of a library, or a mistake of ours
            told = UsageError(f"{' '.join(str(error).split())} ({type(error).__name__}; --verbose prints where)")
        terminal.echo_error(told)
        if verbose:
            _trace(error)
        return error.exit_code if isinstance(error, MistralError) else 2


def _dispatch(words: list[str]) -> None:
    if not words:
        raise UsageError(f"no command: {', '.join(COMMANDS)}; see --help")
    name, rest = words[0], words[1:]
    if name in ("-h", "--help", "help") and rest:
        name, rest = rest[0], ["--help", *rest[1:]]
    if name in ("-h", "--help", "help"):
        print(help.overview(COMMANDS))
        return
    if name == "--version":
        if rest:
            raise UsageError(f"unexpected argument {rest[0]!r}: --version stands alone")
        print(__version__)
        return
    if name in RENAMED:
        raise UsageError(f"the command {name} is now called {RENAMED[name]}")
    if name not in COMMANDS:
        raise UsageError(f"no command {short_repr(name)}{_instead(name)}")
    command = COMMANDS[name]
    before_prompt = rest[: rest.index("--")] if "--" in rest else rest
    if "--help" in before_prompt or "-h" in before_prompt:
        print(help.of_command(name, command))
        return
    checked = flags.parse(command, rest, DISAMBIGUATE.get(name))
    import fire

    fire.Fire(flags.readable_by_fire(command), command=checked, name=name)


def _instead(name: str) -> str:
    """What the first word was perhaps meant as."""
    if name.startswith("-"):
        return f": the command comes first, and its flags behind it: {', '.join(COMMANDS)}; see --help"
    if os.path.exists(name):
        return "; it is a file or folder here: write a command before it, such as complete, interactive or inspect"
    if any(c.isspace() for c in name):
        return "; a prompt goes behind a command: complete, or see --help"
    return did_you_mean(name, COMMANDS) or f": {', '.join(COMMANDS)}; see --help"


class _Closed(io.TextIOBase):
    """In the place of a stdout that the caller has closed: what is printed would be lost."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "stdout is closed: there is nowhere to print to")


def _speak_utf8() -> None:
    """Read and write UTF-8 whatever the locale: model text has any character, and pipes the same everywhere.

    Names of files may have other bytes, which come out as they are, so that what reads stdout finds the file.
    """
    if sys.stderr is None:  # closed by the caller
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for as long as we run)
    if sys.stdout is None:
        sys.stdout = _Closed()
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            try:
                stream.reconfigure(encoding="utf-8", errors=errors)
            except io.UnsupportedOperation:  # a caller in Python has already read from it
                pass


def _in_words(error: OSError) -> str:
    """What an error of the system means that nobody has put into words: which file it is about.

    Files are written by what names them in its errors; only stdout has no name.
    """
    reason = error.strerror or str(error)
    if error.filename is not None:
        return f"{os.fsdecode(error.filename)} cannot be read or written: {reason}"
    full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    return f"stdout cannot be written: {reason}" if full else reason


def _trace(error: BaseException) -> None:
    import traceback

    for line in "".join(traceback.format_exception(error)).splitlines():
        terminal.echo_err(line)
