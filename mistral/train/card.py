"""The card of what was trained: a README.md that says how it was made and how it is used. Text only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mistral.train.options import TrainOptions


def card(title: str, base: str, adapter: bool, facts: Mapping[str, Any], options: TrainOptions, command: str) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        title: what it is called.
        base: the model that it was made from.
        adapter: whether it is an adapter, not a whole model.
        facts: what is told in a table, by what it is.
        options: those that are not the defaults are listed.
        command: how it was made, as somebody would type it.
    """
    changed = [(f.name, getattr(options, f.name)) for f in fields(options) if getattr(options, f.name) != f.default]
    front = ["---", f"base_model: {base}", *(["library_name: peft", "tags: [lora]"] if adapter else []), "---"]
    lines = [*front, "", f"# {title}", "", "## How it was made", "", "```", command, "```", ""]
    lines += ["| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in facts.items())]
    lines += [f"| {name} | {value} |" for name, value in changed]
    lines += ["", "Everything that is not in the table had its default.", "", "## How it is used", ""]
    if adapter:
        lines += [
            "```",
            f"python -m main complete {base} PROMPT --adapter THIS_FOLDER",
            f"vllm serve {base} --enable-lora --lora-modules mine=THIS_FOLDER",
            "```",
            "",
            "PEFT and vLLM read `adapter_config.json` and `adapter_model.safetensors`, and need the base in Hugging "
            "Face's layout. The folder `mistral-finetune/` holds the same adapter in the form of mistral-finetune.",
        ]
    else:
        lines += ["```", "python -m main complete THIS_FOLDER PROMPT", "```"]
    return "\n".join(lines) + "\n"
