"""The output file of a batch job: what an earlier run has left in it, and lines appended whole or not at all.

Runs without torch.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from mistral.batch.lines import Answered
from mistral.util.errors import FormatError, UsageError, short_repr
from mistral.util.files import lock, reason_of, write_atomic

OURS = "fp_mistral_"  # begins a system_fingerprint that this library's engine has put into an answer
SYNC = 1.0  # seconds after which what was written is made to survive a power cut


@dataclass(frozen=True)
class Earlier:
    """What the output file holds.

    Args:
        ok: ids of lines that were answered, each with its custom_id.
        failed: ids of lines that were not.
        model: which answered the first of them, by its name.
        fingerprint: of that model, where this library's engine ran it; see `settings.EngineSettings.fingerprint`.
        length: bytes of whole lines; what follows is half a line.
    """

    ok: dict[str, str]
    failed: frozenset[str]
    model: str | None
    fingerprint: str | None
    length: int


class Output:
    """The output file, locked: nobody else's batch writes to it meanwhile.

    Args:
        path: of the file.
        file: opened for appending.
        earlier: what it holds.
    """

    def __init__(self, path: str, file: BinaryIO, earlier: Earlier) -> None:
        self.path, self.earlier = path, earlier
        self.done = set(earlier.ok) | earlier.failed
        self._file, self._synced = file, time.monotonic()

    def append(self, answered: Answered) -> bool:
        """Write a line, unless there is one for its request; return whether there was none.

        A process that is killed leaves all of it, nothing, or half a line, which the next run cuts off.

        Raises:
            FormatError: the disk is full, or the like. What was written of the line is taken back.
            UsageError: another model has answered than before: on a cluster only its answers tell.
        """
        if answered.id in self.done:
            return False
        mark, before = _fingerprint_of(answered), self.earlier.fingerprint
        if mark is not None and before not in (None, mark):
            raise UsageError(f"{self.path} has answers of another model: give another output")
        line = answered.as_json()
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # only a part of it was written
            if time.monotonic() - self._synced > SYNC:
                self.sync()
        except OSError as error:
            self._file.truncate(end)
            raise FormatError(f"{self.path} cannot be written: {reason_of(error)}") from None
        self.done.add(answered.id)
        return True

    def sync(self) -> None:
        """Have what was written survive a power cut."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


@contextmanager
def opened(path: str) -> Iterator[Output]:
    """The output file, made if there is none; half a line at its end is cut off. One that stays empty is removed.

    Raises:
        FormatError: it cannot be written, or holds something else than answers of a batch.
        UsageError: another batch writes to it.
    """
    new = not os.path.lexists(path)
    with _locked(path) as file:
        earlier = _read(path)
        file.truncate(earlier.length)
        output = Output(path, file, earlier)
        try:
            yield output
        finally:
            output.sync()
            if new and not output.done:
                with suppress(OSError):
                    os.unlink(path)


def drop_failed(path: str) -> int:
    """Take the lines out of the output file that are errors, so that they are asked again; return how many.

    The file is replaced in one step.
    """
    if not os.path.exists(path):
        return 0
    with _locked(path):
        earlier = _read(path)
        if not earlier.failed:
            return 0
        with open(path, "rb") as old, write_atomic(path) as beside, open(beside, "wb") as new:
            for line in old:
                if line.endswith(b"\n") and json.loads(line)["id"] in earlier.ok:
                    new.write(line)
    return len(earlier.failed)


@contextmanager
def _locked(path: str) -> Iterator[BinaryIO]:
    try:
        file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed below)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be written: {reason_of(error)}") from None
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise FormatError(f"{path} cannot be written: it is there, and no file that a batch could be continued in")
        lock(file.fileno(), f"{path}: another batch writes to it")
        yield file


def _read(path: str) -> Earlier:
    """What the output file holds.

    Raises:
        FormatError: a whole line is no answer of a batch.
    """
    ok: dict[str, str] = {}
    failed: set[str] = set()
    model, fingerprint, length = None, None, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            answered = _answered(line)
            if answered is None:
                begin = short_repr(line[:40].decode("utf-8", "replace").rstrip())
                raise FormatError(
                    f"{path} line {number} is no answer of a batch ({begin}): give the output its own file"
                )
            if answered.ok:
                ok[answered.id] = answered.custom_id or ""
                model = model or _model_of(answered)
                fingerprint = fingerprint or _fingerprint_of(answered)
            else:
                failed.add(answered.id)
            length += len(line)
    return Earlier(ok, frozenset(failed), model, fingerprint, length)


def _answered(line: bytes) -> Answered | None:
    try:
        fields: Any = json.loads(line)
        found = Answered(fields["id"], fields["custom_id"], fields["response"], fields["error"])
        whole = isinstance(found.id, str) and found.id.startswith("batch_req_")
        return found if whole and isinstance(found.ok, bool) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _model_of(answered: Answered) -> str | None:
    return _told(answered, "model")


def _fingerprint_of(answered: Answered) -> str | None:
    mark = _told(answered, "system_fingerprint")
    return mark if mark is not None and mark.startswith(OURS) else None  # a service changes its own as it likes


def _told(answered: Answered, key: str) -> str | None:
    body = answered.response["body"] if answered.response is not None else None
    value = body.get(key) if isinstance(body, dict) else None
    return value if isinstance(value, str) else None
