"""The state of a run on disk, in one safetensors file that is replaced as a whole: what --resume goes on from.

Weights that are trained, both moments of AdamW, and how far the run is. Everything else follows from the options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral.formats import writer
from mistral.util.errors import FormatError, short_repr
from mistral.util.files import by_utf8_name, write_atomic

STATE, BEST = "state.safetensors", "best.safetensors"


class StateError(FormatError):
    """A state that is missing or broken, or belongs to another run."""


@dataclass
class Progress:
    """How far a run is.

    Args:
        step: steps that are done.
        tokens: that went through the model in them.
        seconds: that they took.
        best_loss: of evaluations; None before the first.
        best_step: when that was.
        bad: evaluations since then.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int = 0
    bad: int = 0


def save_state(
    path: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.AdamW,
    progress: Progress,
    run: Mapping[str, Any],
) -> None:
    """Write the state; what was at `path` is there until the new one is on the disk.

    Args:
        run: what makes the run what it is, by name: a state goes on only with the same.

    Raises:
        FormatError: it cannot be written.
    """
    tensors = {f"weight.{name}": w.detach() for name, w in weights.items()}
    for name, w in weights.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            if w in optimizer.state:
                tensors[f"{kind}.{name}"] = optimizer.state[w][kind]
    save_tensors(path, tensors, {"progress": json.dumps(asdict(progress)), "run": json.dumps(dict(run))})


def load_state(
    path: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.AdamW, run: Mapping[str, Any]
) -> Progress:
    """Put a state into weights and optimizer; return how far the run is.

    Raises:
        StateError: there is none, it is broken, or it is of another run; the message says what differs.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise StateError(f"no {path.name} in {path.parent}, from which to go on: omit --resume")
    try:
        with by_utf8_name(path) as named, safe_open(named, framework="pt") as file:
            meta = file.metadata() or {}
            progress, had = Progress(**json.loads(meta["progress"])), json.loads(meta["run"])
            differs = [key for key in {**had, **run} if had.get(key) != json.loads(json.dumps(run.get(key)))]
            if differs:
                was, now = short_repr(had.get(differs[0])), short_repr(run.get(differs[0]))
                raise StateError(f"{path} is of another run: {differs[0]} was {was}, and is {now} now")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except StateError:
        raise
    except Exception as error:  # the library raises its own kinds
        raise StateError(f"{path} is broken ({printable_error(error)}): begin again in another folder") from None
    _put(path, tensors, weights, optimizer, progress.step)
    return progress


def _put(
    path: Path, tensors: dict[str, Tensor], weights: Mapping[str, Tensor], optimizer: torch.optim.AdamW, step: int
) -> None:
    with torch.no_grad():
        for name, w in weights.items():
            parts = [tensors.get(f"{kind}.{name}") for kind in ("weight", "exp_avg", "exp_avg_sq")]
            if parts[0] is None or any(part is not None and part.shape != w.shape for part in parts):
                raise StateError(f"{path} does not hold {name} as the model has it")
            w.copy_(parts[0])
            if parts[1] is not None and parts[2] is not None:
                optimizer.state[w] = {
                    "step": torch.tensor(float(step), device=w.device),
                    "exp_avg": parts[1].to(w.device),
                    "exp_avg_sq": parts[2].to(w.device),
                }


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all.

    Raises:
        FormatError: it cannot be written.
    """
    with write_atomic(path) as beside:
        writer.save_tensors(beside, tensors, {"format": "pt", **(metadata or {})})


def load_tensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Put tensors of a file into weights of the same names.

    Raises:
        StateError: it is missing or broken.
    """
    from safetensors.torch import load_file

    try:
        with by_utf8_name(path) as named:
            tensors = load_file(named)
        with torch.no_grad():
            for name, w in weights.items():
                w.copy_(tensors[name])
    except Exception as error:
        raise StateError(f"{path} is broken: {printable_error(error)}") from None


def printable_error(error: Exception) -> str:
    """The first line of another library's error."""
    return short_repr(" ".join(str(error).split()) or type(error).__name__)
