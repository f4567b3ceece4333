"""Lines answered on a local Ray cluster of two workers: the same as here, also where a worker is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.batches import by_name, request, write_lines
from tests.support.commands import ENVIRONMENT
from tests.support.folders import ROOT, make_folder

pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'ray[data]'")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")]


def descendants(pid: int) -> Iterator[int]:
    """Processes that a process has started, and those that they have."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
            if parent == pid:
                yield int(entry.name)
                yield from descendants(int(entry.name))


def actors(pid: int) -> list[int]:
    """The engines among them."""
    found = []
    for child in descendants(pid):
        try:
            if b"ray::MapWorker" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
        except OSError:
            continue
    return found


def texts(path: Path) -> dict[str, Any]:
    return {name: one["response"] and one["response"]["body"].get("choices") for name, one in by_name(path).items()}


def test_a_killed_worker_costs_no_line(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    lines = [request(f"r{i}", f"{i} kings", max_tokens=250, seed=i, ignore_eos=True) for i in range(40)]
    lines += [request("bad", foo=1), request("chat", "wolves", "/v1/chat/completions", max_tokens=4, seed=1)]
    path, out, here = write_lines(tmp_path / "in", *lines), tmp_path / "out", tmp_path / "here"
    words = ["--model", str(folder), "--rows", "2", "--execution", "bitwise", "--max_positions", "600"]
    words += ["--device", "cpu"]
    command = [sys.executable, "-m", "main", "batch", str(path)]
    process = subprocess.Popen(
        [*command, str(out), "--ray", "--workers", "2", *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None and (not out.exists() or not out.read_bytes()):
            time.sleep(0.02)
        running = actors(process.pid)
        assert len(running) == 2
        os.kill(running[0], signal.SIGKILL)
        assert out.read_bytes().count(b"\n") < len(lines)
        _, said = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 1, said  # one line is an error
    assert "42 of 42 lines, 1 of them an error" in said
    done = subprocess.run([*command, str(here), *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=240)
    assert done.returncode == 1
    assert texts(out) == texts(here)
