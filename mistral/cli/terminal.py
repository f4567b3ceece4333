"""What is typed and what is shown: lines in, text out as it is generated. Knows nothing about models.

Text goes to stdout, everything else to stderr. At a terminal, control characters in either are shown, not obeyed.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral.cli.interrupts import Interrupt
from mistral.cli.pace import Pace, counting_stops, stops
from mistral.cli.parallel import from_first
from mistral.cli.waiting import end_is_waiting
from mistral.cli.wrapping import Wrapped
from mistral.util import progress
from mistral.util.english import counted
from mistral.util.errors import FormatError, UsageError
from mistral.util.files import decode_text, is_wide
from mistral.util.progress import Bar as Bar

if TYPE_CHECKING:
    from mistral.generate import Piece
    from mistral.loader.load import Loaded
    from mistral.sampling_params import SamplingParams
    from mistral.thinking import ThoughtIds

# What a terminal may obey: C0 and C1 controls but for tab and line feed, and what turns the order of letters round.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_RED, _BOLD, _DIM, _PLAIN = "\x1b[31m", "\x1b[1m", "\x1b[2m", "\x1b[0m"
QUOTES = '"""'
_quiet = False


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """While open, `echo_err` prints nothing if `quiet`, and the library logs errors alone."""
    global _quiet
    before, _quiet = _quiet, quiet
    log = logging.getLogger("mistral")
    level = log.level
    if quiet:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        _quiet = before
        log.setLevel(level)


def is_interactive() -> bool:
    """Whether somebody types at stdin. (A process may also have no stdin at all.)"""
    return sys.stdin is not None and sys.stdin.isatty()


def visible(text: str) -> str:
    """Text with its control characters spelled out, as in \\x1b[31m."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


def is_screen(stream: Any) -> bool:
    """Whether it is a terminal that can do more than print one line after the other."""
    return bool(stream.isatty()) and os.environ.get("TERM", "dumb") != "dumb"


def has_colour(stream: Any) -> bool:
    """Whether colours may be used: at a terminal that knows them, unless NO_COLOR is set."""
    return is_screen(stream) and not os.environ.get("NO_COLOR")


def write(text: str) -> None:
    """Text for stdout, at once: byte for byte where it is piped."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def writer(stream: Any = None) -> Callable[[str], None]:
    """How to write one text that comes in pieces, to stdout or another stream: at a terminal, in whole words."""
    to = sys.stdout if stream is None else stream
    lines = Wrapped() if is_screen(to) else None
    stopped = stops()

    def put(text: str) -> None:
        nonlocal stopped
        shown = visible(text) if to.isatty() else text
        if lines is not None and stops() != stopped:
            stopped = stops()
            lines.begin()  # the shell has printed lines of its own
        to.write(shown if lines is None else lines.push(shown, shutil.get_terminal_size().columns))
        to.flush()

    return put


def echo_err(line: str, asked: bool = False) -> None:
    """A line for stderr, unless --quiet was given; one that was asked for all the same."""
    if asked or not _quiet:
        _tell(visible(line))


progress.tell = echo_err


def _tell(line: str, end: str = "\n") -> None:
    """Print on stderr; where nobody can read it, what was asked for goes on all the same."""
    try:
        print(line, end=end, file=sys.stderr, flush=True)
    except OSError:  # a full disk, say
        drop(sys.stderr)


