"""What is typed and what is shown: lines in, text out as it is made, and the commands of a conversation.

Text goes to stdout, everything else to stderr. Knows nothing about models.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from mistral.util.errors import UsageError

if TYPE_CHECKING:
    from mistral.generate import Piece
    from mistral.loader.load import Loaded


def typed() -> bool:
    """Whether somebody types at stdin. (A process may also have no stdin at all.)"""
    return sys.stdin is not None and sys.stdin.isatty()


def write(text: str) -> None:
    """Text for stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(line: str) -> None:
    """A line for stderr."""
    print(line, file=sys.stderr, flush=True)


def say_error(error: Exception) -> None:
    """One line, whatever is in the names and words that it quotes."""
    say(f"error: {' '.join(str(error).splitlines())}")


def not_utf8(what: str, error: UnicodeDecodeError) -> UsageError:
    """The error for bytes that are no text."""
    byte = error.object[error.start]
    return UsageError(f"{what} is not UTF-8 (byte 0x{byte:02x}): convert it first, for example with iconv")


def lines(ask: str) -> Iterator[str]:
    """Lines of stdin without their ends; on a terminal, asked for, and Ctrl-C only drops the line.

    Raises:
        UsageError: a piped line is not UTF-8.
    """
    if not typed():
        yield from _piped()
        return
    read = _reader(ask)
    while True:
        try:
            yield read()
        except UnicodeDecodeError as error:
            say_error(not_utf8("the line", error))
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n")


def _piped() -> Iterator[str]:
    while line := _piped_line():
        yield line.rstrip("\r\n")


def _piped_line() -> str:
    try:
        return sys.stdin.readline() if sys.stdin else ""
    except UnicodeDecodeError as error:
        raise not_utf8("stdin", error) from None


def _reader(ask: str) -> Callable[[], str]:
    """How to read a typed line: with prompt_toolkit, which edits, remembers and takes pasted lines as one."""
    # Where the answers are being kept, the question is not one of them.
    asked_on = sys.stdout if sys.stdout.isatty() else sys.stderr
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output
        from prompt_toolkit.utils import is_dumb_terminal
    except ImportError:
        return lambda: _plain(ask, asked_on)
    if is_dumb_terminal():
        return lambda: _plain(ask, asked_on)
    session: Any = PromptSession(ask, output=create_output(stdout=asked_on))
    return lambda: str(session.prompt())


def _plain(ask: str, asked_on: Any) -> str:
    try:
        import readline  # noqa: F401  (line editing and history for input())
    except ImportError:
        pass
    if asked_on is sys.stdout:
        return input(ask)
    print(ask, end="", file=asked_on, flush=True)
    return input()


class Bar:
    """Progress through work: shown after two seconds, on stderr, not when that is piped.

    Args:
        what, unit: what is being done, and what it is counted in.
    """

    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit = what, unit
        self._bar: Any = None

    def __call__(self, taken: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=total, initial=taken, desc=self._what, unit=self._unit, delay=2, disable=None, leave=False
            )
        self._bar.update(taken - self._bar.n)
        if taken == total:
            self._bar.close()


class Interrupt:
    """Ctrl-C while an answer is made: the first ends it between two steps, a second one at once.

    One that comes after the last step is raised at the end.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._hit)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        signal.signal(signal.SIGINT, self._before)
        if kind is None:
            self.check()

    def _hit(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def check(self) -> None:
        """End the answer if that was asked for.

        Raises:
            KeyboardInterrupt: it was.
        """
        if self._asked:
            raise KeyboardInterrupt


def show(pieces: Iterable[Piece], echo: str = "", more: Callable[[], str] = str) -> None:
    """Text on stdout as it is made, `echo` first; then how fast, on stderr, also after Ctrl-C.

    Args:
        more: what else to tell at the end.
    """
    began = first = time.perf_counter()
    made, reason, interrupt = 0, "", None
    try:
        write(echo)
        for piece in pieces:
            write(piece.text)
            if piece.token:
                made += 1
                first = first if made > 1 else time.perf_counter()
            reason = piece.finish_reason or reason
    except KeyboardInterrupt as stopped:
        reason, interrupt = "interrupted", stopped
    seconds = time.perf_counter() - first
    write("\n")
    rate = f", {(made - 1) / seconds:.1f} tokens/s" if made > 1 and seconds > 0 else ""
    say(f"[{made} tokens{rate}{f'; first after {first - began:.2f} s' if made else ''}{more()}; {reason}]")
    if interrupt:
        raise interrupt


def text_waits() -> bool:
    """Whether stdin is a file or a pipe that already holds text."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
        if stat.S_ISREG(mode):
            return os.fstat(sys.stdin.fileno()).st_size > 0
        if not stat.S_ISFIFO(mode):
            return False
        import fcntl
        import termios

        waiting = fcntl.ioctl(sys.stdin.fileno(), termios.FIONREAD, bytes(4))
        return int.from_bytes(waiting, sys.byteorder) > 0
    except (AttributeError, ImportError, OSError, ValueError):  # no stdin, or a system that cannot tell
        return False


def stream_one(loaded: Loaded, prompt: Any, echo: str = "", **options: Any) -> None:
    """Continue one prompt on stdout as it is made, `echo` first; then say how fast on stderr, also after Ctrl-C."""
    from mistral.generate import stream

    pieces = stream([prompt], loaded.model, loaded.tokenizer, progress=Bar("prompt", "token"), **options)
    show(pieces, echo)
