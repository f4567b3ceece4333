"""What a command line asks for: a model, prompts, a text. Each is had or refused with one line.

Knows nothing about commands.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral.cli import terminal
from mistral.util.errors import UsageError

if TYPE_CHECKING:
    from mistral.chat.templates import Template
    from mistral.formats.folder import Folder
    from mistral.loader.load import Loaded


def load_model(
    folder: str | None,
    device: str | None,
    dtype: str | None,
    attention: str | None,
    kernels: bool | None,
    quant: str | None,
    deterministic: bool,
    threads: int | None,
    max_batch_size: int,
) -> Loaded:
    from mistral.loader.load import load

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    loaded = load(
        folder,
        device=device,
        dtype=dtype,
        attention=attention,
        kernels=kernels,
        quant=quant,
        deterministic=deterministic,
        max_batch_size=max_batch_size,
    )
    bundled = "the model that ships, " if folder is None else ""
    terminal.say(f"loaded {bundled}{loaded.describe()}")
    for note in loaded.notes:
        terminal.say(f"note: {note}")
    return loaded


@dataclass(frozen=True)
class PromptLine:
    """A prompt, text or ids; the text that follows it, if it is a gap to fill; and the most tokens to make."""

    prompt: Any
    suffix: str | None
    max_tokens: int


def read_prompts(prompt: str | None, suffix: str | None, file: str | None, max_tokens: int) -> list[PromptLine]:
    """What to continue: the word, the lines of the file, or stdin."""
    if file is not None:
        if prompt is not None:
            raise UsageError("a prompt and --file: give one of them")
        if suffix is not None:
            raise UsageError("--suffix and --file: give each line of the file its own suffix")
        return read_jsonl(file, max_tokens)
    if prompt is None:
        try:
            prompt = "" if terminal.typed() or sys.stdin is None else sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise terminal.not_utf8("stdin", error) from None
        if not prompt:
            raise UsageError("no prompt: give one in quotes, --file, or text on stdin")
    return [PromptLine(prompt, suffix, max_tokens)]


def read_jsonl(file: str, max_tokens: int) -> list[PromptLine]:
    asked: list[PromptLine] = []
    try:
        # A byte order mark, as some editors put in front, is no part of the first line.
        with sys.stdin if file == "-" else open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    asked.append(_one_prompt(line, f"{file} line {number}", max_tokens))
    except UnicodeDecodeError as error:
        raise terminal.not_utf8(file, error) from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    if not asked:
        raise UsageError(f"no prompts in {file}: it has no line that is not empty")
    return asked


def _one_prompt(line: str, where: str, max_tokens: int) -> PromptLine:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}") from None
    if not isinstance(entry, dict):
        entry = {"prompt": entry}
    unknown = set(entry) - {"prompt", "suffix", "max_tokens"}
    if unknown:
        raise UsageError(f"{where} has {', '.join(sorted(unknown))}; known are prompt, suffix and max_tokens")
    prompt, suffix, limit = entry.get("prompt"), entry.get("suffix"), entry.get("max_tokens", max_tokens)
    ids = isinstance(prompt, list) and all(type(i) is int for i in prompt)
    if not (isinstance(prompt, str) or ids):
        raise UsageError(f"{where}: the prompt must be text or a list of ids")
    if prompt == []:
        raise UsageError(f"{where}: the prompt is an empty list; bos alone would be one")
    if suffix is not None and not (isinstance(suffix, str) and isinstance(prompt, str)):
        raise UsageError(f"{where}: a suffix must be text, and so must its prompt")
    if type(limit) is not int or limit < 0:
        raise UsageError(f"{where}: max_tokens must be a whole number, at least 0, not {limit!r}")
    return PromptLine(prompt, suffix, limit)


def read_text(file: str | None) -> str:
    try:
        if file is None:
            return "" if terminal.typed() or sys.stdin is None else sys.stdin.read()
        with open(file, encoding="utf-8") as opened:
            return opened.read()
    except UnicodeDecodeError as error:
        raise terminal.not_utf8(file or "stdin", error) from None
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None


def template_of(loaded: Loaded, name: str | None) -> Template:
    from mistral.chat.templates import find_template

    release = None if loaded.release is None else loaded.release.template
    return find_template(loaded.tokenizer, name=name, release=release)


def with_gaps(asked: list[PromptLine], loaded: Loaded) -> list[Any]:
    """The prompts, those with a suffix as the ids after which its model fills the gap."""
    if all(one.suffix is None for one in asked):
        return [one.prompt for one in asked]
    template = template_of(loaded, None)
    return [one.prompt if one.suffix is None else template.encode_fim(one.prompt, one.suffix) for one in asked]


def folder_or_prompt(word: str) -> str:
    """Which of the two a single word after `complete` is: a path that is there, or looks like one or a hub id."""
    one_word = not re.search(r"\s", word)
    path = os.path.isdir(word) or (one_word and re.match(r"/|\.\.?/|~|.*/$|[\w.-]+(/[\w.-]+)+(@\S+)?$", word))
    if one_word and not path and terminal.text_waits():
        raise UsageError(f"no such folder: {word} (or, as the prompt: nothing on stdin beside it)")
    if one_word and not path:
        terminal.say(f"note: there is no folder {word!r} here, so it is the prompt")
    return "folder" if path else "prompt"


@contextlib.contextmanager
def model_of(folder: str | None) -> Iterator[Folder]:
    """A folder, a hub id, a pack with weights, or the model that ships."""
    from mistral.formats.folder import BUNDLED, read_folder
    from mistral.formats.hub import locate
    from mistral.oracle.pack import folder_of, is_pack

    if folder is not None and (is_pack(folder) or (folder.endswith(".safetensors") and Path(folder).exists())):
        with tempfile.TemporaryDirectory() as nothing:
            yield folder_of(folder, Path(nothing))
        return
    if folder is not None and Path(folder).is_file():
        raise UsageError(f"{folder} is neither a folder nor a pack")
    yield read_folder(BUNDLED if folder is None else locate(folder))


def one_line(facts: dict[str, Any]) -> str:
    from mistral.oracle.arrays import as_json

    return as_json(facts)
