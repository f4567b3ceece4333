"""Files: small ones read whole, up to a size that none of them has (in memory they may take twenty times as much);
text decoded in one way wherever it comes from; files and folders that appear complete or not at all."""

from __future__ import annotations

import codecs
import errno
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mistral.util.errors import FormatError, UsageError, short_repr

MOST = 40_000_000  # bytes; the largest, a tekken.json, has 20 MB
POINTER = b"version https://git-lfs"  # how the text begins that Git LFS leaves in a file's place
LFS = "it is the pointer that Git LFS leaves in its place: run git lfs pull"


def regular(path: str | os.PathLike[str], flags: int) -> int:
    """An `opener` for `open` that refuses what is no file: opening a pipe waits until somebody writes into it.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe, a device.
    """
    opened = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(opened).st_mode
    if not stat.S_ISREG(mode):
        os.close(opened)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is no file, but a pipe or a device", str(path))
    return opened


def read_limited(path: Path, most: int = MOST) -> bytes:
    """The bytes of a small file, up to a size that none has: in memory they may take twenty times as much.

    Raises:
        OSError: it cannot be read, has more than `most` bytes, or is what Git LFS leaves in a file's place.
    """
    with open(path, "rb", opener=regular) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes, which no such file has", str(path))
    if content.startswith(POINTER):
        raise OSError(errno.EINVAL, LFS, str(path))
    return content


def stamp_of(file: Path | int) -> tuple[int, int]:
    """What changes where a file, or one that is open, is written or replaced: its size, and when it was written (ns).

    Raises:
        OSError: there is no such file.
    """
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def unwritten(path: Path) -> int:
    """Bytes of a file that nobody wrote, and which are read as zeros: those of a download that has not ended, mostly.

    0 where the system cannot tell. A file system that compresses may have some for zeros that were written.
    """
    if not hasattr(os, "SEEK_HOLE"):
        return 0
    found = 0
    try:
        with open(path, "rb", opener=regular) as file:
            size = os.fstat(file.fileno()).st_size
            begin = os.lseek(file.fileno(), 0, os.SEEK_HOLE)
            while begin < size:
                try:
                    end = os.lseek(file.fileno(), begin, os.SEEK_DATA)
                except OSError as error:
                    if error.errno != errno.ENXIO:  # no data behind it
                        raise
                    end = size
                found += end - begin
                begin = os.lseek(file.fileno(), end, os.SEEK_HOLE) if end < size else size
    except OSError:
        return 0
    return found


def reason_of(error: OSError | ValueError) -> str:
    """Why a file cannot be read or written, for the end of a sentence."""
    if isinstance(error, IsADirectoryError):
        return "it is a folder, and a file is needed"
    if isinstance(error, NotADirectoryError):
        return "a part of its path is a file, and no folder"
    if isinstance(error, FileExistsError) and error.filename and os.path.isfile(error.filename):
        return "it is a file, and a folder is needed"
    if isinstance(error, ValueError) and "null" in str(error):
        return "its name has a character that no name can have (0)"
    if isinstance(error, FileNotFoundError) and str(error.filename) == "-":
        return "a name of a file is needed here, and - is not stdin"
    return getattr(error, "strerror", None) or str(error)


