"""What a LoRA adapter is, from headers: its base, rank, scale and matrices, and how to use it. Needs no PyTorch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from mistral.formats.adapter import CONFIG, FORMS, Adapter, is_adapter, read_adapter
from mistral.formats.adapter_words import left_over, more_words, sampling_of
from mistral.formats.folder import read_folder
from mistral.formats.layouts import LAYOUTS
from mistral.formats.merge import release_named
from mistral.formats.tokenizers import chat_templates, has_tokenizer, read_tokenizer
from mistral.formats.widen import TABLES
from mistral.tokenizer import TokenizerError
from mistral.util import memory
from mistral.util.english import counted, some_names
from mistral.util.errors import MistralError


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
    pairs, vocabulary, notes = found.pairs.values(), None, [*found.notes, *sampling_of(found.path)]
    try:
        vocabulary = _vocabulary(found, notes)
    except TokenizerError as error:
        notes.append(f"its tokenizer cannot be used: {error}")
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
        "vocabulary": vocabulary,
        "parameters": sum(tensor.parameters for tensor in found.weights.tensors.values()),
        "bytes": found.weights.nbytes,
        "dtypes": dtypes,
        "notes": notes,
    }


def _vocabulary(found: Adapter, notes: list[str]) -> dict[str, Any] | None:
    """What an adapter makes of the vocabulary: rows of its tables, words of its tokenizer, beside those of its base;
    None where it has neither. Adds to the notes what is odd about its tokenizer."""
    rows = max((found.weights.tensors[found.whole[name]].shape[0] for name in TABLES if name in found.whole), default=0)
    folder, template, words, file = found.path, None, list[str](), None
    ids: Mapping[str, int] = {}
    before, base = _base_rows(found.base)
    last = max((max(found.rows[name].ids) for name in TABLES if name in found.rows), default=-1)
    if before is not None and last >= before:  # rows of words that were added, saved one by one
        rows = max(rows, last + 1)
    if folder.is_dir() and has_tokenizer(folder):
        own = read_tokenizer(folder)
        ids = own.added
        notes += own.notes
        past = sorted(ids, key=ids.__getitem__)
        words, file = past if base is None else more_words(folder, base), own.path.name
        template = getattr(chat_templates(folder).get("default"), "file", None)
    if not rows and not words:
        return None
    if rows and (lost := [word for word in words if ids.get(word, 0) >= rows and word != own.named.get("pad_token")]):
        has = f"{counted(len(lost), 'token')} ({some_names(lost)})"
        notes.append(f"its tokenizer has {has} for which it has no row: refused{left_over(folder, lost)}")
    beyond = None if before is None else [word for word in words if ids.get(word, 0) >= before]
    told = {"rows": rows or None, "base_rows": before, "tokenizer": file, "words": words, "template": template}
    return told | {"words_beyond_base": beyond}


def _base_rows(base: str | None) -> tuple[int | None, Path | None]:
    """The rows of the vocabulary of the base that an adapter names, and where it is, as far as either is known."""
    if base is None:
        return None, None
    try:
        if os.path.isdir(base) or os.path.isfile(base):
            found = read_folder(base)
            return found.args.vocab_size, found.path
    except MistralError:
        pass
    release = release_named(base)
    return None if release is None else release.vocab_size, None


def _of_vocabulary(told: dict[str, Any]) -> str:
    rows, before, words = told["rows"], told["base_rows"], told["words"]
    shown = f"{counted(len(words), 'word')} ({some_names(words)})" if words else "no words"
    of = f"{told['tokenizer']} beside it adds {shown}" if told["tokenizer"] else "no tokenizer is beside it"
    chat = f", with the chat template {told['template']}" if told["template"] else ""
    if rows is None:
        where = "its base has rows for them" if told["words_beyond_base"] == [] else "no rows for them are in it"
        return f"{of}{chat}; {where}"
    more = "" if before is None or rows <= before else f", {rows - before:,} more than its base"
    return f"{counted(rows, 'row')}{more}; {of}{chat}"


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
        **({"vocabulary": _of_vocabulary(told["vocabulary"])} if told["vocabulary"] else {}),
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
