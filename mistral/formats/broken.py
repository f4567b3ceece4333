"""Small files of a folder that are not what their names say: pointers of Git LFS, web pages, files cut short or empty.

A library that finds such a file missing or odd goes on without it, and what it says is lost. Runs without torch.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mistral.util.errors import FormatError, printable
from mistral.util.files import LFS, POINTER, regular
from mistral.util.parsed import KeyTwice, parse_json

# By a pattern for their names: files of JSON, of text, and all others that are no weights.
JSON = (
    r"config\.json|params\.json|generation_config\.json|tokenizer\.json|tekken\.json|tokenizer_config\.json|"
    r"special_tokens_map\.json|added_tokens\.json|.*\.(safetensors|bin)\.index\.json"
)
TEXT = r"chat_template\.jinja|additional_chat_templates/.*\.jinja|SYSTEM_PROMPT\.txt"
OTHERS = r"tokenizer\.model(\.v[0-9]+(m[0-9]+)?)?"
# What nobody can know while a file is broken.
LOST = {
    "generation_config.json": "whether it ends sequences, and with what, is unknown",
    "chat_template.jinja": "how conversations are written is unknown",
}
WHOLE = 1_000_000  # bytes: JSON up to this size is parsed; of more, only both ends are looked at
ENDS = 4096  # bytes of each
HTML = re.compile(rb"\s*<(!doctype html|html|head|\?xml)", re.IGNORECASE)


def broken_files(folder: Path) -> dict[str, str]:
    """What is wrong with each of the small files of a folder that is broken, by its name, in a sentence that begins
    with it; nothing of a single file."""
    if not folder.is_dir():
        return {}
    inside = folder / "additional_chat_templates"
    names = [*os.listdir(folder)] + (
        [f"{inside.name}/{name}" for name in os.listdir(inside)] if inside.is_dir() else []
    )
    found = {name: _problem(folder / name, name) for name in sorted(names) if _is_known(name)}
    return {name: f"{printable(name)} {what}" for name, what in found.items() if what is not None}


def broken_notes(folder: Path) -> list[str]:
    """The same for whoever goes on without those files, with what is unknown then."""
    return [what + (f"; {LOST[name]}" if name in LOST else "") for name, what in broken_files(folder).items()]


def require_whole(folder: Path, also: str = "") -> None:
    """Refuse a folder whose small files would be copied, or made use of, although one is broken.

    Args:
        also: what to do besides, for the end of the message.

    Raises:
        FormatError: it names them.
    """
    if found := broken_files(folder):
        which = "it" if len(found) == 1 else "them"
        raise FormatError(f"{folder}: {'; '.join(found.values())}; or remove {which}{also}")


def _is_known(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in (JSON, TEXT, OTHERS))


def _problem(path: Path, name: str) -> str | None:
    """What is wrong with a file, as the end of a sentence."""
    again = "fetch it again"
    try:
        if path.is_symlink() and not path.exists():
            return f"is a link to a file that is gone: {again}"
        with open(path, "rb", opener=regular) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(size if size <= WHOLE else ENDS)
            file.seek(max(0, size - ENDS))
            last = file.read(ENDS)
    except IsADirectoryError:
        return f"is a folder, not a file: {again}"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if first.startswith(POINTER):
        return f"cannot be read: {LFS}"
    if not first.strip():
        return f"is empty: {again}"
    if HTML.match(first):
        return f"is a web page, as of a download that failed: {again}"
    if re.fullmatch(JSON, name):
        try:
            return None if _is_object(first, last, size) else f"holds no JSON object, or is cut short: {again}"
        except KeyTwice as error:
            return f"{error}: mend it"
    return None


def _is_object(first: bytes, last: bytes, size: int) -> bool:
    """Whether it is an object, as far as it was read.

    Raises:
        KeyTwice: an object has a key twice.
    """
    if size > WHOLE:
        return first.lstrip().startswith((b"{", b"\xef\xbb\xbf{")) and last.rstrip().endswith(b"}")
    try:
        return isinstance(parse_json(first.decode("utf-8-sig")), dict)
    except KeyTwice:
        raise
    except ValueError:
        return False
