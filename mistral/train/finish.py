"""The end of a run: what was trained is written, with its card and a picture; the state goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mistral import __version__
from mistral.train import output
from mistral.train.card import card
from mistral.train.data import Samples
from mistral.train.log import PLOT, Log, plot
from mistral.train.loop import Loop
from mistral.train.setup import Setup
from mistral.train.state import BEST, STATE, Progress
from mistral.util.english import counted
from mistral.util.files import spelled_out, write_atomic

CARD = "README.md"


@dataclass(frozen=True)
class Finished:
    """A run that came to its end.

    Args:
        out: the folder of the results.
        progress: how far it came.
        losses: of training, nats a token: the means over the first and over the last tenth of the steps.
        eval_losses: of the first and the last evaluation, where samples were held out.
        notes: what was assumed, cut or rounded, a sentence each.
    """

    out: Path
    progress: Progress
    losses: tuple[float, float]
    eval_losses: tuple[float, float] | None
    notes: tuple[str, ...]


def finish(setup: Setup, loop: Loop, history: Log, found: Samples, merge: bool, command: str) -> Finished:
    """Write everything; see `Finished`.

    Raises:
        MistralError: something cannot be written; the state is still there.
    """
    out = loop.out
    setup.notes += _write(setup, loop, merge)
    if setup.options.patience is not None:
        setup.notes.append(f"the weights are those of step {loop.progress.best_step}, whose evaluation was best")
    if not plot(history.entries, out / PLOT):
        setup.notes.append(f"no {PLOT}, which needs matplotlib: pip install matplotlib")
    losses = [entry["loss"] for entry in history.entries if "loss" in entry]
    evals = [entry["eval_loss"] for entry in history.entries if "eval_loss" in entry]
    tenth = max(1, len(losses) // 10)
    ends = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    facts = _facts(setup, loop, found, ends, evals)
    text = card(out.resolve().name, setup.base_name, not setup.options.full, facts, setup.options, command)
    with write_atomic(out / CARD) as beside:
        beside.write_text(spelled_out(text), encoding="utf-8")
    for name in (STATE, BEST):
        (out / name).unlink(missing_ok=True)
    notes = tuple(dict.fromkeys(note for note in setup.notes if note not in setup.noted))
    return Finished(out, loop.progress, ends, (evals[0], evals[-1]) if evals else None, notes)


def _write(setup: Setup, loop: Loop, merge: bool) -> list[str]:
    """The weights; notes on them."""
    out, base = loop.out, setup.base
    stored = {tensor.dtype for tensor in base.tensors.values() if not tensor.widened}
    rounded = "float32" if stored & {"float32", "float64"} else "float16" if stored == {"float16"} else "bfloat16"
    if setup.options.full:
        notes = output.write_model(out, base, loop.weights, rounded)
        return notes + (
            [f"the weights are written in {rounded}, rounded once from float32"] if rounded != "float32" else []
        )
    scale = setup.start[1]
    output.write_adapter(out, loop.weights, base.args, setup.options, scale, setup.base_name)
    notes = output.write_merged(out, base, rounded) if merge else []
    if base.args.windows != setup.found.args.windows:
        notes.append(f"use the adapter with --sliding_window {base.args.window_text}, as it was trained")
    return notes


def _facts(
    setup: Setup, loop: Loop, found: Samples, losses: tuple[float, float], evals: Sequence[float]
) -> dict[str, Any]:
    """What the card tells in its table."""
    progress = loop.progress
    arithmetic = f"{str(loop.model.dtype).removeprefix('torch.')} on {loop.model.device.type}"
    facts: dict[str, Any] = {
        "base": setup.base_name,
        "data": f"{found.path.name}, {counted(len(loop.samples), 'sample')}, sha256 {found.sha256}",
        "trained": "all weights" if setup.options.full else f"LoRA of rank {setup.rank}, scale {setup.start[1]:g}",
        "numbers trained": f"{setup.count:,}",
        "steps": f"{progress.step} of {loop.steps}, {counted(progress.tokens, 'token')} in {progress.seconds:.0f} s",
        "loss": f"{losses[0]:.4f}, at the end {losses[1]:.4f} (nats a token, means of a tenth of the steps)",
    }
    if evals:
        facts["held out"] = (
            f"{counted(len(loop.held), 'sample')}: {evals[0]:.4f}, at the end {evals[-1]:.4f} nats a token"
        )
    if setup.options.patience is not None:
        facts["weights"] = f"those of step {progress.best_step}, held out {progress.best_loss:.4f}, the best"
    return facts | {
        "arithmetic": f"{arithmetic}; what is trained in float32",
        "made with": f"mistral-oracle-ref {__version__}, torch {torch.__version__}",
    }