def drop(stream: Any) -> None:
    """Have what is still buffered go nowhere, or Python complains once more at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError:  # not a file, in a test or a notebook
        pass


def echo_error(error: Exception) -> None:
    """One line, whatever is in the names and words that it quotes."""
    line = visible(f"error: {' '.join(str(error).splitlines())}")
    _tell(f"{_RED}{line}{_PLAIN}" if has_colour(sys.stderr) else line)


def confirm(question: str) -> bool:
    """Whether somebody at the terminal answers with y; without a terminal there is nobody to ask, and it is yes."""
    if not is_interactive():
        return True
    _tell(visible(f"{question} [y/N] "), end="")
    answer = sys.stdin.readline().strip()
    if answer.lower() not in ("y", "yes", "n", "no", ""):  # typed before the question was there
        echo_err(f"{answer!r} is neither y nor n, so it counts as n, and as nothing else")
    return answer.lower() in ("y", "yes")


def read_stdin() -> bytes:
    """All bytes of stdin; none where somebody types or there is no stdin."""
    return from_first(_read_stdin)


def _read_stdin() -> bytes:
    if sys.stdin is None or is_interactive():
        return b""
    buffer = getattr(sys.stdin, "buffer", None)  # a caller in Python may have put text in its place
    return sys.stdin.read().encode() if buffer is None else buffer.read()


def read_lines(ask: str, blocks: bool = False) -> Iterator[str]:
    """Lines of stdin without their ends; on a terminal, asked for, and Ctrl-C only drops the line.

    Args:
        blocks: take the lines from one that begins with three quotation marks to one that ends with them as one text.

    Raises:
        FormatError: a piped line is not UTF-8.
    """
    whole = _block if blocks else (lambda read: read())
    if not is_interactive():
        piped = _piped()
        with suppress(StopIteration):
            while True:
                yield whole(piped.__next__)
        return
    read = _reader(ask)
    while True:
        try:
            yield whole(read).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            echo_error(FormatError(f"the line is not UTF-8 (byte 0x{byte:02x}): convert it first"))
        except UsageError as error:
            write("\n")
            echo_error(error)
            return
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n")


def _block(read: Callable[[], str]) -> str:
    text = read()
    if not text.startswith(QUOTES):
        return text
    text = text[len(QUOTES) :]
    while not text.rstrip().endswith(QUOTES):
        try:
            text += "\n" + read()
        except (EOFError, StopIteration):
            raise UsageError(f"the text that began with {QUOTES} does not end with {QUOTES}") from None
    return text.rstrip()[: -len(QUOTES)].strip("\n")


def _piped() -> Iterator[str]:
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None:  # no stdin, or text that a caller in Python has put there
        yield from (line.rstrip("\r\n") for line in sys.stdin or ())
        return
    first = buffer.readline()
    if is_wide(first):
        yield from (line.removesuffix("\r") for line in decode_text(first + buffer.read(), "stdin").split("\n"))
        return
    if first:
        yield decode_text(first, "stdin").rstrip("\r\n")
    while line := buffer.readline():
        yield decode_text(BOM_UTF8 + line, "stdin").rstrip("\r\n")  # the mark: whatever it begins with, it is UTF-8


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
    shown: Any = [("bold" if has_colour(asked_on) else "", ask)]
    session: Any = PromptSession(
        shown, output=create_output(stdout=asked_on), history=_history(), enable_suspend=True, key_bindings=_keys()
    )

    def read() -> str:
        if end_is_waiting():
            raise EOFError
        return str(session.prompt())

    return read


def _keys() -> Any:
    """Alt-Enter begins a new line of the same text; a null character where nothing is typed yet is Ctrl-D.

    Where Ctrl-D was typed behind a whole line before anybody asked, the terminal gives a null character for it.

    An escape sequence that sets a colour begins like an event of a mouse, of which prompt_toolkit then misses the
    place. Nothing here has to do with a mouse: what looks like one is text, as it is where a terminal tells what was
    pasted.
    """
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.keys import Keys

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    keys.add(Keys.ControlAt)(_end_of_null)
    keys.add(Keys.Vt100MouseEvent)(lambda event: event.current_buffer.insert_text(event.data))
    return keys


def _end_of_null(event: Any) -> None:
    if not event.current_buffer.text:
        event.app.exit(exception=EOFError)


def _history() -> Any:
    """What was typed before, from a file that only its owner can read; only of this session if it cannot be kept."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    base = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    path = Path(base) / "mistral-ref" / "history"
    try:
        if not path.is_absolute():  # no home folder is known
            return InMemoryHistory()
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def _plain(ask: str, asked_on: Any) -> str:
    try:
        import readline  # noqa: F401  (line editing and history for input())
    except ImportError:
        pass
    if asked_on is sys.stdout:
        return input(ask)
    print(ask, end="", file=asked_on, flush=True)
    return input()


