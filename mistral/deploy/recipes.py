"""Recipes: for each target its files, from the templates beside this file; printed, or written all or none."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from mistral.deploy.plan import Deployment
from mistral.util.errors import FormatError
from mistral.util.files import reason_of, require_writable, write_atomic

# What each target consists of: the names of files, each of a template.
TARGETS: Mapping[str, tuple[str, ...]] = {
    "vllm": ("serve.sh",),
    "compose": ("compose.yaml", "Dockerfile"),
    "kubernetes": ("pvc.yaml", "deployment.yaml", "service.yaml", "secret.yaml.example"),
    "skypilot": ("single.yaml", "service.yaml"),
}
WIDTH = 100  # of a line of a comment


def recipes(target: str, deployment: Deployment) -> dict[str, str]:
    """The files of a target, by name."""
    import jinja2

    room = files("mistral.deploy").joinpath("templates")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: room.joinpath(f"{target}.{name}.jinja").read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"json": json.dumps, "shell": shlex.quote, "yaml": _yaml}
    values = {"d": deployment, "flags": grouped(deployment.flags), "about": _lines(deployment.about)}
    return {name: environment.get_template(name).render(values).rstrip() + "\n" for name in TARGETS[target]}


def write(made: Mapping[str, str], place: Path) -> None:
    """Write the files into a folder, which is made if need be: each whole or not at all.

    Raises:
        FormatError: one cannot be written.
    """
    before = place.is_dir()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{place} cannot be written: {reason_of(error)}") from None
    try:
        for name in made:
            require_writable(place / name)
        for name, text in made.items():
            with write_atomic(place / name) as beside:
                beside.write_text(text, encoding="utf-8", newline="\n")
            if name.endswith(".sh"):
                (place / name).chmod(0o755)
    except FormatError:
        if not before:
            with suppress(OSError):  # a file that was written stays, and its folder
                place.rmdir()
        raise


def grouped(flags: tuple[str, ...]) -> list[list[str]]:
    """Flags, each with its value."""
    pairs: list[list[str]] = []
    for word in flags:
        if word.startswith("--"):
            pairs.append([word])
        else:
            pairs[-1].append(word)
    return pairs


def as_text(made: Mapping[str, str]) -> str:
    """Files one after the other, without examples: to be read, or, where all are YAML, piped as several documents."""
    shown = {name: text for name, text in made.items() if not name.endswith(".example")}
    if len(shown) == 1:
        return next(iter(shown.values()))
    return "".join(f"--- # {name}\n{text}" for name, text in shown.items())


def _yaml(text: str) -> str:
    """Printable text in YAML. (JSON's escapes of what lies beyond 16 bits are two characters there.)"""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _lines(text: str) -> list[str]:
    """A sentence in lines, for a comment; what is not printable in it cannot end one."""
    lines = [""]
    for word in re.sub(r"[^\x20-\x7e]", "?", text).split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= WIDTH:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines
