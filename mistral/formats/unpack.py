"""What a GGUF file holds besides weights, as files of a folder: tokenizer, chat templates, ends of sequence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mistral.formats.hf_tokenizer import added_tokens
from mistral.formats.tokenizers import JSON, MORE_TEMPLATES, TEMPLATE, chat_templates, is_gguf_file
from mistral.formats.writer import as_json
from mistral.special_tokens import CONFIG
from mistral.tokenizer import Tokenizer
from mistral.util.errors import printable

GENERATION = "generation_config.json"


def unpacked(path: Path, tokenizer: Tokenizer | None) -> tuple[dict[str, bytes], list[str]]:
    """Files by name, and what was lost, a sentence each; none of either where a model is a folder.

    Args:
        tokenizer: the model's; None where there is none that can be used.

    Raises:
        TokenizerError: the file's templates cannot be read.
    """
    if not is_gguf_file(path):
        return {}, []
    files: dict[str, bytes] = {}
    notes: list[str] = []
    if tokenizer is None:
        notes.append("no tokenizer was written")
    else:
        files |= _tokenizer(path, tokenizer, notes)
        files[GENERATION] = _json(_ids(tokenizer))
    for name, template in chat_templates(path).items():
        if name == "default":
            files[TEMPLATE] = template.text.encode("utf-8")
        elif re.fullmatch(r"\w[\w-]{0,63}", name, re.ASCII):
            files[f"{MORE_TEMPLATES}/{name}.jinja"] = template.text.encode("utf-8")
        else:
            notes.append(f"not carried along: the chat template {printable(name)}, whose name cannot be that of a file")
    return files, notes


def _tokenizer(path: Path, tokenizer: Tokenizer, notes: list[str]) -> dict[str, bytes]:
    if tokenizer.path != path:
        notes.append(f"{tokenizer.path.name} was copied from beside {path.name}, and no other file")
        return {tokenizer.path.name: tokenizer.path.read_bytes()}
    name, content = tokenizer.as_file()
    if name != JSON:
        if not tokenizer.adds_bos:
            notes.append(f"{name} cannot say that texts begin without bos, as {path.name} does: they will have one")
        beside = added_tokens(tokenizer)
        return {name: content} | ({CONFIG: _json(beside)} if beside else {})
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.named,
        "add_bos_token": tokenizer.adds_bos,
        "clean_up_tokenization_spaces": False,
    }
    return {name: content, CONFIG: _json(config)}


def _ids(tokenizer: Tokenizer) -> dict[str, Any]:
    ends = sorted(tokenizer.eos_ids)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    return {key: value for key, value in ids.items() if value not in (-1, [])}


def _json(value: dict[str, Any]) -> bytes:
    return as_json(value).encode("utf-8")
