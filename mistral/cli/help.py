"""--help: the overview, and the usage of one command, from its signature and docstrings."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from mistral import __version__
from mistral.cli import flags
from mistral.util.flat import field_help, parcels_of

# What a user types: installed, there is a script and no main.py.
PROGRAM = "mistral-ref" if Path(sys.argv[0]).stem == "mistral-ref" else "python -m main"


def overview(commands: Mapping[str, Callable[..., None]]) -> str:
    """All commands, a line each, and what holds for all of them."""
    lines = [f"Mistral 7B and its family, version {__version__}.", "", "Commands (COMMAND --help prints more):"]
    lines += [f"  {name:12} {_text(command).splitlines()[0]}" for name, command in commands.items()]
    lines += ["", "Flags of every command:"]
    lines += [f"  --{name:12} {what}" for name, what in flags.COMMON.items()]
    lines += [
        "",
        "FOLDER is a folder, a .gguf file, or a model of the Hugging Face hub: owner/name, or owner/name@revision.",
        "Default: the folder that the variable MISTRAL_MODEL names, else the bundled model.",
    ]
    return "\n".join(lines)


def of_command(name: str, command: Callable[..., None]) -> str:
    """Usage, description and flags of a command."""
    parameters = [p for p in inspect.signature(command).parameters.values() if flags.kind_of(p)]
    required = [p for p in parameters if p.default is p.empty]
    named = {p: p.name.upper() + ".." * (flags.kind_of(p) is list) for p in parameters}
    places = [named[p] if p in required else f"[{named[p]}]" for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    places += [f"--{p.name} {p.name.upper()}" for p in required if p.kind is p.KEYWORD_ONLY]
    lines = [f"usage: {PROGRAM} {name} {' '.join(places)} [flags]".replace("  ", " "), ""]
    lines += [_text(command).replace("python -m main", PROGRAM)]
    texts = help_texts(command)
    lines += ["", "flags:"] if any(p.kind is p.KEYWORD_ONLY for p in parameters) else []
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY:
            lines.append(_flag(p, texts[p.name], [p.name for p in parameters]))
            lines += [
                f"  --{short:18} short for --{p.name} {value} (the same bits in any batch; slower)"
                for short, (long, value) in flags.SHORT_FORMS.items()
                if long == p.name
            ]
    return "\n".join(lines)


def help_texts(command: Callable[..., None]) -> dict[str, str]:
    """The text for each flag: from `Args:` of the command's docstring, else from that of the dataclass."""
    texts: dict[str, str] = {}
    for default, _ in parcels_of(command):
        texts |= field_help(type(default))
    return texts | dict(field_help(command))


def _flag(p: inspect.Parameter, text: str, names: Collection[str]) -> str:
    short = next((f", {short}" for short, _ in flags.SHORT if flags.long_of(short, names) == p.name), "")
    kind = flags.kind_of(p)
    notes = {list: [], dict: ["ID:NUMBER"]}.get(kind, [kind.__name__])
    if kind in flags.REPEATED and "may be repeated" not in text:
        notes.append("may be repeated")
    other = flags.long_of(f"-{p.name}", names)
    if other is not None:  # --n is not -n
        notes.append(f"-{p.name} is --{other}")
    if p.default is p.empty:
        notes.append("required")
    elif not any(p.default is nothing for nothing in (None, False, ())) and "default:" not in text:
        notes.append(f"default: {p.default}")
    return f"  {f'--{p.name}{short}':20} {text}" + (f" ({', '.join(notes)})" if notes else "")


def _text(command: Callable[..., None]) -> str:
    """The docstring without its `Args:`, which become the texts of the flags."""
    return re.split(r"\n+Args:\n", inspect.getdoc(command) or "")[0]