class Thoughts:
    """What a model thinks before it answers, on stderr as it comes: dim where there are colours.

    Args:
        shown: whether it is; else one line reports that there is a thought. --quiet prints neither.
    """

    def __init__(self, shown: bool) -> None:
        self._shown, self._said = shown, False
        self._put: Callable[[str], None] | None = None  # while one is open

    def push(self, text: str) -> None:
        """Show a piece of a thought."""
        if _quiet or self._said:
            return
        if not self._shown:
            echo_err("(thinking ..)")
            self._said = True
        elif text:
            if self._put is None:
                self._put = writer(sys.stderr)
                print(_DIM if has_colour(sys.stderr) else "", end="", file=sys.stderr)
            self._put(text)

    def end(self) -> None:
        """End the line of what was shown."""
        if self._put is not None:
            self._put = None
            print(_PLAIN if has_colour(sys.stderr) else "", file=sys.stderr, flush=True)


def print_stream(
    pieces: Iterable[Piece], echo: str = "", more: Callable[[], str] = str, *, thinking: bool = True
) -> int:
    """Text on stdout as it is generated, `echo` first; then how fast, on stderr, also after Ctrl-C.

    Returns how many tokens were generated.

    Args:
        more: what else to report at the end.
        thinking: whether thoughts are shown, on stderr.
    """
    generated, reason, interrupt, show, pace = 0, "", None, writer(), Pace()
    thoughts, thought, within = Thoughts(thinking), 0, False
    try:
        with counting_stops():
            show(echo)
            for piece in pieces:
                within = piece.thought if piece.token or piece.text else within
                if piece.thought:
                    thoughts.push(piece.text)
                    thought += piece.token is not None
                elif piece.text:
                    thoughts.end()
                    show(piece.text)
                if piece.token:
                    generated += 1
                    pace.token()
                reason = piece.finish_reason or reason
    except KeyboardInterrupt as stopped:
        reason, interrupt = "interrupted", stopped
    thoughts.end()
    write("\n")
    where = ", within a thought (--max_tokens)" if reason == "length" and within else ""
    of_them = f", {thought} of them thought" if thought else ""
    echo_err(f"[{counted(generated, 'token')}{of_them}{pace}{more()}; {reason}{where}]")
    if interrupt:
        raise interrupt
    return generated


def stream_one(
    loaded: Loaded,
    prompt: Any,
    params: SamplingParams,
    echo: str = "",
    chunk_size: int | None = None,
    thoughts: ThoughtIds | None = None,
    thinking: bool = True,
    eos_ids: Collection[int] | None = None,
) -> None:
    """Continue one prompt on stdout as it is generated, `echo` first; then how fast on stderr, also after Ctrl-C, which
    ends it between two steps.

    Args:
        thoughts: ids between which a model thinks.
        thinking: whether that is shown, on stderr.
        eos_ids: what ends the text; None: as the tokenizer has it.
    """
    from mistral.generate import encode_prompts, stream

    ids = encode_prompts([prompt], loaded.tokenizer)[0]
    noted = note_length(loaded, len(ids))
    bar = Bar("prompt", "token")
    with Interrupt() as interrupt:

        def between_steps(done: int, total: int) -> None:
            interrupt.check()
            bar(done, total)

        how = {"params": params, "chunk_size": chunk_size, "progress": between_steps}
        pieces = stream([ids], loaded.model, loaded.tokenizer, thoughts=thoughts, eos_ids=eos_ids, **how)
        generated = print_stream(pieces, echo, thinking=thinking)
    if not noted:
        note_length(loaded, len(ids) + generated)


def note_length(loaded: Loaded, longest: int) -> bool:
    """Print a note where sequences of that many tokens are beyond those that a model was trained on; whether it did."""
    note = loaded.beyond_training(longest)
    if note:
        echo_err(f"note: {note}")
    return note is not None
