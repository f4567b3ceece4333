"""What happened in a run: a line of JSON for each step and each evaluation, and a picture of the losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from mistral.util.files import write_atomic
from mistral.util.parsed import parse_json

LOG, PLOT = "log.jsonl", "loss.svg"


class Log:
    """The log of a run, which a run that goes on continues behind the step that it goes on from.

    Args:
        path: the file; None keeps the lines in memory, as all ranks but the first do.
        step: steps that are done: lines about later ones, which will be done again, are dropped.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.entries = [entry for entry in read_log(path) if entry["step"] <= step] if step and path else []
        self._file: TextIO | None = None
        if path is None:
            return
        with write_atomic(path) as beside:
            beside.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (for as long as the run)

    def add(self, **entry: Any) -> None:
        """Write one line, at once."""
        self.entries.append(entry)
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that was broken off by a power cut is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def plot(entries: list[dict[str, Any]], path: Path) -> bool:
    """Draw the losses over the steps; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, what, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=what, linewidth=1, markersize=4)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()
    with write_atomic(path) as beside:
        figure.savefig(beside, format="svg", metadata={"Date": None})
    return True
