"""What a LoRA adapter is, from headers: its base, rank, scale and matrices, and how to use it. Needs no PyTorch."""

from __future__ import annotations

import shlex
from os import PathLike
from pathlib import Path
from typing import Any

from mistral.formats.adapter import CONFIG, FORMS, is_adapter, read_adapter
from mistral.formats.layouts import LAYOUTS
from mistral.util import memory
from mistral.util.english import counted


def is_one(path: str | PathLike[str]) -> bool:
    """Whether a path is that of an adapter and of no whole model."""
    place = Path(path)
    return is_adapter(place) and not any(layout.has_weights(place) for layout in LAYOUTS.values())


def report(path: str | PathLike[str]) -> dict[str, Any]:
    """Everything there is to say about an adapter, ready for JSON.

    Raises:
        AdapterError, ParamsError, WeightsError: it is broken, or cannot be merged exactly.
    """
    found = read_adapter(path)
    pairs = found.pairs.values()
    dtypes = sorted({tensor.dtype for tensor in found.weights.tensors.values()})
    return {
        "folder": str(path),
        "kind": "DoRA" if found.dora else "LoRA",
        "form": FORMS[found.form],
        "other_layout": "mistral" if found.form == "peft" else "hf",
        "base": found.base,
        "ranks": sorted({pair.rank for pair in pairs}),
        "scales": sorted({pair.scale for pair in pairs}),
        "targets": list(found.targets),
        "matrices": len(found.pairs),
        "replaces": found.replaces,
        "parameters": sum(tensor.parameters for tensor in found.weights.tensors.values()),
        "bytes": found.weights.nbytes,
        "dtypes": dtypes,
        "notes": list(found.notes),
    }


def as_text(told: dict[str, Any]) -> str:
    """The report for people: one fact a line, aligned."""
    base = told["base"] or f"not named{' in ' + CONFIG if told['form'] == FORMS['peft'] else ''}"
    facts = {
        "folder": told["folder"],
        "adapter": f"{told['kind']} in the form of {told['form']}, not a whole model",
        "base": base,
        "rank": " and ".join(map(str, told["ranks"])),
        "scale": " and ".join(f"{scale:g}" for scale in told["scales"]),
        "changes": f"{counted(told['matrices'], 'matrix', 'matrices')}: {', '.join(told['targets'])}",
        **({"replaces": f"{told['replaces']}, by weights of its own"} if told["replaces"] else {}),
        "parameters": f"{told['parameters'] / 1e6:,.1f} M, stored as {' and '.join(told['dtypes'])}, "
        f"{memory.as_text(told['bytes'])}",
    }
    lines = [f"{name:12}{fact if fact.isprintable() else ascii(fact)}" for name, fact in facts.items()]
    lines += ["", *(f"note: {note}" for note in told["notes"])] if told["notes"] else []
    folder = shlex.quote(told["folder"])
    # mistral-finetune's form has one rank and one scale, and no place for more.
    plain = told["kind"] == "LoRA" and not told["replaces"] and len(told["ranks"]) == len(told["scales"]) == 1
    other = f"  python -m main convert {folder} OTHER --to {told['other_layout']} --base BASE"
    return "\n".join(
        [
            *lines,
            "",
            "used with its base",
            f"  python -m main complete BASE PROMPT --adapter {folder}",
            f"  python -m main convert BASE MERGED --to hf --adapter {folder}",
            *([other] if plain or told["form"] != FORMS["peft"] else []),
        ]
    )
