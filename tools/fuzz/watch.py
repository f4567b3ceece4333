"""A process that handles one case after the other, and one that watches it: time, memory, crashes, what it prints.

A case may end in a model that loads, or in errors of ours that are one clear line. All else is a violation.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tqdm import tqdm

from mistral.cli.terminal import echo_error
from tools.fuzz.kinds import KINDS, Trace, make_case, prepare

ALLOWED = 10**9  # bytes beyond the size of a case's files
GUARD = 3 * 10**9  # where a case is stopped, for the machine's sake
LONGEST = 600  # characters of an error
START = 120  # seconds for a process to be ready
TELL = 30  # seconds for one that hangs to say where
WHERE = signal.SIGUSR1  # has it do so


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Args:
        kind, number: which case.
        loaded: whether the file was read.
        violations: what must not be, a sentence each; none if all is well.
        errors: what a user would have read, a line each.
        seconds, memory: what it took; of memory, the most beyond what there was before.
        folder: its files.
    """

    kind: str
    number: int
    loaded: bool
    violations: tuple[str, ...]
    errors: tuple[str, ...]
    seconds: float
    memory: int
    folder: Path


def watch(
    cases: Iterable[tuple[str, int]],
    home: Path,
    seed: int,
    limit: float = 20,
    plant: Callable[[], None] | None = None,
) -> Iterator[Outcome]:
    """The outcome of each case, given as kind and number; its folder is removed once the next one is asked for.

    Args:
        home: an empty folder to work in.
        limit: seconds after which a case is taken to hang.
        plant: called once in every process that handles cases, to break something in it.
    """
    # Forked from a process that has imported everything, the next one is there at once when one has died.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.fuzz.kinds"])
    process, ours = None, None
    try:
        for kind, number in cases:
            if process is None or ours is None:
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, home, seed, plant), daemon=True)
                process.start()
                theirs.close()
                if _answer(ours, START) != "ready":
                    raise RuntimeError(f"no process to handle cases: {_log(home)}")
            ours.send((kind, number))
            outcome = _answer(ours, limit)
            if not isinstance(outcome, Outcome):
                if outcome is None:
                    _tell_where(process, home)
                process.kill()  # if it has not died
                process.join()
                why = "hangs" if outcome is None else f"dies of {_cause(process.exitcode)}"
                folder = home / f"{kind}-{seed}-{number}"
                outcome = Outcome(kind, number, False, (f"{why}: {_log(home)}",), (), limit, 0, folder)
                process = None
            yield outcome
            shutil.rmtree(outcome.folder, ignore_errors=True)
    finally:
        if process is not None and ours is not None:
            ours.close()  # which ends it
            process.join()


def _answer(connection: Connection, limit: float) -> object:
    """What the process says; None if it says nothing in time, False if it has died."""
    try:
        return connection.recv() if connection.poll(limit) else None
    except (EOFError, ConnectionResetError):
        return False


def _tell_where(process: BaseProcess, home: Path) -> None:
    """Have a process that hangs print where it is. On a busy machine it may take a while until it gets to that."""
    log, end = home / "log", time.monotonic() + TELL
    before = now = log.stat().st_size
    assert process.pid is not None
    os.kill(process.pid, WHERE)
    while time.monotonic() < end and process.is_alive():
        time.sleep(0.2)
        now, last = log.stat().st_size, now
        if now == last != before:  # all of it is there
            break


def _cause(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _log(home: Path) -> str:
    """What the process has printed, as far as it tells what happened."""
    lines = (home / "log").read_text(encoding="utf-8", errors="replace").splitlines()
    text = " | ".join(line.strip() for line in lines if line.strip())
    return text if len(text) < 1600 else f"{text[:800]} ... {text[-800:]}"


# --- in the process that handles cases


def _work(connection: Connection, home: Path, seed: int, plant: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)
    here = home / "here"
    here.mkdir(exist_ok=True)
    os.chdir(here)
    with open(home / "log", "ab", buffering=0) as log:
        # Where C++ libraries print, too.
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        for stream in (sys.stdout, sys.stderr):
            assert isinstance(stream, io.TextIOWrapper)
            stream.reconfigure(line_buffering=True)
        log.truncate(0)
        faulthandler.enable(log)
        faulthandler.register(WHERE, log)
        for category in (UserWarning, RuntimeWarning, FutureWarning):
            warnings.simplefilter("always", category)
        tqdm.set_lock(threading.RLock())  # its own is shared by processes, and left behind by one that is killed
        prepare(home)
        if plant is not None:
            plant()
        connection.send("ready")
        while True:
            try:
                kind, number = connection.recv()
            except EOFError:
                return
            folder, rng = make_case(home, kind, seed, number)
            log.truncate(0)
            connection.send(_one(kind, number, folder, rng))


def _one(kind: str, number: int, folder: Path, rng: random.Random) -> Outcome:
    home = folder.parent
    before = _files(home, folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    trace = Trace(False, [])
    held = _reset_peak()
    began = time.perf_counter()
    with _guarded(GUARD + size):
        KINDS[kind].use(folder, rng, trace)
    seconds = time.perf_counter() - began
    memory = max(0, _peak() - held)
    errors = [_printed(error) for _, error in trace.errors]
    violations = [
        f"{step}: {what}"
        for (step, error), line in zip(trace.errors, errors, strict=True)
        if (what := _objection(error, line.replace(str(folder), "FOLDER")))
    ]
    if memory > ALLOWED + size:
        violations.append(f"takes {memory / 1e6:,.0f} MB for files of {size / 1e6:,.1f} MB")
    if new := _files(home, folder) - before:
        violations.append(f"files appear: {', '.join(sorted(new))}")
        for name in new:  # or the next case has them
            shutil.rmtree(home / name, ignore_errors=True)
            (home / name).unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if (home / "log").stat().st_size:
        violations.append(f"prints: {_log(home)}")
    return Outcome(kind, number, trace.loaded, tuple(violations), tuple(errors), seconds, memory, folder)


def _objection(error: BaseException, line: str) -> str | None:
    """Why an error is none that a user should see; None if it is a good one."""
    ours = isinstance(error, ValueError) and type(error).__module__.split(".")[0] == "mistral"
    if not (ours or (isinstance(error, OSError) and error.strerror)):
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        return f"{type(error).__name__} ({line[:200]}) at {' < '.join(places[:-5:-1])}"
    if line.count("\n") != 1 or not line.removeprefix("error:").strip():
        return f"not one line: {line[:200]!r}"
    if not line.rstrip("\n").isprintable():
        return f"not printable: {line[:200]!r}"
    if len(line) > LONGEST:
        return f"{len(line)} characters: {line[:200]}..."
    return None


def _printed(error: BaseException) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        echo_error(error)  # type: ignore[arg-type]  # what the command line would not catch is judged all the same
    return shown.getvalue()


def _files(home: Path, folder: Path) -> set[str]:
    """What is in the folder of a case, in the current one, and beside them."""
    places = (home, home / "here", folder)
    return {str(path.relative_to(home)) for place in places for path in place.iterdir()}


def _reset_peak() -> int:
    """Bytes of memory in use, from where the peak is measured."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: a peak then counts only if it is the highest so far
        pass
    return _peak()


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, where it is in bytes
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@contextlib.contextmanager
def _guarded(more: int) -> Iterator[None]:
    """Have no more memory than this beyond what is in use, on Linux."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