# Longest first: the mark of UTF-16 is the beginning of that of UTF-32.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def spelled_out(name: str) -> str:
    """The name of a file as text that any file or picture can hold: bytes that are no UTF-8 as in \\udcf6."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def by_utf8_name(path: Path) -> Iterator[Path]:
    """A path to a file that is there, for libraries which open none with a name of other bytes, as Linux may have."""
    if spelled_out(str(path)) == str(path):
        yield path
        return
    with open(path, "rb", opener=regular) as file:
        yield Path(f"/dev/fd/{file.fileno()}")


def lock(descriptor: int, told: str) -> None:
    """Keep an open file or folder from all others that ask for the same, until it is closed.

    Without effect on Windows, and on file systems that have no locks.

    Raises:
        UsageError: another program has it, in the words of `told`.
    """
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(told) from None
    except OSError:
        return


@contextmanager
def locked_folder(path: Path, told: str) -> Iterator[None]:
    """Around what writes into a folder alone; see `lock`."""
    if os.name == "nt":  # which opens no folders
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        lock(descriptor, told)
        yield
    finally:
        os.close(descriptor)


def decode_text(data: bytes, what: str) -> str:
    """Text from bytes: UTF-8, or what a byte order mark says, which is no part of the text. Line ends stay.

    Args:
        what: the file, for messages.

    Raises:
        FormatError: other bytes.
    """
    mark, encoding = _encoding_of(data)
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        advice = "convert it first, for example with iconv"
        if b"\0" in data and encoding == "utf-8":
            advice = "it has zero bytes too, so it is no text, or UTF-16 without its byte order mark"
        raise FormatError(f"{what} is {not_text(error, encoding)}: {advice}") from None


def _encoding_of(data: bytes) -> tuple[bytes, str]:
    """The byte order mark that bytes begin with, and the encoding that it stands for."""
    return next(((mark, encoding) for mark, encoding in _MARKS if data.startswith(mark)), (b"", "utf-8"))


def not_text(error: UnicodeError, encoding: str = "utf-8") -> str:
    """What a text is not, and the first byte that it cannot have, for a sentence that says what is read."""
    name = encoding.upper()[:6].rstrip("-")
    return f"not {name}" + (
        f" (byte 0x{error.object[error.start]:02x})" if isinstance(error, UnicodeDecodeError) else ""
    )


class Lines:
    """A file of lines of text, of any size, read as UTF-8 whatever its byte order mark says; see `decode_text`.

    Args:
        file: opened to read bytes, at its beginning.
        what: the file, for messages.
    """

    def __init__(self, file: io.BufferedReader, what: str) -> None:
        self._file, self._what = file, what
        mark, self._encoding = _encoding_of(file.peek(4)[:4])  # not seek: it may be a pipe
        file.read(len(mark))
        wide = self._encoding != "utf-8"
        self._text = io.TextIOWrapper(file, encoding=self._encoding, newline="\n") if wide else None

    def readline(self, most: int = -1) -> bytes:
        """The next line in UTF-8, with its end, or the first `most` bytes (of a wide encoding: characters) of it.

        Bytes of a file without a mark are given as they are, whatever they are.

        Raises:
            FormatError: it has a mark, and is not what that says.
        """
        if self._text is None:
            return self._file.readline(most)
        try:
            return self._text.readline(most).encode("utf-8")
        except UnicodeError as error:
            raise FormatError(f"{self._what} is {not_text(error, self._encoding)}, as its mark says") from None

    def __iter__(self) -> Iterator[bytes]:
        while line := self.readline():
            yield line


def plain_ends(text: str) -> str:
    """Text with one kind of line ends: those of Windows and of old Macs become \\n, as in Python's own text files."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_wide(data: bytes) -> bool:
    """Whether bytes begin with the mark of an encoding whose line ends are not one byte."""
    return any(data.startswith(mark) for mark, encoding in _MARKS if encoding != "utf-8")


@contextmanager
def write_atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new file to write into, which takes the place of `path` at the end, or is removed on an error or Ctrl-C.

        with write_atomic("numbers.json") as beside:
            beside.write_text(text, encoding="utf-8")

    What was at `path` is there until the new file is on the disk. A link stays one: what it leads to is replaced.

    Raises:
        FormatError: the file cannot be written: no such folder, a full disk; or `path` is a folder or a device.
    """
    target = real_path(path)
    beside = target.with_name(f".{target.name[:50]}.{secrets.token_hex(4)}.part")
    try:
        if not os.fspath(path):
            raise FormatError("'' cannot be written: the name is empty")
        if os.fspath(path) == "-":
            raise FormatError("- cannot be written: a name of a file is needed here, and it is not stdout")
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if os.path.lexists(target) and not target.is_file():  # a device, which would be replaced; a link in a loop
            raise FileExistsError(errno.EEXIST, "it is there, and no file")
        beside.open("xb").close()  # what writes into it might not say why it cannot
        mode = beside.stat().st_mode
        yield beside
        beside.chmod(mode)  # some libraries make a file that nobody else may read
        _sync_file(beside)
        os.replace(beside, target)
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {reason_of(error)}") from None
    finally:
        with suppress(OSError):
            beside.unlink()


def real_path(path: str | os.PathLike[str]) -> Path:
    """Where a path leads, links and ~ resolved.

    Raises:
        FormatError: the name cannot be that of a file.
    """
    try:
        return Path(os.path.realpath(os.path.expanduser(path)))
    except ValueError as error:  # a null in it
        raise FormatError(f"{short_repr(os.fspath(path))} cannot be written: {reason_of(error)}") from None


def require_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a file that could not be written, before the work that would be lost. Nothing is left where it will be.

    Raises:
        FormatError: its folder takes no files, or it is there and no file: a folder, a device.
    """
    with suppress(_Tried), write_atomic(path):
        raise _Tried


class _Tried(Exception):
    """Ends a file that was only tried."""


@contextmanager
def folder_atomic(place: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `place` at the end, or is removed on an error or Ctrl-C.

    Raises:
        OSError: it cannot be written, or `place` is there by then and not an empty folder.
    """
    work = place.parent / f".{place.name}.{secrets.token_hex(4)}.partial"
    try:
        work.mkdir()
        yield work
        for inner in sorted(work.rglob("*")):
            (_sync_folder if inner.is_dir() else _sync_file)(inner)
        _sync_folder(work)
        if place.is_dir():
            place.rmdir()
        os.rename(work, place)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    _sync_folder(place.parent)


def _sync_file(path: Path) -> None:
    """Have a file's bytes survive a power cut."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Have a folder's names survive a power cut, where folders can be opened at all."""
    if os.name == "posix":
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
