"""Safetensors files of our own: written whole or not at all, with facts as JSON among their metadata."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from mistral.formats.header import HeaderError, read_header


class ArraysError(ValueError):
    """A file that cannot be written, or is not what it should be."""


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write a file; it appears complete, and takes the place of one of that name only then.

    Args:
        facts: anything JSON has; each a string of JSON in the file's metadata.

    Raises:
        ArraysError: the file cannot be written.
    """
    from safetensors.torch import save_file

    metadata = {name: as_json(value) for name, value in facts.items()}
    with part_of(path) as (target, beside):
        mode = beside.stat().st_mode
        save_file({name: t.contiguous() for name, t in tensors.items()}, beside, metadata=metadata)
        beside.chmod(mode)
        os.replace(beside, target)
    return target


def require_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a file that could not be written, before the work that would be lost. Nothing is left where it will be.

    Raises:
        ArraysError: its folder takes no files, or it is there and no file: a folder, a device.
    """
    with part_of(path):
        pass


@contextmanager
def part_of(path: str | os.PathLike[str]) -> Iterator[tuple[Path, Path]]:
    """Where a file will be, and an empty one beside it, nobody else's, that takes its place once it is whole. What is
    not moved there is gone at the end.

    Raises:
        ArraysError: the file cannot be written.
    """
    from safetensors import SafetensorError

    target = Path(os.path.realpath(os.path.expanduser(path)))
    beside = target.with_name(f".{target.name[:50]}.{secrets.token_hex(4)}.part")
    try:
        if not os.fspath(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if os.path.lexists(target) and not target.is_file():  # a device, which would be replaced; a link in a loop
            raise FileExistsError(errno.EEXIST, "it is there, and no file")
        beside.open("xb").close()  # safetensors' own error would not say why
        yield target, beside
    except (OSError, SafetensorError) as error:
        raise ArraysError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with suppress(OSError):
            beside.unlink()


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


def read(path: Path, format_name: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a file of ours.

    Raises:
        ArraysError: it cannot be read, is none of this format, or of another version.
    """
    facts = facts_of(path)
    if facts.get("format") != format_name:
        raise ArraysError(f"{path} is no {format_name}")
    if facts.get("version") != version:
        raise ArraysError(f"{path} is of version {facts.get('version')!r:.20} of the format; this reads {version}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path), facts
    except (SafetensorError, OSError) as error:
        raise ArraysError(f"{path} cannot be read: {error}") from None


def facts_of(path: Path) -> dict[str, Any]:
    """The facts in a safetensors file's metadata; those that are no JSON are left out.

    Raises:
        ArraysError: it cannot be read, or is no safetensors file.
    """
    try:
        read_header(path)
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except HeaderError as error:
        raise ArraysError(f"{path} is not a complete safetensors file: {error}") from None
    except OSError as error:
        raise ArraysError(f"{path} cannot be read: {error.strerror}") from None
    facts: dict[str, Any] = {}
    for name, text in (header.get("__metadata__") or {}).items():
        with suppress(ValueError, TypeError, RecursionError):
            facts[name] = json.loads(text)
    return facts
