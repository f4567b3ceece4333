"""Safetensors files of our own: written whole or not at all, with facts as JSON among their metadata."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from mistral.formats.safetensors_header import HeaderError, read_header
from mistral.formats.writer import save_tensors
from mistral.util.errors import FormatError
from mistral.util.files import by_utf8_name, reason_of, regular, write_atomic


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write a file; it appears complete, and takes the place of one of that name only then. Returns its path, as given.

    Args:
        facts: anything JSON has; each a string of JSON in the file's metadata.

    Raises:
        FormatError: the file cannot be written.
    """
    metadata = {name: as_json(value) for name, value in facts.items()}
    with write_atomic(path) as beside:
        save_tensors(beside, tensors, metadata)
    return Path(os.path.expanduser(path))


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON as every program reads it: null for an infinity and for what is no number, which Python would write out."""
    return json.dumps(_without_infinities(value), allow_nan=False, indent=indent)


def _without_infinities(value: Any) -> Any:
    """The same with null for numbers that JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _without_infinities(one) for name, one in value.items()}
    return [_without_infinities(one) for one in value] if isinstance(value, list | tuple) else value


def read(path: Path, format_name: str, versions: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a file of ours.

    Raises:
        FormatError: it cannot be read, is none of this format, or of another version.
    """
    facts = facts_of(path)
    if facts.get("format") != format_name:
        raise FormatError(f"{path} is no {format_name}")
    if facts.get("version") not in versions:
        known = " and ".join(map(str, versions))
        raise FormatError(f"{path} is of version {facts.get('version')!r:.20} of the format; this reads {known}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with by_utf8_name(path) as named:
            return load_file(named), facts
    except SafetensorError as error:
        raise FormatError(f"{path} cannot be read: {error}") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {reason_of(error)}") from None


def facts_of(path: Path) -> dict[str, Any]:
    """The facts in a safetensors file's metadata; those that are no JSON are left out.

    Raises:
        FormatError: it cannot be read, or is no safetensors file.
    """
    try:
        read_header(path)
        with open(path, "rb", opener=regular) as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except HeaderError as error:
        raise FormatError(f"{path} is not a complete safetensors file: {error}") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {reason_of(error)}") from None
    facts: dict[str, Any] = {}
    for name, text in (header.get("__metadata__") or {}).items():
        with suppress(ValueError, TypeError, RecursionError):
            facts[name] = json.loads(text)
    return facts
