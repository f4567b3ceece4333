"""The command line run in this process: words in; exit code, stdout and stderr out."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest

from mistral.cli import main
from tests.support.folders import ROOT

# For commands that run as processes: the CPU, one thread, and buffers as usual, so that a missing flush shows.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT["XDG_STATE_HOME"] = "/dev/null/state"  # what tests type is not kept: no folder can be there
PATIENCE = 120  # seconds that a test waits for what a process says: none takes so long, however busy the machine is


@dataclass(frozen=True)
class Outcome:
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line, of a command that was refused and said nothing else but what it had loaded."""
        lines = [line for line in self.err.splitlines() if not line.startswith("loaded ")]
        assert (self.code, self.out, len(lines)) == (2, "", 1), self
        assert lines[0].startswith("error: "), self
        return lines[0].removeprefix("error: ")

    @property
    def text(self) -> str:
        """The stdout of a command that went well."""
        assert self.code == 0, self
        assert "error: " not in self.err, self
        return self.out


Command = Callable[..., Outcome]


def in_process(capfd: pytest.CaptureFixture[str]) -> Command:
    """A function that runs words, with `stdin` piped in; capfd also sees what C++ prints."""

    def run(*words: object, stdin: str | bytes = "") -> Outcome:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        capfd.readouterr()
        with (
            mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")),
            mock.patch("torch.cuda.is_available", return_value=False),
            mock.patch("torch.backends.mps.is_available", return_value=False),
        ):
            code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return run
